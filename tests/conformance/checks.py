"""What every derived object is held to: pixels, header, validators, other readers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.dicom.derived import DerivedInstance
from dicom_node.dicom.header import is_own_output, quiet_pydicom, text
from tests.conformance.conftest import Validators
from tests.conformance.journey import Outcome


def read(data: bytes | Path) -> Dataset:
    """One object from its bytes or its file, with pixels."""
    with quiet_pydicom():
        return pydicom.dcmread(BytesIO(data) if isinstance(data, bytes) else data)


def sources_by_uid(outcome: Outcome) -> dict[str, Dataset]:
    """The sources of an outcome."""
    found = (read(path) for path in outcome.sources)
    return {text(dataset, "SOPInstanceUID"): dataset for dataset in found}


def pixels_are_the_source_s(made: DerivedInstance, source: Dataset) -> None:
    """Identity: stored values bit by bit; of PET the quantity, within half a step."""
    derived = read(made.data)
    assert derived.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert made.clamped == 0
    with quiet_pydicom():
        before, after = frames_of(source), frames_of(derived)
    kept = [number - 1 for number in source_frames(derived)]
    before = before[kept]
    if derived.Modality != "PT":
        assert after.dtype.kind == before.dtype.kind
        np.testing.assert_array_equal(after, before)
        return
    for old, new, (a, b), (c, d) in zip(
        before, after, scales(source, kept), scales(derived), strict=True
    ):
        difference = np.abs((old * a + b) - (new * c + d))
        assert difference.max() <= abs(c) * 0.5 * (1 + 1e-9)


def frames_of(dataset: Dataset) -> NDArray[Any]:
    """Stored values as (frames, rows, columns)."""
    array = dataset.pixel_array
    return array if array.ndim == 3 else array[np.newaxis]


def source_frames(derived: Dataset) -> list[int]:
    """For each frame of a derived object the number of the frame it came from, from 1."""
    groups = derived.get("PerFrameFunctionalGroupsSequence") or ()
    return [
        int(group.DerivationImageSequence[-1].SourceImageSequence[0].ReferencedFrameNumber)
        for group in groups
    ] or [1]


def scales(dataset: Dataset, frames: Sequence[int] | None = None) -> list[tuple[float, float]]:
    """Rescale Slope and Intercept of each frame, or of those (from 0) that are asked for.

    From wherever the IOD has them; a frame that is left out may have one that is no number.
    """
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or [dataset]
    groups = [groups[i] for i in frames] if frames is not None else groups
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    found = []
    for group in groups:
        items = (
            group.get("PixelValueTransformationSequence")
            or shared.get("PixelValueTransformationSequence")
            or [group]
        )
        intercept = items[0].get("RescaleIntercept")
        # Type 1, and 0 in every PET image (PS3.3 C.8.9.4.1.6): some senders leave it empty.
        found.append((float(items[0].get("RescaleSlope", 1)), float(str(intercept or 0))))
    return found


def other_readers_take_it(made: DerivedInstance) -> None:
    """highdicom reads it again, with the pixels that pydicom sees; the loop guard knows it."""
    derived = read(made.data)
    with quiet_pydicom():
        image = highdicom.imread(BytesIO(made.data))
        seen = frames_of(derived)
        for number in (1, len(seen)):
            frame = image.get_stored_frame(number)
            np.testing.assert_array_equal(frame, seen[number - 1])
    assert is_own_output(derived)


def ends(outcome: Outcome) -> list[DerivedInstance]:
    """First, middle and last: slices of one series differ in few attributes."""
    made = outcome.made
    return [made[i] for i in sorted({0, len(made) // 2, len(made) - 1})]


def no_new_errors(
    made: Sequence[DerivedInstance],
    sources: Mapping[str, Path],
    validators: Validators,
    folder: Path,
) -> None:
    """dciodvfy finds no error, and dcentvfy no contradiction, that the sources do not have.

    sources: files by SOP Instance UID.
    """
    plain, derived = [], []
    for i, each in enumerate(made):
        plain.append(_written(folder / f"source-{i}.dcm", _inflated(sources[_source(each)])))
        derived.append(_written(folder / f"derived-{i}.dcm", each.data))
        assert not validators.errors(derived[-1]) - validators.errors(plain[-1])
    before = contradictions(validators, plain)
    assert contradictions(validators, [*plain, *derived]) <= before


def _source(made: DerivedInstance) -> str:
    return made.source_sop_instance_uid


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _inflated(path: Path) -> bytes:
    """The file; a deflated one in plain encoding, since the validators inflate nothing."""
    dataset = read(path)
    if not dataset.file_meta.TransferSyntaxUID.is_deflated:
        return path.read_bytes()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = BytesIO()
    with quiet_pydicom():
        dataset.save_as(buffer)
    return buffer.getvalue()


def contradictions(validators: Validators, paths: Iterable[Path]) -> set[str]:
    """Errors between objects, without file names.

    A warning says that one object lacks what another has empty: derived objects have every
    type 2 attribute, and sources often do not.
    """
    lines = validators.contradictions(paths)
    return {re.sub(r"<[^<>]*[.]dcm>", "<file>", line) for line in lines if line[:5] == "Error"}
