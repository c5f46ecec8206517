"""A CT series made by code, a network without training, and the memory that a series takes.

    python -m benchmarks.restored_series BUNDLE SLICES SIZE FOLDER

restores such a series in this process and prints slices, octets of anonymous memory at the start
and at most, of resident memory at most, and seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.images import KINDS, dataset_of, new_uid

_TASKS = ["ct_denoise"]


@dataclass(frozen=True)
class Series:
    """So many slices of a noisy body, each at a position of its own."""

    slices: int
    size: int

    def write(self, folder: Path) -> list[Path]:
        """The files, in the order in which a scanner sends them."""
        folder.mkdir(parents=True, exist_ok=True)
        return [self._write(folder / f"{n:05d}.dcm", n, dataset) for n, dataset in self._datasets()]

    def _datasets(self) -> Iterator[tuple[int, object]]:
        dataset = dataset_of(KINDS["CT 512×512"], rows=self.size, columns=self.size)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = new_uid(), new_uid()
        dataset.PixelSpacing = [0.8, 0.8]
        dataset.RescaleIntercept, dataset.ConvolutionKernel = -1024, "B30f"
        for number in range(self.slices):
            yield number, dataset

    def _write(self, path: Path, number: int, dataset: object) -> Path:
        from pydicom.dataset import Dataset

        assert isinstance(dataset, Dataset)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = new_uid()
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [-200, -200, 1.0 * number]
        dataset.PixelData = self._pixels(number).tobytes()
        dataset.save_as(path, enforce_file_format=True)
        return path

    def _pixels(self, number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        y, x = np.mgrid[-1 : 1 : self.size * 1j, -1 : 1 : self.size * 1j]
        wide = 0.7 + 0.1 * np.sin(number / 20)
        body = np.where(x**2 + y**2 < wide, 1064.0, 24.0)
        body = np.where((x - 0.4) ** 2 + y**2 < 0.08, 174.0, body)
        noisy = body + rng.normal(0, 20, body.shape).round()
        return np.clip(noisy, 0, 4095).astype("<u2")


def write_bundle_of(preset: str, folder: Path) -> Path:
    """A bundle of a preset that was never trained, which holds CT as the shipped one does.

    The preset "small" is no preset but the least network, for what does not hang on its size.
    """
    import torch

    from restoration.bundle import write_bundle
    from restoration.diffcode import DiffCode, DiffCodeConfig

    torch.manual_seed(0)
    fields = {
        "name": preset,
        "version": "0",
        "licence": "Apache-2.0",
        "tasks": _TASKS,
        "low_frequency": {"ct_denoise": [0.0, 4.0, 4.0]},
    }
    small = DiffCodeConfig(
        channels=(4, 6, 8, 8),
        blocks=(1, 1, 1, 1),
        latent_dim=8,
        codes=16,
        depths=2,
        tlc_train=32,
        variant="v2",
    )
    config = small if preset == "small" else DiffCodeConfig.preset(preset)
    write_bundle(folder, DiffCode(config), fields)
    return folder


def main() -> None:
    """Restore a series and tell what it took."""
    from dicom_node.inference import LocalEngine
    from dicom_node.restoring import restore_series
    from dicom_node.settings import NodeSettings

    bundle, slices, size, folder = sys.argv[1:]
    series = Series(int(slices), int(size))
    paths = series.write(Path(folder))
    engine = LocalEngine.open(bundle, device="cpu")
    settings, work = NodeSettings.model_validate({"policy": {"domain": "warn"}}), Path(folder)
    # What is loaded or made at the first use.
    warm = Series(4, int(size)).write(Path(folder) / "warm")
    for each in restore_series(
        warm, "ct_denoise", engine, settings, work=work, created=datetime.now(UTC)
    ).instances:
        del each
    with Sampled() as memory:
        begun = time.perf_counter()
        made = restore_series(
            paths, "ct_denoise", engine, settings, work=work, created=datetime.now(UTC)
        )
        for instance in made.instances:
            del instance
        seconds = time.perf_counter() - begun
    print(slices, memory.start, memory.anonymous, memory.resident, f"{seconds:.1f}")


class Sampled:
    """The memory of this process, looked at a hundred times a second."""

    def __init__(self) -> None:
        self.start, _ = _memory()
        self.anonymous = self.resident = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(0.01):
            anonymous, resident = _memory()
            self.anonymous = max(self.anonymous, anonymous)
            self.resident = max(self.resident, resident)


def _memory() -> tuple[int, int]:
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(words[name].split()[0]) for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
