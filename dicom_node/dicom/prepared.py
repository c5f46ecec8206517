"""Derived images made ahead of their series: their bytes, with places for what is not known yet.

A classic image of a slice that stands alone hangs on its series in few elements: when the series
was derived, and what was noticed of it. `prepare` encodes an image under a derivation that stands
for any other, and finds the places of these elements; `Prepared.completed` puts in what the values'
own functions give for the derivation as it is. The bytes are those that `derived` makes at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.charset import convert_encodings
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element

from dicom_node import __version__
from dicom_node.dicom import policy, provenance
from dicom_node.dicom.header import quiet_pydicom, text
from dicom_node.dicom.making import Derivation, Making
from dicom_node.dicom.provenance import ModelIdentity
from dicom_node.dicom.values import VALUES, pixel_octets
from dicom_node.settings import IdentitySettings

__all__ = ["Hole", "Prepared", "prepare"]

# The functions of `values` that look at when a series was derived, or at what was noticed of it.
_LATE = ("series_description", "derivation_description", "date", "time")
# In it the moment of derivation is one value, always of the same length.
_STAMPED = "ContributingEquipmentSequence"
# A moment that is no other's.
_ANY_TIME = datetime(2883, 1, 30, 23, 59, 59, 987654, tzinfo=UTC)


@dataclass(frozen=True)
class Hole:
    """Octets of a prepared image that the derivation decides: the element of *keyword*.

    Of the Contributing Equipment Sequence it is our Contribution DateTime alone.
    """

    start: int
    length: int
    keyword: str


@dataclass(frozen=True)
class Prepared:
    """One derived image up to its pixels, but for its holes, and what was counted on the way."""

    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    source_sop_instance_uid: str
    basis: str  #: of all that the octets outside the holes rest on beside the source
    clamped: int
    drift: float | None  #: of `reported.delivered_drift`
    dtype: str  #: of the stored values, in NumPy's words
    shape: tuple[int, int]
    holes: tuple[Hole, ...]
    head: bytes  #: the file up to the value of its pixel data, which is its last

    def completed(self, making: Making) -> bytes | None:
        """The file up to its pixels as *making* has it; None where this is not its image."""
        if (
            self.series_instance_uid != making.series_uid
            or self.sop_instance_uid != making.sop_uid
            or self.source_sop_instance_uid != text(making.source, "SOPInstanceUID")
            or self.basis != _basis(making.derivation)
        ):
            return None
        with quiet_pydicom():
            return b"".join(_filled(self.head, self.holes, making))

    def encode(self) -> bytes:
        """As octets, for `decode`."""
        told: dict[str, Any] = {n: value for n, value in vars(self).items() if n != "head"}
        told["holes"] = [vars(hole) for hole in self.holes]
        told["head"] = len(self.head)
        index = json.dumps(told).encode()
        return b"".join((len(index).to_bytes(4, "little"), index, self.head))

    @classmethod
    def decode(cls, octets: bytes) -> Prepared:
        """Inverse of `encode`; ValueError for octets that are no such image."""
        try:
            begin = 4 + int.from_bytes(octets[:4], "little")
            told = json.loads(octets[4:begin])
            told["holes"] = tuple(Hole(**hole) for hole in told["holes"])
            rows, columns = told.pop("shape")
            head = octets[begin:]
            if len(head) != told.pop("head"):
                raise ValueError(f"{len(head)} octets")
            return cls(**told, shape=(rows, columns), head=head)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("not a prepared image") from error

    def values(self, octets: bytes | None) -> NDArray[Any] | None:
        """The stored values (rows, columns) in their octets; None where these are none of them."""
        kind = np.dtype(self.dtype)
        if octets is None or len(octets) != kind.itemsize * self.shape[0] * self.shape[1]:
            return None
        return np.frombuffer(octets, kind).reshape(self.shape)


def any_derivation(
    task: str,
    model: ModelIdentity,
    identity: IdentitySettings,
    strength: float,
    parameters_hash: str,
) -> Derivation:
    """A derivation that stands for every other with the same identity, model and parameters."""
    return Derivation(task, model, identity, (), strength, _ANY_TIME, parameters_hash)


def prepare(making: Making, octets: bytes, *, drift: float | None) -> Prepared | None:
    """Find the holes of a file that *making* gave by `any_derivation`.

    None where they, or the pixels at its end, are not to be found beyond doubt.
    """
    (frame,) = making.frames
    pixels = pixel_octets(making.frames)
    if not octets.endswith(pixels):
        return None
    head = octets[: len(octets) - len(pixels)]
    wanted = {
        keyword: _element(keyword, str(VALUES[by](making, frame)), _charset(making.source))
        for keyword, by in _late(making.image.uid)
    }
    wanted[_STAMPED] = provenance.times(_ANY_TIME, making.source).stamp.encode()
    if any(head.count(each) != 1 for each in wanted.values()):
        return None
    holes = sorted(
        (Hole(head.index(each), len(each), keyword) for keyword, each in wanted.items()),
        key=lambda hole: hole.start,
    )
    made = Prepared(
        series_instance_uid=making.series_uid,
        sop_instance_uid=making.sop_uid,
        sop_class_uid=making.image.uid,
        source_sop_instance_uid=text(making.source, "SOPInstanceUID"),
        basis=_basis(making.derivation),
        clamped=frame.clamped,
        drift=drift,
        dtype=frame.stored.dtype.str,
        shape=frame.stored.shape,
        holes=tuple(holes),
        head=head,
    )
    return made if made.completed(making) == head else None


@cache
def _late(sop_class_uid: str) -> tuple[tuple[str, str], ...]:
    """The keywords of elements that the derivation decides, with their functions of `values`."""
    return tuple(
        (path, rule.by)
        for path, rule in policy.table(sop_class_uid).items()
        if rule.by in _LATE and "." not in path
    )


def _basis(derivation: Derivation) -> str:
    """What the octets outside the holes rest on; the words of a series description are in one."""
    identity = derivation.identity.model_dump(mode="json")
    identity.pop("description_suffixes", None)
    model = derivation.model
    named = [
        __version__, identity, derivation.task, model.name, model.version, model.sha256,
        float(derivation.strength), derivation.parameters_hash,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _filled(head: bytes, holes: tuple[Hole, ...], making: Making) -> Iterator[bytes]:
    frame, charset, functions = (
        making.frames[0],
        _charset(making.source),
        dict(_late(making.image.uid)),
    )
    at = 0
    for hole in holes:
        yield head[at : hole.start]
        if hole.keyword == _STAMPED:
            yield provenance.times(making.derivation.created, making.source).stamp.encode()
        else:
            value = VALUES[functions[hole.keyword]](making, frame)
            yield _element(hole.keyword, str(value), charset)
        at = hole.start + hole.length
    yield head[at:]


def _charset(image: Dataset) -> tuple[str, ...]:
    stated = image.get("SpecificCharacterSet")
    if not stated:
        return ()
    return (stated,) if isinstance(stated, str) else tuple(stated)


@lru_cache(maxsize=256)
def _element(keyword: str, value: str, charset: tuple[str, ...]) -> bytes:
    """An element of text, explicit VR little endian; few values occur in a series."""
    holder = Dataset()
    setattr(holder, keyword, value)
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    encodings = convert_encodings(list(charset) or None)
    write_data_element(stream, holder[keyword], encodings)
    return stream.getvalue()
