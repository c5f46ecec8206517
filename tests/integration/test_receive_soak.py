"""T13: hours of traffic with a schedule of faults; memory, threads and descriptors stay.

`make soak MINUTES=20` runs it for so long; without it a few seconds keep it from rotting.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.storage_scu import echo
from tests.integration.conftest import RECEIVE_PATHS, node_settings
from tests.integration.faults import Step
from tests.integration.peers import Peer, until
from tests.integration.receiver import Receiver, Template, receiver_template
from tests.integration.senders import Auditor, Books, Sender, Supply
from tests.integration.wire import Wire, association_request, store_request

MINUTES = float(os.environ.get("DICOM_NODE_TEST_SOAK_MINUTES", "0.1"))
PERIOD_S = min(10.0, 12 * MINUTES)
MEBIBYTE = 1 << 20


@dataclass
class Life:
    """What one receive process used, in bytes and numbers, once in each period."""

    resident: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def look(self, receiver: Receiver) -> None:
        """Take a sample."""
        self.resident.append(receiver.resident_bytes())
        self.threads.append(receiver.threads())
        self.descriptors.append(receiver.descriptors())

    @property
    def tenths(self) -> list[int]:
        """Resident bytes after each tenth of its life."""
        return self.resident[:: max(1, len(self.resident) // 10)]

    @property
    def growth(self) -> int:
        """Resident bytes at the end above those after the first tenth of its life."""
        return self.resident[-1] - self.resident[len(self.resident) // 10]


@pytest.fixture(params=RECEIVE_PATHS)
def template(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Template]:
    """Receivers of the stock path and of the loop."""
    settings = node_settings(
        tmp_path,
        association={**RECEIVE_PATHS[request.param], "acse_timeout_s": 5.0},
        spool={"path": tmp_path / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        janitor={"stale_file_s": 0.001},
        log={"level": "ERROR"},
        routes=tmp_path / "routes.toml",
    )
    settings.routes.write_text(DEFAULT_ROUTES)
    with receiver_template(settings, tmp_path) as made:
        yield made


@pytest.mark.slow
@pytest.mark.soak
# pynetdicom forgets the socket of a connection that is refused.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(120 + 200 * MINUTES)
def test_t13_a_long_run_with_faults_and_rude_peers_loses_nothing_and_does_not_grow(
    template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books, auditor, lives = Books(), Auditor(template.settings), [Life(), Life()]
    sizes = {"SMALL": 64, "MIDDLE": 128, "LARGE": 256}
    supplies = [
        Supply(tmp_path / name, rows=rows, first=number * 10**9)
        for number, (name, rows) in enumerate(sizes.items())
    ]
    senders = [
        Sender(supply, books, template.port, name)
        for supply, name in zip(supplies, sizes, strict=True)
    ]
    receiver = template.start()
    for sender in senders:
        sender.start()
    slowest = 0.0
    for number, life in enumerate(lives):
        until(lambda: books.acknowledged, "an acknowledgement", 60)
        slowest = max(slowest, _live(template, receiver, life))
        known = books.entries()
        if number == 0:
            receiver.kill()
            auditor.all_there_once(known)
            receiver = template.start()
    for sender in senders:
        sender.stop()
    assert receiver.end() == 0
    assert auditor.all_there_once(books.entries()) == len(books.acknowledged)
    auditor.nothing_half_written()
    assert set(books.failures) <= {0xA700}
    assert auditor.orphans() == set()
    with capsys.disabled():
        print(f"\n{_words(books, lives, slowest)}")
    assert max(life.growth for life in lives) <= 20 * MEBIBYTE
    assert max(max(life.threads) for life in lives) < 60
    assert max(max(life.descriptors) for life in lives) < 120


def _live(template: Template, receiver: Receiver, life: Life) -> float:
    """Half of the run: in each period rude peers, a full disk and an echo; the slowest echo."""
    slowest, end = 0.0, time.monotonic() + 30 * MINUTES
    for number, peers in enumerate(_rude_peers(template.port)):
        if time.monotonic() > end:
            return slowest
        with ExitStack() as held:
            for peer in peers:
                held.enter_context(peer())
            if number % 3 == 2:
                with template.trouble(Step.WRITE, "ENOSPC"):
                    threading.Event().wait(min(1.0, PERIOD_S / 10))
            answer = echo(Peer("DIFFCODE", "127.0.0.1", template.port, "ECHO"))
            assert answer.ok, answer.words
            slowest = max(slowest, answer.seconds)
        life.look(receiver)
        threading.Event().wait(PERIOD_S / 2)
    return slowest


def _rude_peers(port: int) -> Generator[list[Callable[[], Wire]]]:
    """For ever, one company of rude peers after another."""

    def silent() -> Wire:
        return Wire(port)

    def garbage() -> Wire:
        wire = Wire(port)
        wire.send(b"GET / HTTP/1.1\r\n\r\n")
        return wire

    def half_a_request() -> Wire:
        wire = Wire(port)
        wire.send(association_request()[:70])
        return wire

    def half_an_instance() -> Wire:
        wire = Wire(port)
        wire.associate()
        wire.send(b"".join(store_request(bytes(5000), "1.2.3"))[:3000])
        return wire

    while True:
        yield [silent] * 10
        yield [garbage, half_a_request] * 3
        yield [half_an_instance] * 3


def _words(books: Books, lives: list[Life], slowest: float) -> str:
    memory = "; ".join(
        " ".join(f"{size / MEBIBYTE:.0f}" for size in life.tenths)
        + f" (growth {life.growth / MEBIBYTE:+.1f})"
        for life in lives
    )
    return (
        f"{MINUTES:g} minutes: {len(books.acknowledged)} instances acknowledged and audited, "
        f"{books.failures[0xA700]} answered 0xA700 and {books.again} cut off, all sent again; "
        f"MiB of the two lives in tenths {memory}; slowest C-ECHO {slowest:.2f} s; "
        f"threads at most {max(max(life.threads) for life in lives)}, "
        f"descriptors at most {max(max(life.descriptors) for life in lives)}"
    )
