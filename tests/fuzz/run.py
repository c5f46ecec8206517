"""Coverage-guided fuzzing with Atheris (libFuzzer).

    python -m tests.fuzz.run --minutes 30          every target in turn, from the kept corpus
    python -m tests.fuzz.run --minutes 5 pdu       one of them
    python -m tests.fuzz.run --keep                shrink what was found into tests/fuzz/corpus

New inputs and findings go to build/fuzz/TARGET, or below DICOM_NODE_FUZZ_FOLDER. A finding is an
input after which a target raised, hung or outgrew its memory; `--replay FILE TARGET` shows it
again. Time is wall time; the CPU seconds say how much of it a busy machine gave.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

CORPUS = Path(__file__).with_name("corpus")
ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("DICOM_NODE_FUZZ_FOLDER", ROOT / "build/fuzz"))
# Longest input in bytes, and the share of the time: the last two go through a socket.
TARGETS = {
    "request": (4096, 2),
    "pdu": (4096, 3),
    "command": (1024, 1),
    "stream": (4096, 3),
    "instance": (4096, 4),
    "file": (4096, 2),
    "stock": (4096, 3),
    "loop": (4096, 3),
}
HANG_S, MEMORY_MB = 60, 1500
_INSTRUMENTED = ["dicom_node", "pydicom", "pynetdicom"]
# Values that no mutation finds soon: tags with their VRs, delimiters, lengths, PDU headers.
_WORDS = [
    *(
        bytes((0xFE, 0xFF, low, 0xE0, *length))
        for low in (0, 0x0D, 0xDD)
        for length in (b"\0\0\0\0",)
    ),
    b"\xfe\xff\x00\xe0\xff\xff\xff\xff",
    b"\xff\xff\xff\xff",
    *(f"{vr}".encode() for vr in ("SQ", "UN", "OB", "OW", "UI", "CS", "PN", "US", "UT", "LO")),
    b"SQ\0\0\xff\xff\xff\xff",
    b"UN\0\0\xff\xff\xff\xff",
    b"\xe0\x7f\x10\x00",
    b"\x08\x00\x16\x00",
    b"\x08\x00\x18\x00",
    b"\x20\x00\x0d\x00",
    b"\x20\x00\x0e\x00",
    b"\x02\x00\x10\x00",
    *(bytes((kind, 0)) for kind in range(1, 8)),
    b"\0\0\0\4\1\3",
]


def kept(target: str) -> list[tuple[str, bytes]]:
    """The committed inputs of a target, with their names."""
    file = CORPUS / f"{target}.zip"
    if not file.exists():
        return []
    with zipfile.ZipFile(file) as archive:
        return [(name, archive.read(name)) for name in sorted(archive.namelist())]


def unpack(target: str) -> Path:
    """A folder with the seeds, the committed inputs and what earlier runs found."""
    from tests.fuzz.seeds import SEEDS

    folder = WORK / target / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for data in [*SEEDS[target](), *(data for _, data in kept(target))]:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return folder


def pack(target: str, folder: Path) -> int:
    """Write a folder's inputs as the committed corpus; the number of inputs."""
    CORPUS.mkdir(exist_ok=True)
    found = {hashlib.sha256(data).hexdigest()[:16]: data for data in _inputs(folder)}
    with zipfile.ZipFile(CORPUS / f"{target}.zip", "w", zipfile.ZIP_DEFLATED, True, 9) as archive:
        for name in sorted(found):
            # A fixed date: the same inputs make the same file.
            archive.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), found[name])
    return len(found)


def _inputs(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in sorted(folder.iterdir()))


def options(target: str) -> list[str]:
    """libFuzzer's options for a target."""
    dictionary = WORK / "dictionary"
    dictionary.parent.mkdir(parents=True, exist_ok=True)
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in _WORDS)
    dictionary.write_text("".join(f'"{word}"\n' for word in words))
    return [
        f"-max_len={TARGETS[target][0]}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-dict={dictionary}",
        f"-artifact_prefix={WORK / target}/finding-",
        "-print_final_stats=1",
    ]


def load() -> Callable[[str], Callable[[bytes], None]]:
    """Import what is fuzzed with its coverage counted, once for all targets; makes a target."""
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.fuzz.association import AssociationTarget
        from tests.fuzz.targets import TARGETS as pure
        from tests.integration.conftest import RECEIVE_PATHS

    return lambda target: AssociationTarget(target) if target in RECEIVE_PATHS else pure[target]


def fuzz(
    make: Callable[[str], Callable[[bytes], None]], target: str, arguments: Sequence[str], log: Path
) -> tuple[int, float]:
    """Hand a process of its own over to libFuzzer; its exit code and CPU seconds."""
    if (pid := os.fork()) == 0:
        import atheris

        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        try:
            run = make(target)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
        atheris.Setup(["fuzz", *arguments], run)
        atheris.Fuzz()
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def campaign(targets: Sequence[str], minutes: float, seed: int = 0) -> int:
    """Fuzz each target for its share of the time, and print what came of it.

    A *seed* other than 0 makes the same mutations each time.
    """
    shares = sum(TARGETS[target][1] for target in targets)
    make, bad = load(), 0
    for target in targets:
        seconds = max(1, round(60 * minutes * TARGETS[target][1] / shares))
        folder, log = unpack(target), WORK / target / "log"
        log.unlink(missing_ok=True)
        limits = [f"-max_total_time={seconds}", f"-seed={seed}"]
        arguments = [*limits, *options(target), str(folder)]
        code, used = fuzz(make, target, arguments, log)
        bad += code != 0
        print(summary(target, code, used, log.read_text(errors="replace")), flush=True)
    return bad


def summary(target: str, code: int, used: float, log: str) -> str:
    """One line about a run, from libFuzzer's own report."""
    status = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/\S+.*?rss: (\d+)Mb", log)
    runs = re.findall(r"Done (\d+) runs in (\d+) second", log)
    if code or not status or not runs:
        return (
            f"{target}: FAILED with {code} after {used:.0f} s of CPU, see {WORK / target / 'log'}"
        )
    (_, _, _, first), (coverage, features, corpus, last) = status[0], status[-1]
    return (
        f"{target}: {runs[-1][1]} s ({used:.0f} s of CPU), {runs[-1][0]} inputs, no finding; "
        f"{coverage} branches, "
        f"{features} features, corpus {corpus}; memory {first} -> {last} MB"
    )


def keep(targets: Sequence[str]) -> None:
    """Write as committed corpus what of the inputs found adds a branch, the smallest first."""
    make = load()
    for target in targets:
        run, least = make(target), WORK / target / "least"
        least.mkdir(parents=True, exist_ok=True)
        seen: set[object] = set()
        for data in sorted(_inputs(unpack(target)), key=lambda data: (len(data), data)):
            if new := branches(run, data) - seen:
                seen |= new
                (least / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        print(f"{target}: {pack(target, least)} inputs kept", flush=True)


def branches(run: Callable[[bytes], None], data: bytes) -> set[object]:
    """The steps from line to line of the node's code that an input takes, in every thread."""
    found: set[object] = set()

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        if "/dicom_node/" not in frame.f_code.co_filename:
            return None
        before = 0

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            found.add((frame.f_code, before, frame.f_lineno))
            before = frame.f_lineno
            return step

        return step

    threading.settrace(enter)
    sys.settrace(enter)
    try:
        run(data)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--replay", type=Path)
    given = parser.parse_args()
    targets = given.targets or list(TARGETS)
    if given.replay:
        load()(targets[0])(given.replay.read_bytes())
        return 0
    if given.keep:
        keep(targets)
        return 0
    return campaign(targets, given.minutes, given.seed)


if __name__ == "__main__":
    sys.exit(main())
