"""DICOM node: receives CT, PET and MR series, has them restored, and delivers the result."""

from __future__ import annotations

__version__ = "0.1.0"
