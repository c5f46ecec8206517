"""Slices that go through the network again: one by one on a CPU, beside whatever else is done."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from restoration.again import AskedAgain
from restoration.probes import NAMES, Probe
from restoration.restorer import Restorer
from restoration.slices import SliceJob, prepared
from restoration.tasks import RestorationTask
from restoration.volumes import Planes, taken

CT, PET = RestorationTask.CT_DENOISE, RestorationTask.PET_SYNTHESIS


@pytest.fixture
def restorer(bundle: Path) -> Restorer:
    return Restorer.open(bundle, device="cpu")


def head(slices: int, size: int = 48) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    body = np.where(np.hypot(y, x) < 0.4 * size, 40.0, -1000.0)
    noise = np.random.default_rng(0).normal(0, 30, (slices, size, size))
    return (body + noise).astype(np.float32)


def job_of(restorer: Restorer, x: np.ndarray) -> SliceJob:
    return prepared(restorer.manifest, x, CT, None, 1.0, True, None, None)


def test_a_slice_answers_alike_in_any_company(restorer: Restorer) -> None:
    x = head(4)
    made = restorer.restore(x, CT)
    together = restorer.probe(x, made, CT, [0, 3])
    alone = [restorer.probe(x, made, CT, [index]) for index in (0, 3)]
    for name in NAMES:
        assert together[name].slices == (0, 3)
        assert together[name].values == tuple(each[name].values[0] for each in alone), name


def test_a_slice_that_its_volume_is_held_with_answers_alike_in_any_company(
    restorer: Restorer,
) -> None:
    # Slices that are looked at lie far apart: none may be smoothed into the next one.
    held = replace(restorer.manifest, low_frequency={PET.value: (1.5, 1.5, 1.5)})
    restorer = Restorer(held, restorer.network.model, "cpu")
    x = np.abs(head(4)) / 200 * np.array([1, 1, 1, 9], np.float32)[:, None, None]
    made = restorer.restore(x, PET)
    together = restorer.probe(x, made, PET, [0, 3])
    alone = [restorer.probe(x, made, PET, [index]) for index in (0, 3)]
    for name in NAMES:
        assert together[name].values == tuple(each[name].values[0] for each in alone), name


@pytest.mark.usefixtures("two_threads")
def test_of_many_slices_no_more_than_two_threads_take_are_under_way_when_others_may_begin(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, told, reading = head(7), list[int](), list[tuple[int, int]]()

    def counted(volume: Planes, indices: Sequence[int]) -> np.ndarray:
        reading.append((len(indices), threading.get_ident()))
        return taken(volume, indices)

    monkeypatch.setattr("restoration.again.taken", counted)
    asked = AskedAgain(
        restorer.network, x, job_of(restorer, x), range(7), {}, lambda: told.append(0)
    )
    assert len(told) == 5
    found = asked.found()
    assert len(told) == 7
    # One at a time and here: what reads a slice need not be made for several threads.
    assert reading == [(1, threading.get_ident())] * 7
    assert found["idempotence"].slices == tuple(range(7))


def test_what_is_known_is_not_asked(restorer: Restorer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = head(3)
    known: dict[int, Probe] = {
        index: {"idempotence": 0.1 * index, "perturbation": 0.5} for index in (0, 2)
    }
    fresh = restorer.probe(x, restorer.restore(x, CT), CT, [1])
    asked = AskedAgain(restorer.network, x, job_of(restorer, x), [0, 1, 2], known).found()
    assert asked["idempotence"].values == (0.0, *fresh["idempotence"].values, 0.2)

    def never(volume: Planes, indices: Sequence[int]) -> np.ndarray:
        raise AssertionError(f"slices {indices} were read")

    monkeypatch.setattr("restoration.again.taken", never)
    asked = AskedAgain(restorer.network, x, job_of(restorer, x), [0, 2], known).found()
    assert asked["perturbation"].values == (0.5, 0.5)
