"""What a receiver must know of an instance, from the few values that it needs.

Reading a header with pydicom costs more than all the rest of receiving an image.  `WANTED` names
the elements that the ledger's row and `header.why_ignored` look at; `stream.Scanner` picks them up
on its way, and a verdict that was reached once holds for the whole series.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from dicom_node.dicom import stream
from dicom_node.dicom.header import (
    InstanceSummary,
    convert_all,
    quiet_pydicom,
    valid_uid,
    why_ignored,
)
from dicom_node.errors import UnreadableInstanceError


def _tag(keyword: str) -> stream.Tag:
    number = tag_for_keyword(keyword)
    if number is None:
        raise ValueError(f"{keyword} is no keyword of PS3.6")
    return number >> 16, number & 0xFFFF


_SOP_CLASS, _MODALITY = _tag("SOPClassUID"), _tag("Modality")
_UIDS = {
    keyword: _tag(keyword)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
}
# All that `why_ignored` looks at, but for the groups of single frames: a loop is known by the rest.
_JUDGED = tuple(
    _tag(keyword)
    for keyword in (
        "SOPClassUID",
        "ImageType",
        "NumberOfFrames",
        "Manufacturer",
        "ManufacturerModelName",
        "DerivationDescription",
        "DerivationCodeSequence",
        "ContributingEquipmentSequence",
        "SharedFunctionalGroupsSequence",
    )
)
# A longer sequence is judged each time: what is remembered must not grow with what is sent.
_REMEMBERED = 1 << 12

WANTED: frozenset[stream.Tag] = frozenset((*_UIDS.values(), _MODALITY, *_JUDGED))
"""The tags whose values `summary` and `verdict` need."""

Values = Mapping[stream.Tag, bytes | None]


def summary(values: Values, transfer_syntax_uid: str) -> InstanceSummary:
    """The identity of an instance; UnreadableInstanceError names an attribute that is no UID.

    Equal to `header.instance_summary` of the whole header.
    """
    uids = {keyword: _first(values, tag) for keyword, tag in _UIDS.items()}
    for keyword, uid in uids.items():
        if not valid_uid(uid):
            raise UnreadableInstanceError(f"{keyword} is {'not a UID' if uid else 'absent'}")
    return InstanceSummary(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_instance_uid=uids["StudyInstanceUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        modality=_first(values, _MODALITY),
        transfer_syntax_uid=transfer_syntax_uid,
    )


def verdict(values: Values, transfer_syntax_uid: str) -> str | None:
    """Why this instance is acknowledged and left alone (`header.why_ignored`); None to go on."""
    judged = tuple(values.get(tag) for tag in _JUDGED)
    size = sum(len(value) for value in judged if value)
    judge = _remembered_verdict if size <= _REMEMBERED else _verdict
    return judge(transfer_syntax_uid, judged)


def _verdict(transfer_syntax_uid: str, judged: tuple[bytes | None, ...]) -> str | None:
    implicit = transfer_syntax_uid == ImplicitVRLittleEndian
    little = transfer_syntax_uid != ExplicitVRBigEndian
    elements: dict[BaseTag, DataElement | RawDataElement] = {}
    for tag, value in zip(_JUDGED, judged, strict=True):
        if value is not None:
            number = Tag(tag)
            elements[number] = RawDataElement(
                number, dictionary_VR(number), len(value), value, 0, implicit, little
            )
    dataset = Dataset(elements)
    with quiet_pydicom():
        convert_all(dataset)
        return why_ignored(dataset)


_remembered_verdict = lru_cache(maxsize=1024)(_verdict)


def _first(values: Values, tag: stream.Tag) -> str:
    value = values.get(tag) or b""
    return value.decode("latin-1").split("\\")[0].strip(" \0\t\r\n")
