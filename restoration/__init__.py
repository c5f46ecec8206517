"""DiffCode medical image restoration: one shared network for CT, PET and MR.

from restoration import Restorer

result = Restorer.open("compact").restore(volume, "ct_denoise")
"""

from __future__ import annotations

from restoration.bundle import (
    BundleError,
    Manifest,
    RestorationError,
    builtin,
    load_bundle,
    read_manifest,
    write_bundle,
)
from restoration.diffcode import DiffCode, DiffCodeConfig
from restoration.domain import TaskDomain
from restoration.restorer import Restoration, RestorationMemoryError, Restorer
from restoration.tasks import RestorationTask

__all__ = [
    "BundleError",
    "DiffCode",
    "DiffCodeConfig",
    "Manifest",
    "Restoration",
    "RestorationError",
    "RestorationMemoryError",
    "RestorationTask",
    "Restorer",
    "TaskDomain",
    "builtin",
    "load_bundle",
    "read_manifest",
    "write_bundle",
]
