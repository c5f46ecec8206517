"""What cannot be used is refused through the command line: what, where, and nothing overwritten."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from tests.training.command import call
from tests.training.tiny import recipe_file, tiny_recipe, tiny_set
from tests.unit.training.test_sources import write_slice
from training.checkpoint import CHECKPOINT
from training.phantoms import brain_t2, chest_ct

CHEST = chest_ct(2, 48, 1).volume
HEAD = brain_t2(2, 48, 1).volume


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Place:
    """A folder with all that training leaves behind, for one test to spoil."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "prepared"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def checkpoint(self) -> Path:
        return self.run / "restoration-v2" / CHECKPOINT

    def train(self, *more: Any, recipe: str = "recipe.toml") -> tuple[Any, ...]:
        return (
            "train", "restoration", "--variant", "v2", "--recipe", self.folder / recipe,
            "--data", self.data, "--out", self.run, "--device", "cpu", *more,
        )  # fmt: skip

    def restore(self, source: Path, task: str, out: str = "out.npy") -> tuple[Any, ...]:
        return (
            "restore", source, self.folder / out, "--task", task, "--bundle", self.bundle,
            "--device", "cpu",
        )  # fmt: skip

    def array(self, values: Any) -> Path:
        np.save(self.folder / "in.npy", values)
        return self.folder / "in.npy"

    def nifti(self, values: Any, name: str = "case-T2.nii.gz") -> Path:
        image = nibabel.Nifti1Image(np.ascontiguousarray(values.T), np.eye(4))
        image.to_filename(self.folder / name)
        return self.folder / name

    def prepare(self, source: Path, *more: Any) -> tuple[Any, ...]:
        return ("prepare", source, "--out", self.folder / "new", *more)

    def evaluate(self) -> tuple[Any, ...]:
        return (
            "evaluate", "--data", self.data, "--bundle", self.bundle, "--no-classical",
            "--device", "cpu",
        )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("finished"))
    tiny_set(place.data, size=48)
    recipe_file(place.folder, tiny_recipe(stage3={"steps": 1}))
    assert call(*place.train()).exit_code == 0
    made = call("bundle", place.run, place.bundle, "--data", place.data)
    assert made.exit_code == 0, made.stderr
    return place.folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Place:
    return Place(shutil.copytree(finished, tmp_path / "here"))


def with_nan(volume: Any) -> Any:
    spoilt = volume.copy()
    spoilt[1, 2, 3] = np.nan
    return spoilt


def nan_array(place: Place) -> tuple[Any, ...]:
    return place.restore(place.array(with_nan(CHEST)), "ct_denoise")


def nan_nifti(place: Place) -> tuple[Any, ...]:
    return place.prepare(place.nifti(with_nan(HEAD)), "--task", "mri_sr")


def picture(place: Place) -> tuple[Any, ...]:
    (place.folder / "pictures").mkdir()
    (place.folder / "pictures" / "slice.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return place.prepare(place.folder / "pictures")


def eight_bit_array(place: Place) -> tuple[Any, ...]:
    return place.restore(place.array(np.full((2, 48, 48), 99, np.uint8)), "mri_sr")


def eight_bit_nifti(place: Place) -> tuple[Any, ...]:
    source = place.nifti((HEAD / 16).astype(np.uint8))
    return place.restore(source, "mri_sr", "out.nii.gz")


def ct_named_mr(place: Place) -> tuple[Any, ...]:
    return place.prepare(place.nifti(CHEST), "--task", "mri_sr")


def ct_restored_as_mr(place: Place) -> tuple[Any, ...]:
    return place.restore(place.array(CHEST), "mri_sr")


def ct_dicom_as_mr(place: Place) -> tuple[Any, ...]:
    for k, image in enumerate(CHEST.astype(np.int16)):
        write_slice(place.folder / "dicom" / f"{k}.dcm", image, 5.0 * k)
    return place.prepare(place.folder / "dicom", "--task", "mri_sr")


def other_weights(place: Place) -> tuple[Any, ...]:
    weights = place.bundle / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return place.restore(place.array(CHEST), "ct_denoise")


def other_weights_evaluated(place: Place) -> tuple[Any, ...]:
    other_weights(place)
    return place.evaluate()


def other_preset(place: Place) -> tuple[Any, ...]:
    changed = place.folder / "other"
    changed.mkdir()
    recipe_file(changed, tiny_recipe(arch={"channels": [4, 8, 8, 16]}))
    return place.train("--force", recipe="other/recipe.toml")


def other_schedule(place: Place) -> tuple[Any, ...]:
    return place.train("--steps", 9)


def empty(place: Place) -> Path:
    (place.folder / "empty").mkdir()
    return place.folder / "empty"


def truncated(path: Path, keep: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def truncated_nifti(place: Place) -> tuple[Any, ...]:
    return place.prepare(truncated(place.nifti(HEAD)), "--task", "mri_sr")


def truncated_array(place: Place) -> tuple[Any, ...]:
    return place.restore(truncated(place.array(HEAD)), "mri_sr")


def truncated_checkpoint(place: Place) -> tuple[Any, ...]:
    truncated(place.checkpoint)
    return place.train()


def truncated_checkpoint_bundled(place: Place) -> tuple[Any, ...]:
    truncated(place.checkpoint)
    return ("bundle", place.run, place.folder / "new", "--data", place.data)


def truncated_pair(place: Place) -> tuple[Any, ...]:
    truncated(next(place.data.glob("train-mri_sr.hq.npy")))
    return place.train("--steps", 9, "--force")


def broken_manifest(place: Place) -> tuple[Any, ...]:
    truncated(place.data / "manifest.json")
    return place.train()


def nothing_held_out(place: Place) -> tuple[Any, ...]:
    path = place.data / "manifest.json"
    entries = path.read_text().replace('"split": "val"', '"split": "train"')
    path.write_text(entries)
    return place.train("--steps", 9, "--force")


def broken_pack(place: Place) -> tuple[Any, ...]:
    (place.folder / "a.medz").write_bytes(b"MEDZ9" * 40)
    return place.prepare(place.folder / "a.medz")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_array, r"in\.npy: Slice 1 .* not finite"),
        (nan_nifti, r"case-T2\.nii\.gz: slice 1 holds NaN"),
        (picture, r"slice\.png is an 8-bit picture"),
        (eight_bit_array, r"in\.npy: .* not uint8"),
        (eight_bit_nifti, r"case-T2\.nii\.gz .*8-bit picture"),
        (ct_named_mr, r"case-T2\.nii\.gz: not an MR magnitude image"),
        (ct_restored_as_mr, r"in\.npy: not an MR magnitude image.* Is it a CT\?"),
        (ct_dicom_as_mr, "No series among the sources serves the tasks asked for: mri_sr"),
        (other_weights, r"model\.safetensors: SHA-256 is [0-9a-f]{64}, the manifest says"),
        (other_weights_evaluated, r"model\.safetensors: SHA-256 is"),
        (other_preset, r"restoration-v2 holds another run \(arch\.channels was .*, is "),
        (other_schedule, r"restoration-v2 holds another run \(stage3\.steps was 1, is 9"),
        (lambda p: p.prepare(empty(p)), "empty holds no image series"),
        (lambda p: (*p.restore(p.array(CHEST), "ct_denoise")[:-4], "--bundle", empty(p)),
         r"empty/manifest\.json: No such file"),
        (lambda p: ("bundle", empty(p), p.folder / "new", "--data", p.data),
         "empty holds no restoration stage"),
        (lambda p: ("evaluate", "--data", empty(p), "--bundle", p.bundle), "empty"),
        (truncated_nifti, r"case-T2\.nii\.gz is not a readable NIfTI file"),
        (truncated_array, r"in\.npy cannot be read as a NumPy array"),
        (truncated_checkpoint, r"checkpoint\.safetensors is no checkpoint of this program"),
        (truncated_checkpoint_bundled, r"checkpoint\.safetensors is no checkpoint"),
        (truncated_pair, r"train-mri_sr\.hq\.npy"),
        (nothing_held_out, "prepared has no validation slices for mri_sr"),
        (broken_manifest, r"manifest\.json is not JSON"),
        (broken_pack, r"a\.medz: not a MEDZ pack"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else "",
)  # fmt: skip
def test_it_is_refused_in_one_line_that_says_what_and_where(
    place: Place, spoil: Callable[[Place], tuple[Any, ...]], message: str
) -> None:
    command = spoil(place)
    before = contents(place.folder)
    done = call(*command)
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    after = contents(place.folder)
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert {name for name in after if name not in before} == set()


def test_an_empty_training_set_is_named(place: Place) -> None:
    nothing = empty(place)
    done = call(*(nothing if part == place.data else part for part in place.train()))
    assert done.exit_code == 1
    assert "empty is not a prepared folder" in done.stderr
