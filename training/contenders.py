"""The trained rows of a table: bundles, and rungs of runs as the bundles they would become."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from restoration.diffcode import VARIANTS
from restoration.restorer import Manifest, Restorer
from training.checkpoint import CHECKPOINT, TrainingError
from training.evaluation import CLASSICAL, INPUT, RESTORED
from training.export import export_bundle
from training.manifest import Item
from training.stages import Stage

Volume = npt.NDArray[np.float32]
RUNG_LABELS = {
    "v1": "V1, backbone",
    "v2": "V2, + routing",
    "v3": "V3, + codebook",
    "full": "DiffCode, + diffusion",
}


@dataclass(frozen=True)
class Contender:
    """One trained method of a table."""

    name: str
    label: str
    restorer: Restorer

    def __call__(self, volume: Volume, item: Item) -> Volume:
        """The restored volume; a refusal names the item."""
        try:
            return self.restorer.restore(volume, item.task, spacing=item.spacing_mm).volume
        except (ValueError, TypeError) as error:
            raise ValueError(f"{item.name}: {error}") from error


def contenders(
    bundles: Sequence[str | Path],
    runs: Sequence[Path],
    data: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
) -> list[Contender]:
    """Every bundle, then every finished rung of every run; one alone is called `restored`.

    Raises BundleError or TrainingError for what cannot be opened, ValueError for names that clash.
    """
    found = [_of_bundle(bundle, device, threads) for bundle in bundles]
    for run in runs:
        folders = list(rung_folders(run))
        if not folders:
            raise TrainingError(f"{run} holds no restoration stage ({', '.join(VARIANTS)})")
        prefix = f"{run.name}/" if len(runs) > 1 else ""
        for rung, folder in folders:
            restorer = rung_restorer(folder, data, device=device, threads=threads)
            label = f"{RUNG_LABELS.get(rung, rung)} ({run.name})"
            found.append(Contender(f"{prefix}{rung}", label, restorer))
    if len(found) == 1:
        return [Contender(RESTORED, found[0].label, found[0].restorer)]
    names = [contender.name for contender in found]
    clashing = sorted({n for n in names if names.count(n) > 1 or n in (INPUT, CLASSICAL)})
    if clashing:
        raise ValueError(f"several methods would be called {', '.join(clashing)}: rename a folder")
    return found


def rung_folders(run: Path) -> Iterator[tuple[str, Path]]:
    """(rung, stage folder) of the restoration stages of a run, V1 first; a stage folder is one."""
    if (run / CHECKPOINT).exists():
        yield run.name.removeprefix("restoration-"), run
    for rung in VARIANTS:
        folder = run / Stage.RESTORATION.folder(rung)
        if (folder / CHECKPOINT).exists():
            yield rung, folder


def rung_restorer(
    folder: Path,
    data: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    bare: bool = False,
) -> Restorer:
    """A stage folder's averaged weights as its bundle would hold them, in half precision.

    A `bare` one keeps no low frequencies of the input, as rungs are compared on a ladder.
    """
    fields: dict[str, object] = {
        "name": folder.parent.name or "run",
        "version": "0",
        "licence": "unpublished",
    }
    if bare:
        fields["low_frequency"] = {}
    with tempfile.TemporaryDirectory(prefix="diffcode-") as temporary:
        out = Path(temporary) / "bundle"
        export_bundle(folder, out, data, fields=fields)
        return Restorer.open(out, device=device, threads=threads)


def describe(manifest: Manifest) -> str:
    """A bundle in a few words: name, version, variant, the beginning of its hash."""
    return f"{manifest.name} {manifest.version}, {manifest.variant} ({manifest.sha256[:8]})"


def labels(found: Sequence[Contender]) -> Mapping[str, str]:
    """What each contender is, by its name."""
    return {contender.name: contender.label for contender in found}


def _of_bundle(bundle: str | Path, device: str, threads: int | None) -> Contender:
    restorer = Restorer.open(bundle, device=device, threads=threads)
    return Contender(restorer.manifest.name, describe(restorer.manifest), restorer)
