"""Many mutants: `python -m tests.conformance.fuzz --each 5000`, or `make fuzz-derived`.

The work is cut into turns of a hundred mutants. What a turn came to is written down when it ends,
so a run that was stopped goes on where it was; several runs side by side share the turns, each of
which is locked while it runs. A mutant that fails is kept, with its files and the traceback, and
the run goes on; the exit status says that there was one. A turn that was run with other code than
the present one counts, and the summary says how many those are; --again forgets all of them.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

from tests.conformance import mutants

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("DICOM_NODE_FUZZ_FOLDER", ROOT / "build/fuzz")) / "derived"
TURN = 100


@dataclass(frozen=True)
class Turn:
    """What became of some mutants: outcomes by state, and the numbers of those that failed."""

    source: str
    mutants: int
    states: Mapping[str, int]
    findings: tuple[int, ...]
    seconds: float
    code: str  # digest of what was tested


def turn(name: str, numbers: range, work: Path, seed: int = mutants.SEED) -> Turn | None:
    """Put the mutants of some numbers through, once; None where another run is at it."""
    path = work / f"seed-{seed}" / name / f"{numbers.start:06}-{numbers.stop - 1:06}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(path) as file:
        if file is None:
            return None
        if (done := _written(file)) is not None:
            return done
        done = _put_through(name, numbers, work, seed)
        file.seek(0)
        file.truncate()
        json.dump(asdict(done), file)
        return done


@contextmanager
def claimed(path: Path) -> Generator[TextIO | None]:
    """The file at a path, locked until it is closed; None where another has it."""
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def _written(file: TextIO) -> Turn | None:
    file.seek(0)
    try:
        fields = json.load(file)
    except ValueError:
        return None
    return Turn(**{**fields, "findings": tuple(fields["findings"])})


def _put_through(name: str, numbers: range, work: Path, seed: int) -> Turn:
    states: Counter[str] = Counter()
    findings: list[int] = []
    started = time.monotonic()
    for number in numbers:
        with tempfile.TemporaryDirectory(dir=_memory()) as name_of_folder:
            folder = Path(name_of_folder)
            try:
                states += mutants.put_through(name, number, folder, seed)
            except KeyboardInterrupt:
                raise
            except BaseException:  # a panic of a decoder in Rust is no Exception
                findings.append(number)
                _keep(folder, work / "findings" / f"seed-{seed} {name} {number}")
    seconds = round(time.monotonic() - started, 1)
    return Turn(name, len(numbers), dict(states), tuple(findings), seconds, code())


def _memory() -> Path | None:
    """A file system in memory where there is one: nothing here need outlive the machine."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else None


def _keep(folder: Path, target: Path) -> None:
    (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    shutil.copytree(folder, target, dirs_exist_ok=True)


@cache
def code() -> str:
    """A digest of the code that makes derived images and of that which holds them to account."""
    digest = hashlib.sha256()
    tested = (ROOT / "dicom_node/dicom").glob("*.py")
    holding = (ROOT / "tests/conformance" / each for each in ("mutants.py", "checks.py"))
    for path in sorted([*tested, *holding]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def campaign(names: Sequence[str], each: int, jobs: int, seed: int) -> Iterator[Turn]:
    """Every turn as it ends, the sources side by side, so that a short run has seen all of them."""
    ranges = [range(first, min(first + TURN, each)) for first in range(0, each, TURN)]
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_strict) as pool:
        waiting = [
            pool.submit(turn, name, numbers, WORK, seed) for numbers in ranges for name in names
        ]
        try:
            for each_turn in waiting:
                if (done := each_turn.result()) is not None:
                    yield done
        finally:  # stopped by a person: those that run end, the others wait for the next run
            pool.shutdown(wait=False, cancel_futures=True)


def _strict() -> None:
    # As in the tests: a warning that reaches anybody may quote a patient's data.
    warnings.simplefilter("error")


def summary(name: str, turns: Sequence[Turn]) -> str:
    """What became of the mutants of one source, in one line."""
    own = [each for each in turns if each.source == name]
    states = sum((Counter(each.states) for each in own), Counter[str]())
    findings = [number for each in own for number in each.findings]
    said = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
    older = sum(each.mutants for each in own if each.code != code())
    return "".join(
        [
            f"{name}: {sum(each.mutants for each in own)} mutants in ",
            f"{sum(each.seconds for each in own):.0f} s; outcomes: {said}; ",
            f"FAILED {findings}" if findings else "none failed",
            f" ({older} with other code than now)" if older else "",
        ]
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help=f"of {', '.join(mutants.SOURCES)}; all")
    parser.add_argument("--each", type=int, default=5000, help="mutants of each source")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=mutants.SEED)
    parser.add_argument("--again", action="store_true", help="forget the turns of earlier runs")
    parser.add_argument("--replay", type=int, help="one mutant of one source, by its number")
    given = parser.parse_args()
    names = given.sources or list(mutants.SOURCES)
    if given.replay is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(dict(mutants.put_through(names[0], given.replay, Path(folder), given.seed)))
        return 0
    if given.again:
        shutil.rmtree(WORK / f"seed-{given.seed}", ignore_errors=True)
    turns = []
    for done in campaign(names, given.each, given.jobs, given.seed):
        turns.append(done)
        if done.findings:
            print(f"FAILED: {done.source} {done.findings}, see {WORK / 'findings'}", flush=True)
    for name in names:
        print(summary(name, turns))
    return any(each.findings for each in turns)


if __name__ == "__main__":
    sys.exit(main())
