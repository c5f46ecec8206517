"""Compression with loss: whether a source went through it, and what its header must say then.

An image that once lost something says so for good (PS3.3 C.7.6.1.1.5), in attributes that some
senders leave out when they compress. A result is written without compression, so that the
transfer syntax would no longer tell.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    JPEG2000MC,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom.header import number, text

__all__ = ["record", "why_lossy"]

# PS3.3 C.7.6.1.1.5.1: Lossy Image Compression Method by the syntax that always loses.
_ALWAYS: Mapping[str, str] = {
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
}
# Those that may or may not; which it was, only the header tells.
_PERHAPS = frozenset({JPEG2000, JPEG2000MC, HTJ2K})
_LOSSLESS = "00"


def why_lossy(header: Dataset) -> str | None:
    """Why an image counts as compressed with loss, in words; None where it does not."""
    stated, syntax = text(header, "LossyImageCompression"), _syntax(header)
    if stated == "01" or syntax in _ALWAYS:
        return "the source was compressed with loss"
    if syntax in _PERHAPS and stated != _LOSSLESS:
        return "the source may have been compressed with loss: its header does not say"
    return None


def record(dataset: Dataset) -> None:
    """Let the header say what the transfer syntax says of loss, where it does not yet.

    For a data set with its pixel data, before these are decoded. Nothing that is stated is
    changed, but for a claim that there was no loss.
    """
    syntax = _syntax(dataset)
    if syntax not in _ALWAYS or text(dataset, "LossyImageCompression") == "01":
        return
    dataset.LossyImageCompression = "01"
    dataset.LossyImageCompressionMethod = _ALWAYS[syntax]
    if plain := _uncompressed(dataset):
        ratio = plain / max(1, len(dataset.PixelData))
        dataset.LossyImageCompressionRatio = format_number_as_ds(float(f"{ratio:.4g}"))


def _syntax(header: Dataset) -> str:
    meta = getattr(header, "file_meta", None)
    return text(meta, "TransferSyntaxUID") if meta is not None else ""


def _uncompressed(dataset: Dataset) -> float:
    """Bytes of the pixel data without compression; 0 where the header does not tell."""
    size = number(dataset, "NumberOfFrames") or 1.0
    for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated"):
        size *= number(dataset, keyword) or 0.0
    return size / 8.0
