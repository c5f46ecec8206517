"""Fixtures of the DICOM tests: a policy, an identity, a model that is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom import derived, volume
from dicom_node.dicom.derived import DerivedInstance, RestoredVolume
from dicom_node.dicom.geometry import SAME_GRID, Resampling
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.settings import IdentitySettings, PolicySettings
from tests.factories import write_series

TASKS = {"CT": "ct_denoise", "MR": "mri_sr", "PT": "pet_synthesis"}


@dataclass(frozen=True)
class Model:
    """The identity of weights."""

    name: str = "compact"
    version: str = "1"
    sha256: str = "ab" * 32


@pytest.fixture
def policy() -> PolicySettings:
    return PolicySettings()


@pytest.fixture
def load(tmp_path: Path, policy: PolicySettings) -> Callable[[list[Dataset]], SeriesVolume]:
    """Write the datasets and load them again as one volume."""

    def write_and_load(datasets: list[Dataset]) -> SeriesVolume:
        task = TASKS[datasets[0].Modality]
        return volume.load(write_series(datasets, tmp_path / "series"), task, policy)

    return write_and_load


def build(restored: Sequence[RestoredVolume], **changes: Any) -> list[DerivedInstance]:
    """Derive from volumes in stored values, with a model and times that repeat."""
    arguments: dict[str, Any] = {
        "task": TASKS[restored[0].frames[0].header.Modality],
        "model": Model(),
        "identity": IdentitySettings(),
        "created": datetime(2026, 3, 4, 5, 6, 7),
        "parameters_hash": "cd" * 32,
        **changes,
    }
    return list(derived.build(restored, **arguments))


def derive(
    series: SeriesVolume,
    restored: NDArray[Any] | None = None,
    resampling: Resampling = SAME_GRID,
    **changes: Any,
) -> list[DerivedInstance]:
    """Derive from one volume; by default with the volume itself as the result."""
    values = series.array if restored is None else np.asarray(restored)
    return build([derived.quantise(series, values, resampling)], **changes)
