"""T1 and T2: a fault at every step of receiving, and what is left of the promise behind 0x0000."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import threading
from collections.abc import Generator
from contextlib import closing
from io import BytesIO
from pathlib import Path, PurePosixPath

import pytest
from pynetdicom.dsutils import decode

from tests.integration.conftest import RECEIVE_PATHS, faulty_settings
from tests.integration.faults import Fault, Passing, Step, read_trace
from tests.integration.peers import connected, statuses
from tests.integration.receiver import (
    Template,
    entries,
    peer,
    receiver_template,
    send,
    survives_a_kill,
)
from tests.integration.senders import Auditor, Item, Supply, database_of

# At the second instance: the first shows that it stays.
_SECOND = 2
# The ledger is flushed for the first instance that a series gets by an association.
_OF_EACH = [step for step in Step if step != Step.FLUSH_LEDGER]


@pytest.fixture(scope="module", params=RECEIVE_PATHS)
def template(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Template]:
    """Receivers of the stock path and of the loop, on one spool and ledger for all tests here."""
    folder = tmp_path_factory.mktemp(request.param)
    with receiver_template(faulty_settings(folder, request.param), folder) as made:
        yield made


@pytest.fixture(scope="module")
def supply(tmp_path_factory: pytest.TempPathFactory) -> Supply:
    """Instances that no test here has sent before."""
    return Supply(tmp_path_factory.mktemp("out"), rows=64)


@pytest.fixture
def items(template: Template, supply: Supply) -> Generator[list[Item]]:
    """Three instances to send; a receiver that still runs is ended after the test."""
    yield [supply.take() for _ in range(3)]
    if template.running is not None:
        template.running.kill()


POINTS = [
    (Step.CREATE, "before", "kill"),
    (Step.WRITE, "before", "tear"),
    *[(step, "after", "kill") for step in _OF_EACH if step != Step.CREATE],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "when", "action"), POINTS, ids=[f"{when} {step} {do}" for step, when, do in POINTS]
)
def test_t1_killed_at_a_step_it_has_what_it_acknowledged_and_takes_the_rest_again(
    step: Step, when: str, action: str, template: Template, items: list[Item]
) -> None:
    survives_a_kill(template, Fault(step, action, when, _SECOND), items)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_t1_killed_again_while_it_recovers_it_adopts_an_instance_once(
    when: str, template: Template, items: list[Item]
) -> None:
    auditor = Auditor(template.settings)
    receiver = template.start(Fault(Step.COMMIT, nth=_SECOND))
    send(template, items)
    assert receiver.wait() == -signal.SIGKILL
    assert len(auditor.orphans()) == 1
    # The first commit of a start adopts; the second closes the association that was left open.
    fault = Fault(Step.COMMIT, when=when, nth=1)  # type: ignore[arg-type]
    assert template.launch(fault, at_once=True).wait() == -signal.SIGKILL
    template.start()
    auditor.all_there_once(entries(items[:2]))
    assert auditor.orphans() == set()


@pytest.mark.slow
def test_t1_killed_before_the_series_is_on_disk_it_has_acknowledged_nothing_of_it(
    template: Template, items: list[Item]
) -> None:
    auditor = Auditor(template.settings)
    receiver = template.start(Fault(Step.FLUSH_LEDGER))
    assert send(template, items) == []
    assert receiver.wait() == -signal.SIGKILL
    template.start()
    assert send(template, items) == items
    auditor.all_there_once(entries(items))


def lose_what_was_not_flushed(log: Path, flushed: int, left: str) -> None:
    """What a loss of power may leave of SQLite's log behind the octets that were flushed."""
    data = log.read_bytes()
    assert flushed < len(data), "every row has been flushed"
    lost = len(data) - flushed
    tails = {"cut": b"", "zeros": bytes(lost), "noise": random.Random(4).randbytes(lost)}
    if left in tails:
        log.write_bytes(data[:flushed] + tails[left])
    else:
        log.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("left", ["cut", "zeros", "noise", "nothing at all"])
def test_t1_rows_that_a_loss_of_power_takes_are_made_again_from_the_files(
    left: str, template: Template, items: list[Item]
) -> None:
    """The log of a killed process is cut back to what it had flushed; once, even all is lost."""
    template.trace.unlink(missing_ok=True)
    receiver, auditor = template.start(traced=True), Auditor(template.settings)
    paths = [item.path for item in items]
    with connected(peer(template), paths) as association:
        assert statuses(association, paths) == [0x0000] * 3
        assert receiver.kill() == -signal.SIGKILL
    flushes = [p for p in read_trace(template.trace) if p.step == Step.FLUSH_LEDGER]
    log = Path(f"{database_of(template.settings)}-wal")
    lose_what_was_not_flushed(log, int(flushes[-1].to), left)
    if left in ("cut", "zeros", "noise"):
        rows = auditor.rows()
        assert [item.sop_instance_uid in rows for item in items] == [True, False, False]
    template.start()
    auditor.all_there_once(entries(items))
    assert auditor.orphans() == set()
    if left in ("cut", "zeros", "noise"):
        # By which a route is found, and for the audit trail: the rows that came back name it.
        assert callers(template, items) == ["TESTER"] * 3
    assert send(template, items) == items
    auditor.all_there_once(entries(items))


def callers(template: Template, items: list[Item]) -> list[str]:
    """The calling AE title of the association that each instance came by."""
    query = (
        "SELECT a.calling_ae FROM instances i JOIN associations a ON a.id = i.association_id"
        " WHERE i.sop_instance_uid = ? AND a.outcome = 'lost'"
    )
    with closing(sqlite3.connect(database_of(template.settings), timeout=20)) as ledger:
        found = [ledger.execute(query, (item.sop_instance_uid,)).fetchone() for item in items]
    return [row[0] for row in found if row is not None]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["empty", "half"])
def test_t1_a_file_that_a_loss_of_power_cuts_short_is_never_taken_for_an_instance(
    kept: float, template: Template, items: list[Item]
) -> None:
    """It had its name, and was not yet flushed nor acknowledged."""
    auditor = Auditor(template.settings)
    receiver = template.start(Fault(Step.RENAME, when="after", nth=_SECOND))
    acknowledged = send(template, items)
    assert acknowledged == items[:1]
    assert receiver.wait() == -signal.SIGKILL
    (orphan,) = auditor.orphans()
    file = template.settings.spool.path / orphan
    os.truncate(file, int(kept * file.stat().st_size))
    template.start()
    auditor.nothing_half_written()
    assert auditor.orphans() == set()
    assert auditor.temporary() == []
    auditor.all_there_once(entries(acknowledged))
    assert send(template, items) == items
    auditor.all_there_once(entries(items))


TROUBLES = [
    (Step.CREATE, "EROFS"),
    (Step.CREATE, "EMFILE"),
    (Step.CREATE, "ENOSPC"),
    (Step.WRITE, "ENOSPC"),
    (Step.WRITE, "EIO"),
    (Step.FLUSH_FILE, "EIO"),
    (Step.FLUSH_FILE, "ENOSPC"),
    (Step.RENAME, "EIO"),
    (Step.RENAME, "EROFS"),
    (Step.FLUSH_FOLDER, "EIO"),
    (Step.COMMIT, "locked"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "trouble"), TROUBLES, ids=[f"{trouble} at {step}" for step, trouble in TROUBLES]
)
def test_t2_trouble_of_disk_or_ledger_asks_the_sender_to_wait_and_passes_without_a_restart(
    step: Step, trouble: str, template: Template, items: list[Item]
) -> None:
    auditor = Auditor(template.settings)
    template.start()
    paths = [item.path for item in items]
    with connected(peer(template), paths) as association:
        assert statuses(association, paths[:1]) == [0x0000]
        with template.trouble(step, trouble):
            assert statuses(association, paths[1:]) == [0xA700, 0xA700]
            auditor.nothing_half_written()
            auditor.all_there_once(entries(items[:1]))
        assert statuses(association, paths[1:]) == [0x0000, 0x0000]
    auditor.all_there_once(entries(items))
    assert auditor.orphans() == set()
    assert auditor.temporary() == []
    assert any(
        record["action"] == "instance_refused" and record["level"] == "error"
        for record in map(json.loads, template.log.read_text().splitlines())
    )


def test_t2_a_ledger_that_cannot_be_flushed_asks_the_sender_to_wait(
    template: Template, items: list[Item]
) -> None:
    """The row is committed, but the next loss of power might take what no file tells of."""
    template.start()
    paths = [item.path for item in items]
    with connected(peer(template), paths) as association:
        with template.trouble(Step.FLUSH_LEDGER, "EIO"):
            assert statuses(association, [*paths, paths[0]]) == [0xA700] * 4
        assert statuses(association, paths) == [0x0000] * 3
    Auditor(template.settings).all_there_once(entries(items))


def test_t2_a_ledger_locked_for_a_moment_delays_the_answer_and_no_more(
    template: Template, items: list[Item]
) -> None:
    template.start()
    answers: list[list[int]] = []
    paths = [item.path for item in items]
    with (
        closing(sqlite3.connect(database_of(template.settings))) as other,
        connected(peer(template), paths) as association,
    ):
        other.execute("BEGIN IMMEDIATE")
        sender = threading.Thread(target=lambda: answers.append(statuses(association, paths)))
        sender.start()
        sender.join(0.2)
        assert answers == []
        other.rollback()
        sender.join(20)
    assert answers == [[0x0000] * 3]
    Auditor(template.settings).all_there_once(entries(items))


def test_t1_an_answer_goes_out_after_the_flush_of_bytes_and_name_and_the_commit(
    template: Template, items: list[Item]
) -> None:
    template.trace.unlink(missing_ok=True)
    template.start(traced=True)
    assert send(template, items) == items
    assert_ordered(template, items)


def test_t1_the_order_holds_for_those_who_share_a_commit(
    template: Template, supply: Supply, items: list[Item]
) -> None:
    template.trace.unlink(missing_ok=True)
    template.start(traced=True)
    lots = [items, *([supply.take() for _ in range(6)] for _ in range(3))]
    threads = [threading.Thread(target=send, args=(template, lot)) for lot in lots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert_ordered(template, [item for lot in lots for item in lot])


def assert_ordered(template: Template, items: list[Item]) -> None:
    """What a loss of power could take must not have been acknowledged.

    Before each 0x0000 come, in this order: the last write of the file, its name, its flush, the
    flush of its folder, and a commit.
    """
    trace, rows = read_trace(template.trace), Auditor(template.settings).rows()
    answers = {uid: at for at, uid in _successes(trace)}
    for item in items:
        ((_, path, _),) = rows[item.sop_instance_uid]
        before = trace[: answers[item.sop_instance_uid]]
        (named,) = [
            at for at, p in enumerate(before) if p.step == Step.RENAME and p.to == f"/{path}"
        ]
        draft, folder = before[named].path, str(PurePosixPath(f"/{path}").parent)
        written = max(_places(before, Step.WRITE, draft))
        (flushed,) = _places(before, Step.FLUSH_FILE, draft)
        entered = min(at for at in _places(before, Step.FLUSH_FOLDER, folder) if at > flushed)
        committed = max(_places(before, Step.COMMIT, ""))
        assert written < named < flushed < entered < committed


def _places(trace: list[Passing], step: Step, path: str) -> list[int]:
    return [at for at, passing in enumerate(trace) if (passing.step, passing.path) == (step, path)]


def _successes(trace: list[Passing]) -> Generator[tuple[int, str]]:
    """Where in a trace which SOP Instance is answered 0x0000."""
    for at, passing in enumerate(trace):
        if passing.step == Step.ANSWER:
            response = decode(BytesIO(bytes.fromhex(passing.path)[12:]), True, True)
            if response.Status == 0x0000:
                yield at, str(response.AffectedSOPInstanceUID)
