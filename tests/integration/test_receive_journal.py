"""T1 and T2 with the journal: one flush for all that wait, and what a loss of power leaves."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

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

_SECOND = 2


@pytest.fixture(scope="module", params=RECEIVE_PATHS)
def template(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Template]:
    """Receivers of the stock path and of the loop with a journal, on one spool and ledger."""
    folder = tmp_path_factory.mktemp(request.param)
    with receiver_template(faulty_settings(folder, request.param, 4 << 20), folder) as made:
        yield made


@pytest.fixture(scope="module")
def supply(tmp_path_factory: pytest.TempPathFactory) -> Supply:
    """Instances that no test here has sent before."""
    return Supply(tmp_path_factory.mktemp("out"), rows=64, first=5_000_000)


@pytest.fixture
def items(template: Template, supply: Supply) -> Generator[list[Item]]:
    """Three instances to send; a receiver that still runs is ended after the test."""
    yield [supply.take() for _ in range(3)]
    if template.running is not None:
        template.running.kill()


POINTS = [
    (Step.CREATE, "before", "kill"),
    (Step.WRITE, "before", "tear"),
    (Step.RENAME, "after", "kill"),
    (Step.FLUSH_JOURNAL, "before", "kill"),
    (Step.FLUSH_JOURNAL, "after", "kill"),
    (Step.COMMIT, "after", "kill"),
    (Step.ANSWER, "after", "kill"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "when", "action"), POINTS, ids=[f"{when} {step} {do}" for step, when, do in POINTS]
)
def test_t1_killed_at_a_step_it_has_what_it_acknowledged_and_takes_the_rest_again(
    step: Step, when: str, action: str, template: Template, items: list[Item]
) -> None:
    survives_a_kill(template, Fault(step, action, when, _SECOND), items)  # type: ignore[arg-type]


LOSSES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def received_and_not_settled(template: Template, items: list[Item]) -> list[Path]:
    """Send instances to a receiver whose disk takes no flush of a file, and kill it; the files."""
    template.trace.unlink(missing_ok=True)
    receiver = template.start(traced=True)
    paths = [item.path for item in items]
    with (
        connected(peer(template), paths) as association,
        template.trouble(Step.FLUSH_FILE, "EIO"),
    ):
        assert statuses(association, paths) == [0x0000] * 3
        assert receiver.kill() == -signal.SIGKILL
    named = [p.to for p in _since_the_first(read_trace(template.trace)) if p.step == Step.RENAME]
    assert len(named) == 3
    return [Path(f"{template.settings.spool.path}{file}") for file in named]


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["kept", "lost"])
@pytest.mark.parametrize("loss", LOSSES)
def test_t1_files_that_a_loss_of_power_takes_come_back_from_the_journal(
    loss: str, rows: str, template: Template, items: list[Item]
) -> None:
    """What was answered had been flushed to the journal, and nowhere else."""
    auditor = Auditor(template.settings)
    for file in received_and_not_settled(template, items):
        LOSSES[loss](file)
    if rows == "lost":
        flushed = [p for p in read_trace(template.trace) if p.step == Step.FLUSH_LEDGER][-1]
        os.truncate(f"{database_of(template.settings)}-wal", int(flushed.to))
    template.start()
    auditor.nothing_half_written()
    auditor.all_there_once(entries(items))
    assert auditor.orphans() == set()
    assert send(template, items) == items
    auditor.all_there_once(entries(items))


@pytest.mark.slow
def test_t1_killed_while_it_gives_back_it_gives_back_all_at_the_next_start(
    template: Template, items: list[Item]
) -> None:
    auditor = Auditor(template.settings)
    for file in received_and_not_settled(template, items):
        file.unlink()
    assert template.launch(Fault(Step.RENAME, nth=_SECOND), at_once=True).wait() == -signal.SIGKILL
    template.start()
    auditor.all_there_once(entries(items))
    assert auditor.orphans() == set()


def test_t2_a_journal_that_cannot_be_flushed_leaves_each_file_to_its_own_flush(
    template: Template, items: list[Item]
) -> None:
    template.trace.unlink(missing_ok=True)
    template.start(traced=True)
    paths = [item.path for item in items]
    with connected(peer(template), paths) as association:
        with template.trouble(Step.FLUSH_JOURNAL, "EIO"):
            assert statuses(association, paths[:1]) == [0x0000]
        assert statuses(association, paths[1:]) == [0x0000] * 2
    trace = _since_the_first(read_trace(template.trace))
    assert _places(trace, Step.FLUSH_JOURNAL) == []
    _assert_each(trace, Step.FLUSH_FILE, of_draft=True)
    Auditor(template.settings).all_there_once(entries(items))
    actions = [json.loads(line)["action"] for line in template.log.read_text().splitlines()]
    assert "journal_failed" in actions


def test_t1_an_answer_goes_out_after_the_flush_of_the_journal_and_the_commit(
    template: Template, supply: Supply, items: list[Item]
) -> None:
    """With four senders at once as with one."""
    template.trace.unlink(missing_ok=True)
    template.start(traced=True)
    lots = [items, *([supply.take() for _ in range(6)] for _ in range(3))]
    threads = [threading.Thread(target=send, args=(template, lot)) for lot in lots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    _assert_each(_since_the_first(read_trace(template.trace)), Step.FLUSH_JOURNAL, of_draft=False)
    Auditor(template.settings).all_there_once(entries([item for lot in lots for item in lot]))


def _assert_each(trace: list[Passing], flush: Step, *, of_draft: bool) -> None:
    """Between the name of a file and the next answers to as many lies its flush, then a commit.

    Each association is answered before it goes on, so that of the names so far no more than the
    answers so far may be without a flush.
    """
    names = [(at, p.path) for at, p in enumerate(trace) if p.step == Step.RENAME]
    answers = _places(trace, Step.ANSWER)
    assert len(names) == len(answers) > 0
    for (named, draft), answered in zip(names, answers, strict=True):
        flushed = [
            at
            for at in _places(trace[:answered], flush)
            if at > named and (not of_draft or trace[at].path == draft)
        ]
        assert flushed, "answered before its bytes were flushed"
        assert any(at > flushed[0] for at in _places(trace[:answered], Step.COMMIT))


def _since_the_first(trace: list[Passing]) -> list[Passing]:
    """The trace without the start, which prepares the journal."""
    first = _places(trace, Step.CREATE)[0]
    return trace[first:]


def _places(trace: list[Passing], step: Step) -> list[int]:
    return [at for at, passing in enumerate(trace) if passing.step == step]
