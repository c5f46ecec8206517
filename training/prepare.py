"""Turn image series into pairs for training: degrade, scale, split by subject, write.

The folder appears whole or not at all; an existing one is never touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from restoration.tasks import RestorationTask, intensity_scale, spec
from training.degrade import (
    CtNoiseInsertion,
    KSpaceTruncation,
    NoSoftTissueError,
    PetThinning,
    soft_tissue_noise,
)
from training.manifest import Item, PreparedManifest
from training.sources import Series, SourceError, discover
from training.uptake import body_box, embed_crop, fdg_from_ct, largest_extent_mm

Volume = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

_FURTHER_FACTOR = 0.5  # a milder cut is drawn half as often: the easier problem, beside the task
_FIELDS = (96, 128, 160, 192, 224, 256, 320, 400, 512)


class PrepareError(ValueError):
    """Nothing was written; the message says why."""


@dataclass(frozen=True)
class PrepareOptions:
    """What is taken from the sources and how it is degraded."""

    mr: KSpaceTruncation = field(default_factory=KSpaceTruncation)
    mr_factors: tuple[float, ...] = ()
    """Further factors of the MR operator, for training series: milder cuts of k-space."""
    ct: CtNoiseInsertion = field(default_factory=CtNoiseInsertion)
    pet: PetThinning = field(default_factory=PetThinning)
    splits: tuple[str, ...] = ("train", "val")
    max_slices: int | None = None
    """At most so many slices of a training series, evenly spread; validation stays whole."""
    central_slices: int | None = None
    """Only so many slices from the middle of a series: the ends of a head show little brain."""
    max_noise_hu: float = 30.0
    """CT noisier than this is no reference and is left out."""
    val_fraction: float = 0.1
    """Share of subjects held out when no source is marked as validation."""
    simulated_pet: bool = True
    """Add simulated FDG on the anatomy of each CT series."""
    pet_draws: int = 1
    """So many scans of each PET training series, each with other noise (and other uptake where
    that is simulated): PET slices are small and few. Validation stays one."""
    licences: Mapping[str, str] = field(default_factory=dict)
    """Licence of the images by the name of their source folder, where the files do not tell it."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"'val_fraction' must be in [0, 1), not {self.val_fraction}.")
        if self.pet_draws < 1:
            raise ValueError(f"'pet_draws' must be at least 1, not {self.pet_draws}.")

    def _mr_record(self) -> dict[str, object]:
        record: dict[str, object] = self.mr.record()
        if self.mr_factors:
            factors = sorted({self.mr.factor, *self.mr_factors})
            record["params"] = {**asdict(self.mr), "factors": factors}
        return record

    def operators(self) -> dict[str, dict[str, object]]:
        return {
            RestorationTask.MRI_SR.value: self._mr_record(),
            RestorationTask.CT_DENOISE.value: self.ct.record(),
            RestorationTask.PET_SYNTHESIS.value: self.pet.record(),
        }


@dataclass(frozen=True)
class _Work:
    """What every series of one run is prepared with."""

    splits: dict[str, str]
    low_dose: dict[str, Series]
    seed: int
    tasks: frozenset[RestorationTask]
    options: PrepareOptions

    def generator(self, name: str) -> np.random.Generator:
        """Noise of one item: the same whatever else is prepared beside it."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])


@dataclass(frozen=True)
class _Pair:
    """A finished pair before it has files."""

    item: Item
    lq: Volume
    hq: npt.NDArray[np.float32 | np.int16]


def prepare(
    sources: Sequence[Path],
    out: Path,
    *,
    seed: int,
    tasks: Sequence[RestorationTask] = tuple(RestorationTask),
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
    jobs: int = 1,
) -> PreparedManifest:
    """Write pairs of all series in ``sources`` to the new folder ``out``.

    ``sources`` are packs, NIfTI files, or folders of those or of DICOM series; files and packs
    named ``val_…`` are held out. ``progress(done, total, name)`` is called after each series.
    The result depends on the sources, the seed and the options only, not on how many processes
    (``jobs``) share the series.
    Raises PrepareError when ``out`` exists, SourceError for a source that cannot be used.
    """
    options = options or PrepareOptions()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepareError(f"{out} exists; choose a new folder, nothing is overwritten.")
    searched = set(tasks)
    if RestorationTask.PET_SYNTHESIS in searched and options.simulated_pet:
        searched.add(RestorationTask.CT_DENOISE)
    found = discover(sources, [task for task in RestorationTask if task in searched])
    series = [_attributed(each, sources, options) for each in _unique(found)]
    splits = split_subjects(series, seed=seed, val_fraction=options.val_fraction)
    series = [each for each in series if splits[each.subject] in options.splits]
    low_dose = _low_dose_partners(series)
    unfinished = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        work = _Work(splits, low_dose, seed, frozenset(tasks), options)
        manifest = _write_all(series, unfinished, work, progress, jobs)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def split_subjects(series: Sequence[Series], *, seed: int, val_fraction: float) -> dict[str, str]:
    """train or val for each subject: as the sources mark them, else a seeded draw.

    A subject with any series marked as validation is validation altogether. The draw takes its
    share of the subjects of each kind (those with the same tasks), and at least one of two.
    """
    held_out = {each.subject for each in series if each.validation}
    if not held_out:
        held_out = _drawn_subjects(series, seed, val_fraction)
    subjects = sorted({each.subject for each in series})
    return {subject: "val" if subject in held_out else "train" for subject in subjects}


def _drawn_subjects(series: Sequence[Series], seed: int, fraction: float) -> set[str]:
    tasks: dict[str, set[str]] = {}
    for each in series:
        tasks.setdefault(each.subject, set()).add(each.task.value)
    kinds: dict[tuple[str, ...], list[str]] = {}
    for subject in sorted(tasks):
        kinds.setdefault(tuple(sorted(tasks[subject])), []).append(subject)
    generator = np.random.default_rng([seed, 0x5EED])
    drawn: set[str] = set()
    for kind in sorted(kinds):
        subjects = kinds[kind]
        count = round(len(subjects) * fraction)
        if fraction > 0 and len(subjects) > 1:
            count = max(1, count)
        drawn |= {subjects[i] for i in generator.permutation(len(subjects))[:count]}
    return drawn


def _unique(series: Sequence[Series]) -> list[Series]:
    """Number names that occur more than once, in the order of the sources."""
    seen: Counter[str] = Counter()
    named = []
    for each in series:
        seen[each.name] += 1
        count = seen[each.name]
        named.append(replace(each, name=f"{each.name}-{count}") if count > 1 else each)
    return named


def _attributed(series: Series, sources: Sequence[Path], options: PrepareOptions) -> Series:
    """With the name of its folder and that one's licence, where the files themselves are silent."""
    if series.licence != "unknown":
        return series
    folders = [path for path in sources if path.is_dir() and series.where.startswith(str(path))]
    if not folders:
        return series
    name = folders[0].resolve().name
    return replace(series, source=name, licence=options.licences.get(name, series.licence))


def _low_dose_partners(series: Sequence[Series]) -> dict[str, Series]:
    """By the name of a full-dose series, the low-dose one of the same slices of the subject."""
    low_dose = {(each.subject, each.task, each.positions): each for each in series if each.low_dose}
    return {
        each.name: low_dose[key]
        for each in series
        if (key := (each.subject, each.task, each.positions)) in low_dose and not each.low_dose
    }


def _write_all(
    series: Sequence[Series], folder: Path, work: _Work, progress: Progress | None, jobs: int
) -> PreparedManifest:
    items: list[Item] = []
    skipped: list[str] = []
    for done, (each, outcome) in enumerate(_outcomes(series, folder, work, jobs), 1):
        items.extend(outcome.items)
        if outcome.reason:
            skipped.append(f"{each.name}: {outcome.reason}")
        if progress:
            progress(done, len(series), each.name)
    if not items:
        raise PrepareError(f"No pair was made; left out: {'; '.join(skipped) or 'nothing'}.")
    manifest = PreparedManifest(
        seed=work.seed,
        operators=work.options.operators(),
        items=tuple(items),
        skipped=tuple(skipped),
    )
    manifest.write(folder)
    return manifest


@dataclass(frozen=True)
class _Outcome:
    """What one series gave, or why it gave nothing."""

    items: tuple[Item, ...] = ()
    reason: str | None = None


def _outcomes(
    series: Sequence[Series], folder: Path, work: _Work, jobs: int
) -> Iterator[tuple[Series, _Outcome]]:
    """The outcome of each series, in the order of the series whoever is first."""
    write = partial(_write_series, folder=folder, work=work)
    if jobs == 1:
        yield from ((each, write(each)) for each in series)
        return
    # Forked children would inherit the locks of PyTorch's threads.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as on:
        # The longest first: what is left at the end is short.
        order = sorted(series, key=lambda each: -_size_of(each))
        running = {each.name: on.submit(write, each) for each in order}
        try:
            yield from ((each, running[each.name].result()) for each in series)
        finally:
            on.shutdown(cancel_futures=True)


def _size_of(series: Series) -> int:
    return series.slices or 0


def _write_series(series: Series, *, folder: Path, work: _Work) -> _Outcome:
    reason = _reason_to_skip(series, work.options)
    if reason:
        return _Outcome(reason=reason)
    try:
        return _Outcome(tuple(_write_pair(folder, pair) for pair in _pairs(series, work)))
    except NoSoftTissueError as error:
        return _Outcome(reason=str(error))


def _reason_to_skip(series: Series, options: PrepareOptions) -> str | None:
    if series.low_dose:
        return "a low-dose acquisition is an input, never a reference"
    if series.noise_hu is not None and series.noise_hu > options.max_noise_hu:
        return f"noise {series.noise_hu} HU is above {options.max_noise_hu} HU"
    return None


def _pairs(series: Series, work: _Work) -> Iterator[_Pair]:
    split = work.splits[series.subject]
    options = work.options
    limit = options.max_slices if split == "train" else None
    hq = _thin(_central(series.volume(), options.central_slices), limit)
    if series.task is RestorationTask.MRI_SR:
        yield _mr_pair(series, split, hq, options.mr)
        # Validation stays one problem, else its figures would mean nothing beside others.
        for factor in options.mr_factors if split == "train" else ():
            pair = _mr_pair(series, split, hq, KSpaceTruncation(factor))
            name = f"{series.name}-x{factor:g}"
            yield replace(pair, item=replace(pair.item, name=name, weight=_FURTHER_FACTOR))
    elif series.task is RestorationTask.PET_SYNTHESIS:
        for name in _draws(series.name, split, options):
            yield _pet_pair(series, name, split, hq, work)
    else:
        if RestorationTask.CT_DENOISE in work.tasks:
            partner = work.low_dose.get(series.name)
            lq = None
            if partner is not None:
                lq = _thin(_central(partner.volume(), options.central_slices), limit)
            yield _ct_pair(series, split, hq, lq, work)
        if RestorationTask.PET_SYNTHESIS in work.tasks and options.simulated_pet:
            for name in _draws(f"{series.name}-fdg", split, options):
                yield _fdg_pair(series, name, split, hq, work)


def _draws(name: str, split: str, options: PrepareOptions) -> list[str]:
    """Names of the scans of one PET series; each name has its own noise."""
    count = options.pet_draws if split == "train" else 1
    return [name, *(f"{name}-scan{draw}" for draw in range(2, count + 1))]


def _central(volume: Volume, count: int | None) -> Volume:
    if count is None or len(volume) <= count:
        return volume
    start = (len(volume) - count) // 2
    return volume[start : start + count]


def _thin(volume: Volume, max_slices: int | None) -> Volume:
    if max_slices is None or len(volume) <= max_slices:
        return volume
    kept: Volume = volume[np.linspace(0, len(volume) - 1, max_slices).round().astype(int)]
    return kept


def _mr_pair(series: Series, split: str, hq: Volume, operator: KSpaceTruncation) -> _Pair:
    lq = operator.apply(hq)
    # The node knows only the low-quality series, so that one sets the scale here too.
    scale = intensity_scale(lq, series.task)
    item = replace(_item(series, split, hq), scale=scale, contrast=series.contrast)
    return _Pair(item, lq * np.float32(scale), hq * np.float32(scale))


def _ct_pair(series: Series, split: str, hq: Volume, acquired: Volume | None, work: _Work) -> _Pair:
    if acquired is not None and acquired.shape != hq.shape:
        raise SourceError(f"{series.where}: the low-dose series has other slices.")
    noise = series.noise_hu or soft_tissue_noise(hq)
    lq = acquired
    if lq is None:
        rng = work.generator(series.name)
        pixel = series.spacing_mm[1]
        lq = work.options.ct.apply(hq, pixel_mm=pixel, noise_hu=noise, rng=rng)
    item = replace(_item(series, split, hq), noise_hu=noise, acquired_lq=acquired is not None)
    return _Pair(item, lq, np.rint(np.clip(hq, -32768, 32767)).astype(np.int16))


def _pet_pair(series: Series, name: str, split: str, suv: Volume, work: _Work) -> _Pair:
    pixel = series.spacing_mm[1]
    suv = np.ascontiguousarray(suv[(slice(None), *body_box(suv))])
    size = _field_of(max(np.hypot(*suv.shape[1:]) + 4, 220 / pixel), series.where)
    activity, attenuation, (rows, columns) = embed_crop(suv, pixel_mm=pixel, size=size)
    lq, hq = work.options.pet.apply(
        activity, attenuation, pixel_mm=pixel, rng=work.generator(name), psf_fwhm_mm=0
    )
    item = replace(_item(series, split, suv), name=name)
    return _Pair(item, lq[:, rows, columns], hq[:, rows, columns])


def _fdg_pair(series: Series, name: str, split: str, hu: Volume, work: _Work) -> _Pair:
    rng = work.generator(name)
    extent = largest_extent_mm(hu.shape, series.spacing_mm)
    pixel = float(rng.choice([3.3, 4.0, 4.7, 5.47]))
    size = _field_of(extent / pixel, series.where)
    activity, attenuation = fdg_from_ct(hu, series.spacing_mm, size=size, pixel_mm=pixel, rng=rng)
    lq, hq = work.options.pet.apply(activity, attenuation, pixel_mm=pixel, rng=rng)
    item = replace(
        _item(series, split, hq),
        name=name,
        task=RestorationTask.PET_SYNTHESIS.value,
        units=spec(RestorationTask.PET_SYNTHESIS).units,
        spacing_mm=(series.spacing_mm[0], pixel, pixel),
        source=f"simulated FDG on {series.source}",
        simulated=True,
    )
    return _Pair(item, lq, hq)


def _field_of(pixels: float, where: str) -> int:
    """The smallest projector grid that holds so many pixels; few sizes share their matrices."""
    for size in _FIELDS:
        if size >= pixels:
            return size
    raise SourceError(f"{where}: {pixels:.0f} pixels exceed the largest PET field.")


def _item(series: Series, split: str, volume: Volume) -> Item:
    slices, rows, columns = volume.shape
    return Item(
        name=series.name,
        task=series.task.value,
        split=split,
        subject=series.subject,
        source=series.source,
        licence=series.licence,
        units=spec(series.task).units,
        spacing_mm=series.spacing_mm,
        hq="",
        lq="",
        shape=(slices, rows, columns),
        simulated=False,
        sha256={},
    )


def _write_pair(folder: Path, pair: _Pair) -> Item:
    names = {kind: f"{pair.item.name}.{kind}.npy" for kind in ("hq", "lq")}
    for kind, volume in (("hq", pair.hq), ("lq", pair.lq)):
        np.save(folder / names[kind], volume, allow_pickle=False)
    hashes = {}
    for kind, name in names.items():
        with (folder / name).open("rb") as file:
            hashes[kind] = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(pair.item, hq=names["hq"], lq=names["lq"], sha256=hashes, shape=pair.lq.shape)
