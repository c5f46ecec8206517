"""The shipped bundle on the validation subjects: what its manifest and card say of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from restoration.bundle import builtin, read_manifest
from restoration.restorer import Restorer
from restoration.tasks import RestorationTask
from training.evaluate import evaluate, prepared
from training.manifest import Item

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LEAST_GAIN_DB = 1.5


def test_it_gives_the_figures_of_its_manifest_on_the_validation_subjects(
    shared_data: Path, tmp_path: Path
) -> None:
    for pack in (shared_data / "train").glob("val_*.medz"):
        (tmp_path / pack.name).symlink_to(pack.resolve())
    restorer = Restorer.open("compact", device="cpu")

    def restore(volume: npt.NDArray[np.float32], item: Item) -> npt.NDArray[np.float32]:
        return restorer.restore(volume, item.task).volume

    with prepared(tmp_path, "val") as dataset:
        measured = evaluate(dataset, {"restored": restore}).to_dict()
    stated = read_manifest(builtin("compact")).metrics
    assert measured["protocol"] == stated["protocol"]
    for task in RestorationTask:
        ours, theirs = measured["tasks"][task.value], stated["tasks"][task.value]
        assert ours["slices"] == theirs["slices"]
        for method in ("input", "restored"):
            assert ours[method]["psnr"] == pytest.approx(theirs[method]["psnr"], abs=0.02)
        assert ours["restored"]["psnr"] - ours["input"]["psnr"] >= LEAST_GAIN_DB
