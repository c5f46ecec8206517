"""The door to the model: its answers and its errors in the node's words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dicom_node.dicom.geometry import SAME_GRID, Resampling
from dicom_node.errors import ConfigurationError, EngineMemoryError, PermanentError
from dicom_node.inference import LocalEngine, RestorationRequest
from restoration.bundle import Manifest, write_bundle
from restoration.diffcode import DiffCode, DiffCodeConfig
from restoration.restorer import Restoration, RestorationMemoryError, Restorer

FIELDS = {
    "name": "tiny",
    "version": "0",
    "licence": "Apache-2.0",
    "tasks": ["ct_denoise", "mri_sr"],
    "domain": {"ct_denoise": {"modality": "CT", "slice_thickness_mm": [0.5, 5.0]}},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write_bundle(folder, DiffCode(DiffCodeConfig.preset("tiny")), FIELDS)
    return folder


@pytest.fixture(scope="module")
def engine(bundle: Path) -> LocalEngine:
    return LocalEngine.open(str(bundle), device="cpu")


def request(slices: int = 2, **changes: Any) -> RestorationRequest:
    rng = np.random.default_rng(0)
    array = rng.normal(40.0, 20.0, (slices, 24, 32)).astype(np.float32)
    made = RestorationRequest(array, "ct_denoise", (3.0, 1.0, 1.0), tuple(range(slices)))
    return replace(made, **changes)


@dataclass
class Broken:
    """A restorer whose restoration raises."""

    manifest: Manifest
    error: Exception

    def restore(self, *_: Any, **__: Any) -> Restoration:
        raise self.error


def test_the_engine_says_which_weights_it_has(engine: LocalEngine, bundle: Path) -> None:
    manifest = Restorer.open(bundle, device="cpu").manifest
    assert (engine.model.name, engine.model.version) == ("tiny", "0")
    assert engine.model.sha256 == manifest.sha256
    assert set(engine.tasks) == {"ct_denoise", "mri_sr"}


def test_a_result_is_that_of_the_restorer(engine: LocalEngine, bundle: Path) -> None:
    asked = request()
    seen: list[tuple[int, int]] = []
    result = engine.restore(asked, lambda done, total: seen.append((done, total)))
    direct = Restorer.open(bundle, device="cpu").restore(
        asked.array, asked.task, spacing=asked.spacing, seeds=asked.seeds
    )
    np.testing.assert_array_equal(result.array, direct.volume)
    assert result.model == engine.model
    assert seen[-1] == (2, 2)


def test_a_low_matrix_comes_back_on_the_grid_that_was_asked_for(engine: LocalEngine) -> None:
    array = np.random.default_rng(0).random((2, 24, 32), dtype=np.float32) * 500
    result = engine.restore(request(array=array, task="mri_sr", upsample=2))
    assert result.array.shape == (2, 48, 64)
    assert result.resampling == Resampling(2, (0.0, 0.0))
    assert engine.restore(request(array=array, task="mri_sr")).resampling == SAME_GRID


def test_a_slice_restores_alike_in_any_company(engine: LocalEngine) -> None:
    together = request(slices=3)
    alone = replace(together, array=together.array[1:2], seeds=together.seeds[1:2])
    np.testing.assert_allclose(
        engine.restore(alone).array[0], engine.restore(together).array[1], rtol=0, atol=0.05
    )


def test_the_gates_are_heard_of_while_they_run(engine: LocalEngine) -> None:
    seen: list[tuple[int, int]] = []
    engine.restore(request(slices=3), lambda done, total: seen.append((done, total)))
    # more often than the restoration alone can: at most once a slice
    assert seen.count((3, 3)) >= 4


def test_slices_too_small_for_the_gates_are_refused_before_anything_is_restored(
    engine: LocalEngine,
) -> None:
    small = np.zeros((2, 12, 32), np.float32)
    broken: Any = Broken(engine._restorer.manifest, AssertionError("restored"))
    with pytest.raises(PermanentError, match=r"12x32 pixels .* 16 are the least; nothing was"):
        LocalEngine(broken).restore(request(array=small))
    # a low matrix counts on the grid that it is restored on
    assert engine.restore(request(array=small, task="mri_sr", upsample=2)).readings


def test_an_acquisition_is_judged_by_the_domain_of_its_task(engine: LocalEngine) -> None:
    verdict = engine.judge("ct_denoise", {"modality": "CT", "slice_thickness_mm": 8.0})
    assert [reason.split(" is ")[0] for reason in verdict.outside] == ["slice thickness 8 mm"]
    assert engine.judge("ct_denoise", {"modality": "CT"}).missing == ("slice_thickness_mm",)
    assert engine.judge("mri_sr", {"modality": "MR"}).outside == ()


@pytest.mark.parametrize(
    ("spacing", "factor", "upsample", "outside"),
    [
        (0.8, 4.0, 1, False),  # in the domain as it is
        (1.6, 4.0, 4, False),  # 0.4 mm by the factor of the training operator
        (0.2, 4.0, 1, True),  # too fine
        (8.0, 4.0, 1, True),  # too coarse, even then
        (1.6, 2.5, 1, True),  # no whole number of samples
    ],
)
def test_a_low_matrix_is_told_from_an_acquisition_outside_the_domain(
    tmp_path: Path, spacing: float, factor: float, upsample: int, outside: bool
) -> None:
    fields = {
        **FIELDS,
        "domain": {"mri_sr": {"modality": "MR", "pixel_spacing_mm": [0.4, 1.0]}},
        "degradation": {
            "mri_sr": {"name": "kspace-truncation", "version": 1, "params": {"factor": factor}}
        },
    }
    write_bundle(tmp_path / "low", DiffCode(DiffCodeConfig.preset("tiny")), fields)
    engine = LocalEngine.open(str(tmp_path / "low"), device="cpu")
    facts = {"modality": "MR", "pixel_spacing_mm": (spacing, spacing)}
    verdict = engine.judge("mri_sr", facts)
    assert (verdict.upsample, bool(verdict.outside)) == (upsample, outside)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RestorationMemoryError("cuda:0: no memory for a slice of 512x512 pixels"), "memory"),
        (MemoryError("Unable to allocate 4 GiB"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (RuntimeError("shape mismatch"), "permanent"),
        (ValueError("slice 3 has values that are not finite"), "permanent"),
    ],
)
def test_only_exhausted_memory_is_worth_another_try(
    bundle: Path, error: Exception, kind: str
) -> None:
    manifest = Restorer.open(bundle, device="cpu").manifest
    broken: Any = Broken(manifest, error)
    wanted = EngineMemoryError if kind == "memory" else PermanentError
    with pytest.raises(wanted):
        LocalEngine(broken).restore(request())


@pytest.mark.parametrize("name", ["no-such-bundle", "/no/such/folder"])
def test_a_bundle_that_cannot_be_opened_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigurationError, match="engine: "):
        LocalEngine.open(name)


def test_a_device_that_is_not_there_is_a_configuration_error(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="cuda:99"):
        LocalEngine.open(str(bundle), device="cuda:99")


def test_the_engine_says_what_steers_it_beside_its_weights(engine: LocalEngine) -> None:
    weight = engine.parameters("mri_sr")["data_consistency"]
    assert 0 < weight <= 1
    assert engine.parameters("ct_denoise") == {
        "data_consistency": 0.0,
        "low_frequency": [0.0, 4.0, 4.0],
    }
