"""One instance's header: read without pixels, checked, and judged for whether it is restored.

This is the border to pydicom's reader. Its warnings and log lines quote element values, which are
a patient's, so nothing of either crosses it; and whatever it raises leaves here as
UnreadableInstanceError, whose text names no value.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import warnings
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from pydicom import dcmread
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, SecondaryCaptureImageStorage

from dicom_node.dicom.image_classes import CLASSES
from dicom_node.dicom.sharing import Shared, element_key
from dicom_node.errors import UnreadableInstanceError

__all__ = [
    "EQUIPMENT_MANUFACTURER",
    "EQUIPMENT_MODEL",
    "PRIVATE_SCHEME",
    "RESTORABLE",
    "InstanceSummary",
    "as_stored",
    "convert_all",
    "instance_summary",
    "is_own_output",
    "number",
    "numbers",
    "quiet_pydicom",
    "read_dataset",
    "read_header",
    "text",
    "texts",
    "valid_uid",
    "why_ignored",
]

# What every object that this software writes carries, and by which it knows its own work again.
EQUIPMENT_MANUFACTURER = "DiffCode"
EQUIPMENT_MODEL = "DiffCode DICOM node"
PRIVATE_SCHEME = "99DIFFCODE"

RESTORABLE: dict[str, str] = {uid: image.modality for uid, image in CLASSES.items()}
"""SOP Class UID of each storage class whose images are restored, with its Modality."""

# `provenance.derivation_description` begins with these words.
_OUR_WORDS = re.compile(r"by neural network .+ \(sha256 [0-9a-f]{12}\), strength ")

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_UNDEFINED_LENGTH = 0xFFFFFFFF  # PS3.5 7.1.1
# PS3.5 6.1.2.3: whose values Specific Character Set speaks of.
_TEXT = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})
_STORED = "stored_bytes"
_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# PS3.3 C.7.6.1.1.2 and C.8.2.1.1.1: words of Image Type that name no acquired slice.
_NOT_A_SLICE = {
    "LOCALIZER": "a localizer, not a slice of a volume",
    "SCOUT": "a localizer, not a slice of a volume",
    "SCREEN SAVE": "a screen save, not an acquired image",
    "SCREENSAVE": "a screen save, not an acquired image",
    "DOSE": "a dose report, not an acquired image",
    "DOSE_INFO": "a dose report, not an acquired image",
    "EXAM_SUMMARY": "an examination summary, not an acquired image",
    "REF_SURVIEW": "an examination summary, not an acquired image",
}

# catch_warnings swaps module-wide state; two threads inside it at once would restore each
# other's filters.
_WARNINGS_LOCK = threading.RLock()


# pydicom logs what it warns of, element values included; its errors reach us as exceptions.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@contextmanager
def quiet_pydicom() -> Generator[None]:
    """Hold pydicom's warnings back while datasets are parsed, converted or written."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class InstanceSummary:
    """What the ledger keeps of one instance; no patient data."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str
    transfer_syntax_uid: str


def valid_uid(value: object) -> bool:
    """Whether the value is a UID by PS3.5 9.1, but for components that begin with 0.

    Such components are forbidden and nevertheless sent by scanners in use; the forms that are
    refused are the ones that could leave a file name or a query.
    """
    return isinstance(value, str) and len(value) <= 64 and _UID.fullmatch(value) is not None


def read_header(source: Path | str | bytes, *, whole: bool = False) -> Dataset:
    """Read a PS3.10 file's data set without its pixels, each element converted or left out.

    With whole=True the pixel data are read too, and dropped, to find a data set that ends early.
    Raises UnreadableInstanceError where the bytes are no DICOM file or end within the header.
    """
    dataset = read_dataset(source, pixels=whole)
    for keyword in _PIXEL_KEYWORDS:
        dataset.pop(keyword, None)
    return dataset


def read_dataset(
    source: Path | str | bytes,
    *,
    pixels: bool = True,
    decisive: Collection[str] = (),
    shared: Shared | None = None,
) -> Dataset:
    """Read a PS3.10 file, each element converted or left out. Errors as for `read_header`.

    Headers of one series that are read with the same *shared* have the elements in common whose
    bytes are the same: fifty kilobytes each are five, and none is converted twice. Such headers
    are to be read, not written; their file meta information tells no slice from another.

    Raises UnreadableInstanceError too where an attribute of *decisive* would be left out: without
    it, the rest would mean something else.
    """
    with _opened(source) as stream, quiet_pydicom():
        try:
            dataset = dcmread(stream, stop_before_pixels=not pixels)
            early = _ends_early(dataset)
            convert_all(dataset, decisive, shared)
        except UnreadableInstanceError:
            raise
        except Exception as error:
            # The text of the cause may quote the data set; its kind cannot.
            reason = f"the data set does not parse ({type(error).__name__})"
            raise UnreadableInstanceError(reason) from None
    if early or (pixels and _lacks_pixels(dataset)):
        raise UnreadableInstanceError("the data set ends early")
    return dataset


def read_pixels(path: Path) -> DataElement:
    """Read the pixel data of a PS3.10 file alone; UnreadableInstanceError where it lacks them."""
    with _opened(path) as stream, quiet_pydicom():
        try:
            dataset = dcmread(stream, specific_tags=list(_PIXEL_KEYWORDS))
            early = _ends_early(dataset)
            found = [dataset[keyword] for keyword in _PIXEL_KEYWORDS if keyword in dataset]
        except Exception as error:
            reason = f"the data set does not parse ({type(error).__name__})"
            raise UnreadableInstanceError(reason) from None
    if early or not found:
        raise UnreadableInstanceError("the data set ends early")
    return found[0]


def _opened(source: Path | str | bytes) -> IO[bytes]:
    return BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def _ends_early(dataset: Dataset) -> bool:
    """Whether the stream held fewer bytes than an element's length announced."""
    found = [_raw(dataset, tag) for tag in tuple(dataset.keys())]
    return any(
        isinstance(raw, RawDataElement)
        and isinstance(raw.value, bytes)
        and raw.length not in (len(raw.value), _UNDEFINED_LENGTH)
        for raw in found
    )


def _lacks_pixels(dataset: Dataset) -> bool:
    return text(dataset, "SOPClassUID") in RESTORABLE and not any(
        keyword in dataset for keyword in _PIXEL_KEYWORDS
    )


def convert_all(
    dataset: Dataset, decisive: Collection[str] = (), shared: Shared | None = None
) -> None:
    """Convert every element now, while warnings are held; leave out what does not convert.

    Text keeps its bytes beside it (`as_stored`): in a character set other than the declared one it
    does not survive being decoded and encoded again.
    Raises UnreadableInstanceError where that is an attribute of *decisive*, at any depth.
    """
    for tag in list(dataset.keys()):
        raw = _raw(dataset, tag)
        key = None if shared is None else element_key(dataset, raw)
        if shared is not None and key is not None and key in shared.elements:
            dataset._dict[tag] = shared.elements[key]
            continue
        try:
            element = dataset[tag]
        except Exception:
            keyword = keyword_for_tag(tag)
            if keyword in decisive:
                raise UnreadableInstanceError(f"{keyword} has a value that is none") from None
            del dataset[tag]
            continue
        if isinstance(element.value, DicomSequence):
            for item in element.value:
                convert_all(item, decisive)
        elif element.VR in _TEXT and isinstance(raw, RawDataElement):
            element.__dict__[_STORED] = raw.value
        if shared is not None and key is not None:
            shared.elements[key] = element
    if shared is not None:
        shared.lay_over(dataset)


def as_stored(dataset: Dataset) -> None:
    """Give text that `convert_all` has seen, and copies of it, its own bytes back, at any depth.

    For the last step before writing in explicit VR little endian: what is read from the data set
    then is decoded anew.
    """
    # pydicom writes raw bytes as they are where neither encoding nor character set has changed.
    dataset.set_original_encoding(False, True, dataset._character_set)
    for element in list(dataset):
        if isinstance(element.value, DicomSequence):
            for item in element.value:
                as_stored(item)
        elif (stored := element.__dict__.get(_STORED)) is not None:
            tag = element.tag
            dataset[tag] = RawDataElement(tag, element.VR, len(stored), stored, 0, False, True)


def _raw(dataset: Dataset, tag: BaseTag) -> Any:
    """The element as it was read; None where pydicom cannot even hand that out."""
    try:
        return dataset.get_item(tag)
    except Exception:
        # An empty element of an unknown value representation.
        return None


def instance_summary(dataset: Dataset) -> InstanceSummary:
    """The identity of one instance; UnreadableInstanceError names an attribute that is no UID."""
    uids = {
        keyword: text(dataset, keyword)
        for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    }
    for keyword, uid in uids.items():
        if not valid_uid(uid):
            raise UnreadableInstanceError(f"{keyword} is {'not a UID' if uid else 'absent'}")
    meta = getattr(dataset, "file_meta", None)
    return InstanceSummary(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_instance_uid=uids["StudyInstanceUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        modality=text(dataset, "Modality"),
        transfer_syntax_uid=text(meta, "TransferSyntaxUID") if meta is not None else "",
    )


def why_ignored(dataset: Dataset) -> str | None:
    """Why this instance is acknowledged and left alone, in words for a person; None to go on."""
    if is_own_output(dataset):
        return "our own output: restored before by this software"
    return _why_class_ignored(dataset) or _why_image_type_ignored(dataset)


def _why_class_ignored(dataset: Dataset) -> str | None:
    sop_class = text(dataset, "SOPClassUID")
    if sop_class in CLASSES:
        frames = number(dataset, "NumberOfFrames") or 0.0
        if frames > 1 and not CLASSES[sop_class].multiframe:
            return "several frames in an image of a class that has one"
        return None
    name = UID(sop_class).name if valid_uid(sop_class) else "an unknown SOP class"
    if sop_class == SecondaryCaptureImageStorage:
        return "a secondary capture, not an acquired image"
    return f"not an image that is restored ({name})"


def _why_image_type_ignored(dataset: Dataset) -> str | None:
    words = (word.upper() for word in texts(dataset, "ImageType"))
    return next((_NOT_A_SLICE[word] for word in words if word in _NOT_A_SLICE), None)


def is_own_output(dataset: Dataset) -> bool:
    """Whether a restored instance of this software lies before us (loop guard).

    Looks at Contributing Equipment, General Equipment, the Derivation Code and the Derivation
    Description, so that an archive that drops some of them does not send our work round again.
    """
    equipment = (dataset, *_items(dataset, "ContributingEquipmentSequence"))
    return any(map(_is_our_equipment, equipment)) or any(map(_is_our_step, _steps(dataset)))


def _steps(dataset: Dataset) -> Iterator[Dataset]:
    """What describes a derivation: the data set, and in a multi-frame image its first frame."""
    yield dataset
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for frame in _items(dataset, groups)[:1]:
            yield from _items(frame, "DerivationImageSequence")


def _is_our_step(step: Dataset) -> bool:
    codes = _items(step, "DerivationCodeSequence")
    return _OUR_WORDS.search(text(step, "DerivationDescription")) is not None or any(
        text(code, "CodingSchemeDesignator") == PRIVATE_SCHEME for code in codes
    )


def _is_our_equipment(item: Dataset) -> bool:
    return (
        text(item, "Manufacturer") == EQUIPMENT_MANUFACTURER
        and text(item, "ManufacturerModelName") == EQUIPMENT_MODEL
    )


def _items(dataset: Dataset, keyword: str) -> tuple[Dataset, ...]:
    value = _value(dataset, keyword)
    return tuple(value) if isinstance(value, DicomSequence) else ()


def texts(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """Every value of an attribute as stripped text; empty where it is absent."""
    return tuple(str(value).strip() for value in _values(_value(dataset, keyword)))


def text(dataset: Dataset, keyword: str) -> str:
    """The first value of an attribute as stripped text; '' where it is absent."""
    return next(iter(texts(dataset, keyword)), "")


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...] | None:
    """Every value of an attribute as a number; None where it is absent or one is no number."""
    found = [_number(value) for value in _values(_value(dataset, keyword))]
    complete = [value for value in found if value is not None]
    return tuple(complete) if complete and len(complete) == len(found) else None


def number(dataset: Dataset, keyword: str) -> float | None:
    """The first value of an attribute as a number; None where it is absent or no number."""
    return next((_number(value) for value in _values(_value(dataset, keyword))), None)


def _value(dataset: Dataset, keyword: str) -> Any:
    """The value of an attribute, or None: a tenth of the time that `Dataset.get` takes."""
    tag = _tag(keyword)
    if tag is None:
        return dataset.get(keyword)
    element = dataset._dict.get(tag)
    if element is None:
        return None
    return element.value if isinstance(element, DataElement) else dataset.get(keyword)


@lru_cache(maxsize=1024)
def _tag(keyword: str) -> BaseTag | None:
    """The tag of a keyword; None of a repeating group, which has several."""
    tag = tag_for_keyword(keyword)
    return None if tag is None else Tag(tag)


def _values(value: Any) -> Iterator[Any]:
    if value is None or isinstance(value, DicomSequence):
        return
    several = hasattr(value, "__iter__") and not isinstance(value, str | bytes)
    yield from value if several else (value,)


def _number(value: object) -> float | None:
    word = str(value).strip()
    found = float(word) if _NUMBER.fullmatch(word) else None
    return found if found is not None and math.isfinite(found) else None
