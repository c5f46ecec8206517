"""A commit of another connection ends a wait, and nothing else does before its time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from dicom_node.ledger import destinations
from dicom_node.ledger.changes import Changes
from dicom_node.ledger.tables import open_ledger

LONG = 60.0


def test_a_commit_elsewhere_ends_the_wait(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    mine, theirs = open_ledger(url), open_ledger(url)
    changes, stop = Changes(mine), threading.Event()
    try:
        changes.wait(stop, LONG)  # the first look knows no earlier one
        waiter = threading.Thread(target=changes.wait, args=(stop, LONG))
        waiter.start()
        waiter.join(0.3)
        assert waiter.is_alive()
        destinations.pause(theirs, "pacs", reason="a test", now=1.0)
        waiter.join(LONG / 2)
        assert not waiter.is_alive()
        # What is committed while nobody waits ends the next wait.
        destinations.resume(theirs, "pacs", now=2.0)
        begun = time.monotonic()
        changes.wait(stop, LONG)
        assert time.monotonic() - begun < LONG / 2
    finally:
        mine.dispose()
        theirs.dispose()


def test_a_wait_ends_by_itself_and_when_it_is_stopped(tmp_path: Path) -> None:
    engine = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    changes, stop = Changes(engine), threading.Event()
    try:
        changes.wait(stop, LONG)
        begun = time.monotonic()
        changes.wait(stop, 0.2)
        assert time.monotonic() - begun >= 0.2
        stop.set()
        changes.wait(stop, LONG)
        assert time.monotonic() - begun < LONG / 2
        stop.clear()
        engine.dispose()  # a connection that is gone is made anew
        changes.wait(stop, 0.3)
    finally:
        engine.dispose()
