"""Slices that are measured by threads, ahead of the series, or again: always the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import get_ident

import numpy as np
import pytest

from restoration.fidelity import Evidence, SliceMeasures, measure, measure_slices
from restoration.tasks import RestorationTask

CT, PET = RestorationTask.CT_DENOISE, RestorationTask.PET_SYNTHESIS


class Going(Mapping[int, SliceMeasures]):
    """Measures of all slices, of which one has gone since it was looked for."""

    def __init__(self, known: Mapping[int, SliceMeasures], gone: int) -> None:
        self._known, self._gone = known, gone

    def __getitem__(self, index: int) -> SliceMeasures:
        if index == self._gone:
            raise KeyError(index)
        return self._known[index]

    def __contains__(self, index: object) -> bool:
        return index in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def pair(slices: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    body = np.where(np.hypot(y, x) < 0.4 * size, 40.0, 2.0)
    noise = np.random.default_rng(0).normal(0, 3, (slices, size, size))
    return (body + noise).astype(np.float32), (body + 0.4 * noise).astype(np.float32)


@pytest.mark.usefixtures("two_threads")
def test_a_slice_whose_measures_have_gone_is_measured_again_alike() -> None:
    before, after = pair(3, 512)
    known = {i: measure_slices(before[i : i + 1], after[i : i + 1], CT)[0] for i in range(3)}
    fresh = measure(before, after, CT)
    for measured in (known, Going(known, gone=1)):
        assert measure(before, after, CT, evidence=Evidence(measured=measured)) == fresh


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("task", [CT, PET])
def test_progress_is_told_by_who_asked_slice_by_slice(task: RestorationTask) -> None:
    before, after = pair(20, 192)
    told: list[tuple[int, int, int]] = []
    measure(before, after, task, progress=lambda *step: told.append((*step, get_ident())))
    assert told == [(done, 20, get_ident()) for done in range(1, 21)]


@pytest.mark.usefixtures("two_threads")
def test_values_that_are_not_finite_are_counted_where_they_are() -> None:
    before, after = pair(20, 192)
    after[13, 5, 7:9] = np.nan
    after[2, 0, 0] = np.inf
    finite = measure(before, after, PET)["finite"].values
    assert finite == tuple({2: 1.0, 13: 2.0}.get(index, 0.0) for index in range(20))
