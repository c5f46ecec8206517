"""The objects that go with a restored series: a report of the restoration, a word on the images.

Both are optional. They are series of their own in the source's study, made from the restored
images as these are written, with UIDs and times that repeat; the loop guard knows them by our
equipment as it knows the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from highdicom.base import SOPClass

from dicom_node.dicom import documents, presentation_state, structured_report
from dicom_node.dicom.derived import DerivedInstance
from dicom_node.dicom.documents import Restoration, RestoredImage
from dicom_node.dicom.header import quiet_pydicom, read_dataset
from dicom_node.dicom.provenance import derived_uid
from dicom_node.dicom.structured_report import GateValue
from dicom_node.errors import PermanentError
from dicom_node.settings import IdentitySettings, ReportSettings

__all__ = ["GateValue", "Restoration", "with_reports"]


@dataclass(frozen=True)
class _Written:
    """The restored images so far, in the volume's order, and the digest of their pixels."""

    images: tuple[RestoredImage, ...]
    pixels_sha256: str


def with_reports(
    instances: Iterable[DerivedInstance],
    gates: Sequence[GateValue],
    restoration: Restoration,
    identity: IdentitySettings,
    settings: ReportSettings,
) -> Iterator[DerivedInstance]:
    """The restored instances as they come, then the objects that the settings ask for.

    Raises PermanentError where what was copied from the source fits into no report.
    """
    images: list[RestoredImage] = []
    digest = hashlib.sha256()
    for instance in instances:
        if settings.sr or settings.gsps:
            dataset = read_dataset(instance.data)
            digest.update(dataset.PixelData)
            images.append(documents.restored_image(dataset))
        yield instance
    if not images:
        return
    written = _Written(tuple(images), digest.hexdigest())
    try:
        with quiet_pydicom():
            made = [
                _as_instance(each, written)
                for each in _objects(written, gates, restoration, identity, settings)
            ]
    except Exception as error:
        # The text of the cause may quote the header; its kind cannot.
        uid = images[0].source.sop_instance_uid
        raise PermanentError(
            f"the header of SOP Instance {uid} fits into no report ({type(error).__name__})"
        ) from None
    yield from made


def _objects(
    written: _Written,
    gates: Sequence[GateValue],
    restoration: Restoration,
    identity: IdentitySettings,
    settings: ReportSettings,
) -> Iterator[SOPClass]:
    images, root = written.images, identity.uid_root
    series = images[0].reference.series_instance_uid
    if settings.sr:
        # A late slice is a job of its own with a report of its own in the same series.
        members = sorted(image.reference.sop_instance_uid for image in images)
        report_series = derived_uid(root, "report series", series)
        yield structured_report.enhanced_sr(
            images,
            gates,
            restoration,
            identity,
            settings,
            uids=(report_series, derived_uid(root, "report", report_series, *members)),
            pixels_sha256=written.pixels_sha256,
        )
    if settings.gsps:
        yield from presentation_state.softcopy_states(
            images,
            restoration,
            identity,
            settings,
            series_uid=derived_uid(root, "presentation series", series),
        )


def _as_instance(document: SOPClass, written: _Written) -> DerivedInstance:
    return DerivedInstance(
        sop_instance_uid=str(document.SOPInstanceUID),
        sop_class_uid=str(document.SOPClassUID),
        source_sop_instance_uid=written.images[0].source.sop_instance_uid,
        head=documents.encode(document),
    )
