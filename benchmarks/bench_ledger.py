"""The ledger at 100,000 instances of 400 series: listings, the live view, claims, intake.

    .ci/postgres python -m benchmarks.bench_ledger [--quick] [--write]

SQLite, and PostgreSQL where DICOM_NODE_TEST_POSTGRES names a server, side by side. One series goes
through the ledger's own functions to its end; its rows are then copied under new keys until the
ledger has its size, so that the tables hold what the program writes. Each figure is the work of
this process and the database for one call, without the start of a program. --write puts the
tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import Engine, Integer, Table, create_engine, func, insert, make_url, select, text

from benchmarks import report
from dicom_node.breaker import Rule
from dicom_node.cli.watch import view
from dicom_node.ledger import answers, intake, queue, reports, retention, tables
from dicom_node.ledger.intake import ReceivedInstance
from dicom_node.ledger.states import Verdict
from dicom_node.ledger.tables import DeliveryState, SeriesState, open_ledger, writing

ROOT = "1.2.826.0.1.3680043.10.511.4"
CT = "1.2.840.10008.5.1.4.1.1.2"
NOW = 1_700_000_000.0
INSTANCES = 250
# The commands of an operator may take so long, in milliseconds.
LIMIT_MS = 200.0


@dataclass(frozen=True)
class Task:
    """One thing that is measured; *limit_ms* is a promise."""

    name: str
    call: Callable[[Engine], object]
    times: int
    limit_ms: float | None = None


@dataclass(frozen=True)
class Figures:
    """Milliseconds of one task."""

    median: float
    worst: float
    cpu: float  #: of this process, median


def received(series: str, number: int) -> ReceivedInstance:
    """The CT slice of that number."""
    name = f"{series}.{number}"
    return ReceivedInstance(
        name, CT, ROOT, series, "CT", "1.2.840.10008.1.2.1",
        f"incoming/00/{name}.dcm", f"{hash(name) & (1 << 256) - 1:064x}", 526_000,
    )  # fmt: skip


def one_series(engine: Engine, series: str, *, done: bool) -> None:
    """A series as the program leaves it: delivered, or with its job in the queue."""
    association = intake.open_association(
        engine, calling_ae="CT1", called_ae="DIFFCODE", address="10.0.0.1", now=NOW
    )
    group = [
        received(series, number).__class__(
            **{**vars(received(series, number)), "association_id": association}
        )
        for number in range(INSTANCES)
    ]
    intake.record_instances(engine, group, NOW)
    intake.close_association(engine, association, "released", NOW)
    job = queue.NewJob(
        series, "", "ct_denoise", ("pacs",), tuple(i.sop_instance_uid for i in group), "ct"
    )
    queue.enqueue(
        engine, series, series_state=SeriesState.COMPLETE, reason=None, jobs=[job],
        instances_seen=INSTANCES, now=NOW,
    )  # fmt: skip
    if not done:
        return
    claimed = queue.claim(engine, "bench", lease_s=60, now=NOW)
    assert claimed is not None
    outputs = [
        queue.Output(
            f"{each.sop_instance_uid}.9", CT, each.sop_instance_uid,
            f"outgoing/{each.sop_instance_uid}.9.dcm", each.sha256, each.size,
        )
        for each in group
    ]  # fmt: skip
    judged = queue.Judged(
        modality="CT", model_sha256="a" * 64, failed=False, verdicts={"pacs": Verdict.PASS},
        reason=None, readings=(), breaker=Rule(window=50, lowest=0.0, highest=0.05,
        significance=0.001),
    )  # fmt: skip
    queue.finish(
        engine, claimed.id, "bench", judged=judged, outputs=outputs,
        derived_series_instance_uid=f"{series}.9", model_sha256="a" * 64,
        seconds={"load": 1.0, "restore": 9.0, "derive": 1.0}, note=None, now=NOW + 11,
    )  # fmt: skip
    delivery = queue.claim_delivery(engine, "bench", lease_s=60, now=NOW + 12)
    assert delivery is not None
    for item in delivery.items:
        answers.record_sent(engine, delivery.id, (item.sop_instance_uid, 0, "delivered"), NOW + 13)
    queue.conclude_delivery(
        engine, delivery.id, "bench", state=DeliveryState.DELIVERED, reason=None,
        next_attempt=None, now=NOW + 14,
    )  # fmt: skip


class Copies:
    """Copies of all rows of a small ledger, under keys of their own."""

    def __init__(self, engine: Engine) -> None:
        self._tables = list(tables.metadata.sorted_tables)
        with engine.connect() as connection:
            self._rows = {
                table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
                for table in self._tables
            }
            self._strides = {
                table.name: (connection.scalar(select(func.max(table.c.id))) or 0)
                for table in self._tables
                if _has_number(table)
            }

    def add(self, engine: Engine, numbers: Sequence[int]) -> None:
        """Write the copies of these numbers."""
        with writing(engine) as connection:
            for table in self._tables:
                keys = [column.name for column in table.primary_key]
                rows = [
                    made
                    for number in numbers
                    for row in self._rows[table.name]
                    # One row for all, as a circuit breaker's, has no copy.
                    if any(
                        (made := self._copy(table, row, number))[key] != row[key] for key in keys
                    )
                ]
                if rows:
                    connection.execute(insert(table), rows)

    def settle(self, engine: Engine) -> None:
        """Let PostgreSQL know how far its keys have come, and what is in its tables."""
        if engine.dialect.name != "postgresql":
            return
        with writing(engine) as connection:
            for name in self._strides:
                highest = f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), max(id)) "
                connection.execute(text(f"{highest} FROM {name} HAVING max(id) IS NOT NULL"))
            connection.execute(text("ANALYZE"))

    def _copy(self, table: Table, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        made = dict(row)
        for column in table.columns:
            value, refers = row[column.name], next(iter(column.foreign_keys), None)
            if isinstance(column.type, Integer) and refers is not None and value is not None:
                made[column.name] = value + number * self._strides[refers.column.table.name]
            elif column.name == "id" and table.name in self._strides:
                made["id"] = value + number * self._strides[table.name]
            elif isinstance(value, str) and ROOT in value and value != ROOT:
                made[column.name] = value.replace(f"{ROOT}.", f"{ROOT}.{number + 1}0")
        if table.name == "events" and row["entity"] in _NUMBERED:
            stride = self._strides[_NUMBERED[row["entity"]]]
            made["entity_id"] = str(int(row["entity_id"]) + number * stride)
        return made


# The tables whose keys stand in the history as numbers.
_NUMBERED = {
    "association": "associations",
    "job": "jobs",
    "delivery": "deliveries",
    "instance": "instances",
}


def _has_number(table: Table) -> bool:
    return "id" in table.c and isinstance(table.c.id.type, Integer)


def fill(engine: Engine, series: int, queued: int) -> None:
    """Bring an empty ledger to its size: delivered series, and some that wait for a worker."""
    one_series(engine, f"{ROOT}.1", done=True)
    done = Copies(engine)
    done.add(engine, range(1, series - queued))
    # Beside the delivered: a second small ledger would have the same keys.
    done.settle(engine)
    for number in range(queued):
        one_series(engine, f"{ROOT}.2{number:03d}", done=False)
    done.settle(engine)


def tasks(limit: bool) -> list[Task]:
    """What is measured on a full ledger; the promises are those of the issue."""
    promise = LIMIT_MS if limit else None
    return [
        Task("`jobs list`", lambda e: reports.jobs(e), 10, promise),
        Task("`jobs list --limit 20`", lambda e: reports.jobs(e, limit=20), 20, promise),
        Task("`jobs list --state queued`", lambda e: reports.jobs(e, state="queued"), 20, promise),
        Task("`watch`, one view", lambda e: _draw(e), 10, promise),
        Task("`series list`", lambda e: reports.series(e), 10, promise),
        Task("`deliveries list`", lambda e: reports.deliveries(e), 10, promise),
        Task("`instances list --limit 100`", lambda e: reports.instances(e, limit=100), 10),
        Task("`stats`", lambda e: reports.stats(e), 10, promise),
        Task("`jobs show`", lambda e: reports.job(e, 7), 10, promise),
        Task("`instances show`", lambda e: reports.instance(e, f"{ROOT}.1.7"), 10, promise),
        Task("`purge --dry-run`, nothing may go", lambda e: _removable(e, NOW), 5),
        Task("janitor: the next 1000 that may go", lambda e: _removable(e, NOW + 100), 5),
    ]


def _removable(engine: Engine, before: float) -> None:
    retention.removable(engine, retention.Ages(before, None, None), limit=1000)


def _draw(engine: Engine) -> None:
    Console(file=io.StringIO(), width=160).print(view(engine, now=time.time()))


def steps() -> list[Task]:
    """What must not depend on the size of the ledger."""
    count = iter(range(10**9))

    def arrive(engine: Engine) -> None:
        intake.record_instances(engine, [received(f"{ROOT}.3", next(count))], NOW)

    def claim(engine: Engine) -> None:
        job = queue.claim(engine, "bench", lease_s=60, now=NOW + 100)
        assert job is not None
        assert queue.retry_later(engine, job.id, "bench", "bench", 0, NOW, max_attempts=10**6)

    def idle(engine: Engine) -> None:
        assert queue.claim(engine, "bench", lease_s=60, now=0) is None

    return [
        Task("claim a job and give it back", claim, 60),
        Task("ask for a job when none is due", idle, 60),
        Task(
            "ask for a delivery when none is due",
            lambda e: queue.claim_delivery(e, "bench", lease_s=60, now=NOW + 100),
            60,
        ),
        Task("look at the open series", lambda e: intake.series_progress(e), 30),
        Task("record one instance", arrive, 60),
    ]


def measure(engine: Engine, task: Task) -> Figures:
    """Call a task some times; the first, which compiles statements, is not counted."""
    task.call(engine)
    took, worked = [], []
    for _ in range(task.times):
        started, before = time.perf_counter(), time.process_time()
        task.call(engine)
        worked.append((time.process_time() - before) * 1e3)
        took.append((time.perf_counter() - started) * 1e3)
    return Figures(statistics.median(took), max(took), statistics.median(worked))


@contextmanager
def ledgers(folder: Path, number: int) -> Iterator[dict[str, Engine]]:
    """An empty ledger of each kind."""
    with ExitStack() as stack:
        made = {"SQLite": open_ledger(f"sqlite:///{folder / f'{number}.sqlite'}")}
        if server := os.environ.get("DICOM_NODE_TEST_POSTGRES"):
            made["PostgreSQL"] = open_ledger(stack.enter_context(_schema(server)))
        for engine in made.values():
            stack.callback(engine.dispose)
        yield made


@contextmanager
def _schema(server: str) -> Iterator[str]:
    schema = f"bench_{uuid.uuid4().hex}"
    admin = create_engine(server)
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    url = make_url(server).update_query_dict({"options": f"-csearch_path={schema}"})
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        with admin.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        admin.dispose()


def run(folder: Path, sizes: Sequence[int]) -> tuple[list[str], list[str]]:
    """The tables, and what breaks a promise."""
    listings: dict[tuple[str, str], Figures] = {}
    scaling: dict[tuple[str, int, str], Figures] = {}
    broken: list[str] = []
    kinds: list[str] = []
    for size in sizes:
        with ledgers(folder, size) as engines:
            kinds = list(engines)
            for kind, engine in engines.items():
                fill(engine, size, queued=max(1, size // 10))
                for task in steps():
                    scaling[task.name, size, kind] = measure(engine, task)
                for task in tasks(limit=True) if size == sizes[-1] else []:
                    found = listings[task.name, kind] = measure(engine, task)
                    if task.limit_ms is not None and found.median > task.limit_ms:
                        broken.append(f"{task.name} on {kind}: {found.median:.0f} ms")
    head = f"### {sizes[-1]} series, {sizes[-1] * INSTANCES} instances: what an operator asks"
    rows = [(task.name, [listings[task.name, kind] for kind in kinds]) for task in tasks(True)]
    first = _table(head, kinds, rows)
    columns = [f"{kind}, {size} series" for size in sizes for kind in kinds]
    rows = [
        (task.name, [scaling[task.name, size, kind] for size in sizes for kind in kinds])
        for task in steps()
    ]
    second = _table(f"### What must not grow, at {INSTANCES} instances a series", columns, rows)
    return [first, second], broken


def _table(head: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Figures]]]) -> str:
    lines = [
        head,
        "",
        "Milliseconds of one call: median / worst, CPU of this process (PostgreSQL has its own).",
        "",
        f"| call | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, figures in rows:
        cells = " | ".join(
            f"{each.median:.1f} / {each.worst:.1f}, {each.cpu:.1f}" for each in figures
        )
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and end with 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    given = parser.parse_args()
    sizes = (4, 40) if given.quick else (4, 40, 400)
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="bench-ledger-"))
    try:
        found, broken = run(folder, sizes)
    finally:
        shutil.rmtree(folder)
    print("\n".join(found))
    if given.write:
        words = " ".join(["python -m benchmarks.bench_ledger", *sys.argv[1:]])
        page = Path(__file__).with_name("RESULTS.md")
        report.write(page, found, f".ci/postgres {words}", load, report.LEDGER)
    if broken:
        raise SystemExit(f"slower than {LIMIT_MS:.0f} ms: " + "; ".join(broken))


if __name__ == "__main__":
    main()
