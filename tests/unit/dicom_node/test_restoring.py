"""The way of one job's images without ledger or spool: seeds, parameters, gates, grids."""

from __future__ import annotations

import gc
import re
import tracemalloc
from dataclasses import dataclass, replace
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from benchmarks.restored_series import write_bundle_of
from dicom_node.dicom.derived import quantise
from dicom_node.dicom.reports import GateValue
from dicom_node.dicom.scratch import Scratch
from dicom_node.dicom.volume import load_volumes
from dicom_node.errors import RefusedError
from dicom_node.inference import (
    DomainVerdict,
    LocalEngine,
    ModelIdentity,
    RestorationRequest,
    RestorationResult,
)
from dicom_node.ledger.states import Verdict
from dicom_node.readings import GateReading, Level
from dicom_node.reported import delivered_drift, gate_values, judged_values
from dicom_node.restored_volumes import seeds
from dicom_node.restoring import parameters_hash, restore_series
from dicom_node.settings import NodeSettings
from restoration.fidelity.catalogue import GATES, GateSpec
from tests.factories import make_series, write_series
from tests.multiframe import make_enhanced
from tests.unit.dicom_node.bench import Gain, uids

NOW = datetime(2026, 3, 4, 5, 6, 7)


def test_a_slice_has_the_same_seed_in_any_company() -> None:
    headers = make_series("CT", slices=5, rows=8)
    model = Gain().model
    together = dict(zip(sorted(uids(headers)), _seeds_by_uid(headers, model), strict=True))
    for header in headers:
        assert seeds([header], model) == (together[header.SOPInstanceUID],)
    assert len(set(together.values())) == 5
    assert all(0 <= seed < 2**63 for seed in together.values())


def _seeds_by_uid(headers: Any, model: Any) -> tuple[int, ...]:
    return seeds(sorted(headers, key=lambda header: str(header.SOPInstanceUID)), model)


def test_parameters_tell_tasks_and_settings_of_a_model_apart() -> None:
    hashes = {
        parameters_hash(task, Gain(gain).parameters(task))
        for task in Gain().tasks
        for gain in (1.0, 2.0)
    }
    assert len(hashes) == 6


def test_what_the_engine_measured_is_told_by_slice_and_by_volume() -> None:
    result = RestorationResult(
        np.zeros((2, 4, 4), np.float32),
        ModelIdentity("gain", "1", "ab" * 32),
        ("mean_drift",),
        0.1,
        {"mean_drift": [0.5, -7.0], "support_rows": 0.5, "of another length": [1.0]},
    )
    assert gate_values(result, 2) == [
        GateValue("mean_drift", 0.5, slice=0),
        GateValue("mean_drift", -7.0, slice=1),
        GateValue("mean_drift", -7.0),
        GateValue("support_rows", 0.5),
    ]


def test_the_network_s_drift_in_ct_is_told_in_hounsfield_units() -> None:
    model = ModelIdentity("gain", "1", "ab" * 32)
    result = RestorationResult(
        np.zeros((1, 4, 4), np.float32), model, (), 0.1, {"mean_drift": [2.0]}
    )
    units = {value.unit for value in gate_values(result, 1, hounsfield=True)}
    assert units == {"[hnsf'U]"}


@pytest.mark.parametrize("gate", [*GATES, None], ids=lambda gate: gate.name if gate else "guard")
def test_every_gate_is_reported_in_a_unit_of_ucum(gate: GateSpec | None) -> None:
    """The Unified Code for Units of Measure 2.1, §12: an annotation is of visible ASCII."""
    units = {gate.unit_of(task) for task in gate.tasks} if gate else {"guards"}
    for unit in units:
        measured = GateReading("gate", unit, (1.0,), (0,), (Level.PASS,), (None, 1.0), (None, 2.0))
        for value in judged_values(measured, Verdict.PASS):
            assert re.fullmatch(r"1|%|\[hnsf'U\]|\[arb'U\]|\{[!-z|~]+\}(g/ml)?", value.unit)
            assert len(value.unit) <= 16  # SH, the VR of Code Value


def test_what_assembler_and_volume_both_found_is_told_once(tmp_path: Path) -> None:
    series = make_series("CT", slices=5, rows=8, missing=[1])
    gap = "slices are missing or unevenly spaced: runs of 1 + 3"
    paths = write_series(series, tmp_path)
    note = f"4 of the 5 slices that Number of Slices announces; {gap}"
    made = restore_series(paths, "ct_denoise", Gain(), NodeSettings(), created=NOW, note=note)
    assert made.warnings == tuple(note.split("; "))
    (image, *_) = made.instances
    words = dcmread(BytesIO(image.data)).DerivationDescription
    assert words.count(gap) == 1


def test_what_the_device_could_not_do_is_a_warning_of_the_job(tmp_path: Path) -> None:
    class Short(Gain):
        def restore(self, *arguments: Any, **words: Any) -> RestorationResult:
            return replace(super().restore(*arguments, **words), remarks=("no memory: tiles",))

    paths = write_series(make_series("CT", slices=2, rows=8), tmp_path)
    made = restore_series(paths, "ct_denoise", Short(), NodeSettings(), created=NOW)
    assert "no memory: tiles" in made.warnings


@pytest.mark.parametrize(
    ("modality", "task", "gain", "unit"),
    [
        ("CT", "ct_denoise", 7.0, "[hnsf'U]"),
        ("MR", "mri_sr", 7.0, "1"),
        ("PT", "pet_synthesis", 0.5, "1"),
    ],
)
def test_the_drift_that_is_reported_is_that_of_the_delivered_pixels(
    modality: Any, task: str, gain: float, unit: str, tmp_path: Path
) -> None:
    paths = write_series(make_series(modality, slices=2, rows=16), tmp_path)
    before = next(load_volumes(paths, task, NodeSettings().policy))
    made = restore_series(paths, task, Gain(gain=gain), NodeSettings(), created=NOW)
    drift = delivered_drift(before, made.volumes[0])
    assert [value.slice for value in drift] == [0, 1, None]
    assert {value.unit for value in drift} == {unit}
    # Of the files as any reader decodes them, in the order of the volume.
    for value, instance, source in zip(drift, made.instances, before.array, strict=False):
        read = dcmread(BytesIO(instance.data))
        slope, intercept = (
            float(read.get("RescaleSlope", 1)),
            float(read.get("RescaleIntercept", 0)),
        )
        after = (read.pixel_array * slope + intercept).mean() * before.scale.per_native
        mean = float(source.mean(dtype=np.float64))
        expected = (after - mean) if modality == "CT" else (after - mean) / abs(mean)
        assert value.value == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert abs(value.value) > 0


def test_the_scale_of_each_volume_of_an_mr_image_is_kept_and_gives_its_pixels_again(
    tmp_path: Path,
) -> None:
    image = make_enhanced("MR", slices=2, rows=64, volumes=2, spacing=(0.9, 0.9))
    paths = write_series([image], tmp_path)
    engine = LocalEngine.open("compact", device="cpu")
    made = restore_series(paths, "mri_sr", engine, NodeSettings(), created=NOW)
    scales = made.quantities["intensity_scales"]
    assert len(scales) == len(made.volumes) == 2
    assert "intensity_scale" not in made.quantities
    loaded = list(load_volumes(paths, "mri_sr", NodeSettings().policy))
    for series, scale, restored in zip(loaded, scales, made.volumes, strict=True):
        request = RestorationRequest(
            array=series.array,
            task="mri_sr",
            spacing=series.spacing,
            seeds=seeds(series.headers, engine.model, series.frames),
            strength=1.0,
            scale=scale,
        )
        again = engine.restore(request)
        # What is late or restored anew with the stored scale is what was restored with its own.
        assert again.diagnostics["intensity_scale"] == pytest.approx(scale)
        for mine, theirs in zip(quantise(series, again.array).frames, restored.frames, strict=True):
            np.testing.assert_array_equal(mine.stored, theirs.stored)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slice_more_takes_a_few_kilobytes_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every array in a file, as those of long series are.
    monkeypatch.setattr(Scratch.__init__, "__kwdefaults__", {"large": 1})
    engine = LocalEngine.open(str(write_bundle_of("small", tmp_path / "bundle")), device="cpu")
    paths = write_series(make_series("CT", slices=56, rows=96), tmp_path)
    held_by(paths[:2], engine, tmp_path)  # what is loaded or made at the first use
    few, many = (held_by(paths[:count], engine, tmp_path) for count in (16, 56))
    assert (many.python - few.python) / 40 < 10_000
    assert (many.python_at_most - few.python_at_most) / 40 < 20_000
    # A slice is 92 kB in physical units, restored and delivered; a page may be one of 2 MB.
    assert many.mapped_at_most - few.mapped_at_most < 2 * 2**20


@dataclass(frozen=True)
class Held:
    """Octets that a job holds when its first instance is made, and at most while it is restored."""

    python: int
    python_at_most: int
    mapped_at_most: int


def held_by(paths: list[Path], engine: LocalEngine, work: Path) -> Held:
    """What the restoration of these files takes, counted each time that pages are let go."""
    mapped, release = [0], Scratch.release

    def counted(scratch: Scratch) -> None:
        mapped.append(resident_mapped())
        release(scratch)

    gc.collect()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Scratch, "release", counted)
        tracemalloc.start()
        try:
            settings = NodeSettings.model_validate({"policy": {"domain": "warn"}})
            made = restore_series(paths, "ct_denoise", engine, settings, work=work, created=NOW)
            next(made.instances)
            _, at_most = tracemalloc.get_traced_memory()
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        for instance in made.instances:
            del instance
    return Held(held, at_most, max(mapped))


def resident_mapped() -> int:
    """Octets of files without a name that are in the memory of this process."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
    nameless = (part for part in parts if "(deleted)" in part.split("\n", 1)[0])
    return sum(1024 * int(part.split("\nRss:")[1].split()[0]) for part in nameless)


def test_frames_of_one_image_have_seeds_of_their_own() -> None:
    header = make_series("MR", slices=1, rows=8)[0]
    model = Gain().model
    frames = seeds([header] * 3, model, (1, 2, 3))
    assert len({*frames, *seeds([header], model)}) == 4
    assert seeds([header], model, (2,)) == frames[1:2]


def test_progress_counts_on_over_the_volumes_of_one_image(tmp_path: Path) -> None:
    paths = write_series([make_enhanced("MR", slices=3, rows=8, volumes=2)], tmp_path)
    seen: list[tuple[int, int]] = []
    restore_series(
        paths,
        "mri_sr",
        Gain(),
        NodeSettings(),
        created=NOW,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6)]


def test_each_volume_s_remarks_are_told_once(tmp_path: Path) -> None:
    paths = write_series([make_enhanced("MR", slices=2, rows=8, volumes=2)], tmp_path)
    engine = Gain(verdict=DomainVerdict(missing=("contrast",)))
    made = restore_series(paths, "mri_sr", engine, NodeSettings(), created=NOW, note="a note")
    assert made.warnings == ("a note", "the header does not state contrast")
    assert [len(each.frames) for each in made.volumes] == [2, 2]
    (instance,) = made.instances
    assert instance.source_sop_instance_uid


def test_volumes_that_need_grids_of_their_own_fit_into_no_image(tmp_path: Path) -> None:
    class Moody(Gain):
        def judge(self, task: str, facts: Any) -> DomainVerdict:
            super().judge(task, facts)
            return DomainVerdict(upsample=len(self.facts))

    paths = write_series([make_enhanced("MR", slices=2, rows=8, volumes=2)], tmp_path)
    with pytest.raises(RefusedError, match="grids of their own"):
        restore_series(paths, "mri_sr", Moody(), NodeSettings(), created=NOW)


def test_a_task_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    paths = write_series(make_series("CT", slices=1, rows=8), tmp_path)
    with pytest.raises(RefusedError, match="cannot do ct_denoise"):
        restore_series(paths, "ct_denoise", Gain(tasks=("mri_sr",)), NodeSettings(), created=NOW)
