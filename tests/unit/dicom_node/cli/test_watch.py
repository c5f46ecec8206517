from __future__ import annotations

import io

import pytest
from rich.console import Console

from dicom_node.cli import watch
from dicom_node.errors import LedgerError
from dicom_node.ledger import queue
from tests.factories import make_series
from tests.unit.dicom_node.bench import Bench, Gain


def drawn(node: Bench) -> str:
    screen = io.StringIO()
    Console(file=screen, width=160).print(watch.view(node.ledger, now=node.clock()))
    return screen.getvalue()


def test_a_view_has_the_counts_and_the_newest_jobs(node: Bench) -> None:
    node.receive(make_series("CT", slices=2, rows=16))
    node.tick()
    assert node.worker(Gain()).run_once(node.clock())
    text = drawn(node)
    assert "received 2" in text
    assert "done 1" in text
    assert "ct_denoise" in text
    assert "pacs queued 0/2" in text
    assert "failed" not in text


def test_what_needs_a_person_stands_out(node: Bench) -> None:
    node.receive(make_series("CT", slices=2, rows=16))
    node.tick()
    queue.hold(node.ledger, 1, reason="look", now=node.clock())
    assert watch._count("held", 1) == "[yellow]held 1[/yellow]"
    assert "held 1" in drawn(node)


def test_a_view_of_an_empty_ledger_can_be_drawn(node: Bench) -> None:
    assert "jobs" not in drawn(node)


def test_a_ledger_that_is_away_for_a_moment_does_not_end_the_view(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([LedgerError("ledger: locked"), None, KeyboardInterrupt()])

    def sleep(_: float) -> None:
        monkeypatch.setattr(watch, "view", _failing(next(looks)))

    def _failing(error: BaseException | None) -> object:
        def draw(*_: object, **__: object) -> str:
            if error is not None:
                raise error
            return "drawn again"

        return draw

    monkeypatch.setattr(watch.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch._follow(node.ledger, 1.0)
