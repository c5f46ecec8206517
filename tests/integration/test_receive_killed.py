"""T1: a receive process is killed under real senders, again and again, and nothing is lost.

`make kill-test KILLS=300` runs it longer; DICOM_NODE_TEST_KILLS and DICOM_NODE_TEST_SEED set both.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from dicom_node.cli.starter import DEFAULT_ROUTES
from tests.integration.conftest import RECEIVE_PATHS, ROOMY, node_settings
from tests.integration.peers import until
from tests.integration.receiver import Template, receiver_template
from tests.integration.senders import Auditor, Books, Sender, Storescu, Supply

KILLS = int(os.environ.get("DICOM_NODE_TEST_KILLS", "12"))
SEED = int(os.environ.get("DICOM_NODE_TEST_SEED", "4"))
SENDERS = 3
# The longest life of a receiver after its first acknowledgement, in seconds.
LONGEST_S = 0.25


@pytest.fixture(params=RECEIVE_PATHS)
def template(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Template]:
    """Receivers of each way to receive, on a spool and a ledger that stay."""
    settings = node_settings(
        tmp_path,
        association=RECEIVE_PATHS[request.param],
        spool=ROOMY | {"path": tmp_path / "spool"},
        janitor={"stale_file_s": 0.001},
        log={"level": "ERROR"},
        routes=tmp_path / "routes.toml",
    )
    settings.routes.write_text(DEFAULT_ROUTES)
    with receiver_template(settings, tmp_path) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [Sender, pytest.param(Storescu, marks=pytest.mark.dcmtk)],
    ids=["pynetdicom", "storescu"],
)
# pynetdicom forgets the socket of a connection that is refused.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
# Against a hang alone: a start takes some seconds where others have the machine too.
@pytest.mark.timeout(60 + 15 * KILLS)
def test_t1_killed_at_random_under_real_senders_it_loses_nothing_it_acknowledged(
    kind: type[Sender] | type[Storescu],
    template: Template,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    supply, books, auditor = Supply(tmp_path / "out", rows=128), Books(), Auditor(template.settings)
    chance, counts = random.Random(SEED), Counter[str]()
    senders = [kind(supply, books, template.port, f"SENDER{n}") for n in range(SENDERS)]
    receiver = template.start()
    for sender in senders:
        sender.start()
    for _ in range(KILLS):
        before = len(books.acknowledged)
        until(lambda known=before: len(books.acknowledged) > known, "an acknowledgement", 60)
        threading.Event().wait(chance.uniform(0, LONGEST_S))
        known = books.entries()
        assert receiver.kill() == -signal.SIGKILL
        auditor.nothing_half_written()
        counts["half-written, never visible"] += len(auditor.temporary())
        counts["whole, without a row"] += len(auditor.orphans())
        auditor.all_there_once(known)
        receiver = template.start()
    for sender in senders:
        sender.stop()
    assert receiver.end() == 0
    counts["acknowledged"] = auditor.all_there_once(books.entries())
    counts["sent again"] = books.again
    auditor.nothing_half_written()
    assert books.failures == Counter()
    assert auditor.orphans() == set()
    assert auditor.temporary() == []
    assert {row[0] for rows in auditor.rows().values() for row in rows} == {"received"}
    with capsys.disabled():
        print(f"\n{KILLS} kills under {kind.__name__} (seed {SEED}): {_words(counts)}")


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())
