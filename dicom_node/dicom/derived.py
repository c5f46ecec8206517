"""Restored instances: the source's header by policy, new identity, restored pixels, provenance.

`quantise` brings a restored volume back to stored values; `build` writes instances of the same
kind as the sources: one for each slice of a classic series, one for a multi-frame image whatever
volumes it holds. The same call makes the same bytes: UIDs come from what was done to what, times
from the caller, and nothing else varies. Every instance carries what `header.is_own_output` knows
it by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_node.dicom import carry, pixels, policy, provenance
from dicom_node.dicom.geometry import SAME_GRID, Resampling
from dicom_node.dicom.header import as_stored, quiet_pydicom, text, texts
from dicom_node.dicom.image_classes import CLASSES
from dicom_node.dicom.making import Derivation, Frame, Making
from dicom_node.dicom.pixels import Quantised
from dicom_node.dicom.planes import Planes
from dicom_node.dicom.policy import Action, Rule
from dicom_node.dicom.prepared import Prepared, any_derivation
from dicom_node.dicom.prepared import prepare as find_holes
from dicom_node.dicom.provenance import ModelIdentity
from dicom_node.dicom.scratch import Scratch
from dicom_node.dicom.values import VALUES, pixel_octets
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.errors import UnreadableInstanceError
from dicom_node.settings import IdentitySettings

__all__ = [
    "DerivedInstance",
    "PreparedImage",
    "PreparedSlices",
    "RestoredVolume",
    "build",
    "derived_series_uid",
    "derived_sop_uid",
    "prepare",
    "quantise",
    "source_set_hash",
]


@dataclass(frozen=True)
class PreparedImage:
    """What can be made of the image of one slice ahead of its series, in octets for `quantise`."""

    image: bytes  #: all but the pixels
    stored: bytes


class PreparedSlices(Protocol):
    """What `prepare` gave of the slices of a volume, by their indices."""

    def image(self, index: int) -> bytes | None:
        """All but the pixels; None: nothing."""

    def stored(self, index: int) -> bytes | None:
        """The pixels that belong to it; None: they are gone."""


@dataclass(frozen=True)
class DerivedInstance:
    """One restored instance as a PS3.10 file, and how many pixels the stored range clamped."""

    sop_instance_uid: str
    sop_class_uid: str
    source_sop_instance_uid: str
    head: bytes
    clamped: int = 0
    #: What makes the rest of the file, on whatever thread; None: *head* is all of it.
    rest: Callable[[], bytes] | None = None

    def pieces(self) -> tuple[bytes, ...]:
        """The file, piece by piece."""
        return (self.head,) if self.rest is None else (self.head, self.rest())

    @property
    def data(self) -> bytes:
        """The file."""
        return b"".join(self.pieces())


@dataclass(frozen=True)
class RestoredVolume:
    """A restored volume in stored values, slice by slice in the order of the source volume."""

    frames: tuple[Frame, ...]
    source: Dataset | None  # the multi-frame image that they are of; None: classic images

    @property
    def clamped(self) -> int:
        """How many pixels the stored range clamped."""
        return sum(frame.clamped for frame in self.frames)


def quantise(
    volume: SeriesVolume,
    restored: Planes,
    resampling: Resampling = SAME_GRID,
    scratch: Scratch | None = None,
    prepared: PreparedSlices | None = None,
) -> RestoredVolume:
    """Bring the result of one volume back to stored values.

    restored: (S, R·factor, C·factor) in the volume's units. What was *prepared* of a slice of the
    same result before is taken as it is. Raises ValueError where the shape is not that, or a value
    is not finite.
    """
    slices, *grid = volume.array.shape
    expected = (slices, *(size * resampling.factor for size in grid))
    if restored.shape != expected:
        raise ValueError(f"restored {restored.shape}, volume {expected}")
    numbers = volume.frames or (1,) * slices
    room, frames = scratch or Scratch(), []
    for i, number in enumerate(numbers):
        frame = None
        if prepared is not None:
            frame = _prepared_frame(volume, i, restored, prepared, resampling)
        if frame is None:
            frame = _frame(volume, i, number, restored[i], resampling)
            frame = replace(frame, pixels=room.keep(frame.stored))
        frames.append(frame)
        room.release()
    return RestoredVolume(tuple(frames), volume.source)


def _prepared_frame(
    volume: SeriesVolume,
    i: int,
    restored: Planes,
    prepared: PreparedSlices,
    resampling: Resampling,
) -> Frame | None:
    """A slice as `prepare` has kept it; None where that is none of this slice on this grid."""
    octets = prepared.image(i)
    if octets is None or resampling.changes or volume.source is not None:
        return None
    try:
        made = Prepared.decode(octets)
    except ValueError:
        return None
    header, by = volume.headers[i], volume.scale.rescales[i]
    if made.source_sop_instance_uid != text(header, "SOPInstanceUID"):
        return None
    if made.shape != volume.array.shape[1:]:
        return None

    def stored() -> NDArray[Any]:
        values = made.values(prepared.stored(i))
        return _frame(volume, i, 1, restored[i], resampling).stored if values is None else values

    return Frame(header, 1, stored, by, by, made.clamped, resampling, made)


def prepare(
    volume: RestoredVolume,
    *,
    task: str,
    model: ModelIdentity,
    identity: IdentitySettings,
    strength: float,
    parameters_hash: str,
    drift: float | None,
) -> PreparedImage | None:
    """What can be made of the derived image of a classic slice before its series is complete.

    volume: the slice alone, of a task whose result hangs on no other and keeps the scale of the
    source; drift: of `reported.delivered_drift`. For `quantise`, and through its frames `build`,
    which then gives the bytes that it would have made. None where it cannot be told apart.
    """
    (frame,) = volume.frames
    if frame.rescale != frame.source_rescale or frame.resampling.changes:
        return None
    derivation = any_derivation(task, model, identity, strength, parameters_hash)
    making = _making(frame.header, volume.frames, derivation, source_set_hash([frame.header]))
    with quiet_pydicom():
        made = find_holes(making, _encode(_image(making)), drift=drift)
    if made is None:
        return None
    return PreparedImage(made.encode(), np.ascontiguousarray(frame.stored).tobytes())


def _frame(
    volume: SeriesVolume,
    i: int,
    number: int,
    values: NDArray[np.floating[Any]],
    resampling: Resampling,
) -> Frame:
    if not np.all(np.isfinite(values)):
        raise ValueError(f"restored slice {i} has values that are not finite")
    header, by = volume.headers[i], volume.scale.rescales[i]
    stored = pixels.on_grid(volume.stored[i], resampling)
    none = np.zeros(stored.shape, dtype=np.bool_)
    mask = none if volume.padding is None else pixels.on_grid(volume.padding[i], resampling)
    to_stored = pixels.quantise_slice_scale if text(header, "Modality") == "PT" else pixels.quantise
    quantised: Quantised = to_stored(
        np.asarray(values, dtype=np.float64) / volume.scale.per_native,
        by,
        pixels.pixel_format(header),
        source=stored,
        mask=mask,
        padding=pixels.padding_range(header),
    )
    return Frame(
        header, number, quantised.stored, by, quantised.rescale, quantised.clamped, resampling
    )


def build(
    volumes: Sequence[RestoredVolume],
    *,
    task: str,
    model: ModelIdentity,
    identity: IdentitySettings,
    warnings: Sequence[str] = (),
    strength: float = 1.0,
    created: datetime,
    parameters_hash: str,
) -> Iterator[DerivedInstance]:
    """Make the derived series of the volumes of one job.

    Classic images come slice by slice in the order of their volume. The volumes of a multi-frame
    image go into one instance together, its frames in the order of the source's.
    warnings go into the Derivation Description. Raises ValueError where no volume is given.
    """
    if not volumes:
        raise ValueError("no volume to derive from")
    derivation = Derivation(
        task, model, identity, tuple(warnings), strength, created, parameters_hash
    )
    source_set = source_set_hash([f.header for volume in volumes for f in volume.frames])
    return (_derive(*sources, derivation, source_set) for sources in _instances(volumes))


def _instances(
    volumes: Sequence[RestoredVolume],
) -> Iterator[tuple[Dataset, tuple[Frame, ...]]]:
    """Each instance to be made: its source and its frames."""
    source = volumes[0].source
    if source is None:
        for volume in volumes:
            for frame in volume.frames:
                yield frame.header, (frame,)
        return
    frames = sorted((f for volume in volumes for f in volume.frames), key=lambda f: f.number)
    yield source, tuple(frames)


def source_set_hash(headers: Sequence[Dataset]) -> str:
    """For PET, which is quantified as a set, a hash of its instances; '' for CT and MR."""
    if text(headers[0], "Modality") != "PT":
        return ""
    uids = sorted({text(header, "SOPInstanceUID") for header in headers})
    return hashlib.sha256("\n".join(uids).encode()).hexdigest()


def derived_series_uid(
    header: Dataset,
    *,
    task: str,
    model: ModelIdentity,
    identity: IdentitySettings,
    strength: float,
    parameters_hash: str,
    source_set: str,
    resampling: Resampling = SAME_GRID,
) -> str:
    """The Series Instance UID of the derived series that a source instance's result goes to."""
    return provenance.derived_uid(
        identity.uid_root,
        "series",
        text(header, "SeriesInstanceUID"),
        task,
        model.sha256,
        format(strength, "g"),
        parameters_hash,
        _grid(header, resampling),
        source_set,
    )


def derived_sop_uid(header: Dataset, series_uid: str, root: str | None) -> str:
    """The SOP Instance UID of the restored instance of one source in one derived series."""
    return provenance.derived_uid(root, "instance", text(header, "SOPInstanceUID"), series_uid)


def _grid(header: Dataset, by: Resampling) -> str:
    spacing = "\\".join(texts(header, "PixelSpacing"))
    finer = f"/{by.factor}" if by.changes else ""
    return f"{text(header, 'Rows')}x{text(header, 'Columns')}@{spacing}{finer}"


def _making(
    source: Dataset, frames: tuple[Frame, ...], derivation: Derivation, source_set: str
) -> Making:
    series_uid = derived_series_uid(
        frames[0].header,
        task=derivation.task,
        model=derivation.model,
        identity=derivation.identity,
        strength=derivation.strength,
        parameters_hash=derivation.parameters_hash,
        source_set=source_set,
        resampling=frames[0].resampling,
    )
    sop_uid = derived_sop_uid(source, series_uid, derivation.identity.uid_root)
    return Making(source, frames, derivation, series_uid, sop_uid)


def _derive(
    source: Dataset, frames: tuple[Frame, ...], derivation: Derivation, source_set: str
) -> DerivedInstance:
    making = _making(source, frames, derivation, source_set)
    before = frames[0].prepared
    try:
        head = before.completed(making) if before is not None else None
        rest = None if head is None else partial(pixel_octets, making.frames)
        if head is None:
            with quiet_pydicom():
                head = _encode(_image(making))
    except Exception as error:
        # A header that could be read may still hold values that no data set can: its kind says
        # enough, its text may quote them.
        source_uid = text(source, "SOPInstanceUID")
        raise UnreadableInstanceError(
            f"the header of SOP Instance {source_uid} cannot be carried over "
            f"({type(error).__name__})",
            sop_instance_uid=source_uid,
        ) from None
    return DerivedInstance(
        sop_instance_uid=making.sop_uid,
        sop_class_uid=making.image.uid,
        source_sop_instance_uid=text(source, "SOPInstanceUID"),
        head=head,
        clamped=sum(frame.clamped for frame in frames),
        rest=rest,
    )


@dataclass(frozen=True)
class _Lines:
    """The policy's table of one class outside functional groups, by what is done with its lines."""

    copied: frozenset[str]
    empty: tuple[str, ...]  # written without a value where the source lacks them
    made: tuple[tuple[str, Rule], ...]


@cache
def _lines(sop_class_uid: str) -> _Lines:
    multiframe = CLASSES[sop_class_uid].multiframe
    own = {
        keyword: rule
        for keyword, rule in policy.table(sop_class_uid).items()
        if "." not in keyword and not (multiframe and rule.module == keyword)
    }
    copied = {keyword: rule for keyword, rule in own.items() if rule.action is Action.COPY}
    return _Lines(
        frozenset(copied),
        tuple(keyword for keyword, rule in copied.items() if rule.empty),
        tuple(
            (keyword, rule)
            for keyword, rule in own.items()
            if rule.action in (Action.SET, Action.RECOMPUTE)
        ),
    )


def _image(making: Making) -> Dataset:
    """The data set that the policy's table makes of the source."""
    source, image, lines = making.source, Dataset(), _lines(making.image.uid)
    # A source has far fewer attributes than the table has lines.
    for element in source:
        if element.keyword in lines.copied:
            image.add(carry.public_copy(element))
    for keyword in lines.empty:
        if keyword not in source:
            setattr(image, keyword, None)
    for keyword, rule in lines.made:
        if rule.action is Action.SET or keyword in source:
            _put(image, keyword, VALUES[rule.by](making, making.frames[0]))
    carry.copy_overlays(source, image)
    carry.copy_private(source, image, making.image.modality)
    image.file_meta = _file_meta(image)
    return image


def _put(image: Dataset, keyword: str, value: Any) -> None:
    if isinstance(value, DataElement):
        image.add(value)
    elif value is not None:
        setattr(image, keyword, value)


def _file_meta(image: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = image.SOPClassUID
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(provenance.IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = provenance.IMPLEMENTATION_VERSION_NAME
    return meta


def _encode(image: Dataset) -> bytes:
    buffer = BytesIO()
    as_stored(image)
    dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()
