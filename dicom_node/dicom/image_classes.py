"""The storage classes whose images are restored: CT, MR and PET, classic and multi-frame."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

__all__ = ["CLASSES", "ImageClass", "Kind"]


class Kind(enum.Enum):
    """How an IOD holds its frames."""

    CLASSIC = "classic"  # one frame in one instance
    ENHANCED = "enhanced"
    LEGACY_CONVERTED = "legacy converted"


@dataclass(frozen=True)
class ImageClass:
    """One storage class whose images are restored."""

    uid: str
    modality: str
    kind: Kind

    @property
    def multiframe(self) -> bool:
        """Whether its attributes lie in functional groups."""
        return self.kind is not Kind.CLASSIC


CLASSES: Mapping[str, ImageClass] = {
    str(uid): ImageClass(str(uid), modality, kind)
    for kind, uids in {
        Kind.CLASSIC: (CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage),
        Kind.ENHANCED: (EnhancedCTImageStorage, EnhancedMRImageStorage, EnhancedPETImageStorage),
        Kind.LEGACY_CONVERTED: (
            LegacyConvertedEnhancedCTImageStorage,
            LegacyConvertedEnhancedMRImageStorage,
            LegacyConvertedEnhancedPETImageStorage,
        ),
    }.items()
    for uid, modality in zip(uids, ("CT", "MR", "PT"), strict=True)
}
"""By SOP Class UID."""
