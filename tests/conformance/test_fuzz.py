"""Mutated data sets end in a refusal or in a right image; `make fuzz-derived` tries more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.conformance import fuzz, mutants

TIMES = 20


@pytest.mark.parametrize("name", list(mutants.SOURCES))
def test_a_mutated_data_set_is_refused_or_restored_right(tmp_path: Path, name: str) -> None:
    states: Counter[str] = Counter()
    for number in range(TIMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        states += mutants.put_through(name, number, folder)
    # A run in which everything was refused would have shown nothing.
    assert states["derived"] > 0
    assert states.total() > states["derived"]


@pytest.mark.parametrize("name", list(mutants.SOURCES))
def test_a_mutant_follows_from_its_number(name: str) -> None:
    first = [mutants.mutant(name, number) for number in range(20)]
    again = [mutants.mutant(name, number) for number in reversed(range(20))][::-1]
    assert first == again
    intact = mutants.whole(name)
    assert sum(any(file not in intact for file in files) for files in first) > 15


def test_the_first_mutants_hold_the_whole_sweep() -> None:
    """An intercept of a million million steps was restored wrong, and chance found it once."""
    intact = mutants.whole("PT")
    expected = {mutants.swept(data, *each) for data in intact for each in mutants.SWEEP}
    made = {
        file
        for number in range(2 * len(mutants.SWEEP))
        for file in mutants.mutant("PT", number)
        if file not in intact
    }
    kinds = {(keyword, value) for keyword, value in mutants.SWEEP}
    assert len(kinds) == len(mutants.SWEEP)
    assert len(made & expected) >= len(mutants.SWEEP) - len(intact)


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    first = fuzz.turn("CT", range(4), tmp_path)
    assert first is not None
    assert not first.findings
    assert sum(first.states.values()) >= 4
    kept = next(tmp_path.rglob("*.json"))
    written = kept.read_bytes(), kept.stat().st_mtime_ns
    assert fuzz.turn("CT", range(4), tmp_path) == first
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == written
    kept.write_bytes(written[0][:10])  # ended while it was written
    again = fuzz.turn("CT", range(4), tmp_path)
    assert again is not None
    assert again.states == first.states


def test_a_turn_that_another_run_has_is_left_to_it(tmp_path: Path) -> None:
    with (
        fuzz.claimed(tmp_path / "turn.json") as ours,
        fuzz.claimed(tmp_path / "turn.json") as other,
    ):
        assert ours is not None
        assert other is None


def test_a_mutant_that_fails_is_kept_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, number: int, folder: Path, seed: int) -> Counter[str]:
        (folder / "0.dcm").write_bytes(b"as it was")
        if number == 1:
            raise AssertionError("a wrong image")
        return Counter({"derived": 1})

    monkeypatch.setattr(mutants, "put_through", fails)
    done = fuzz.turn("CT", range(3), tmp_path)
    assert done is not None
    assert (done.states, done.findings) == ({"derived": 2}, (1,))
    (finding,) = (tmp_path / "findings").iterdir()
    assert (finding / "0.dcm").read_bytes() == b"as it was"
    assert "a wrong image" in (finding / "traceback.txt").read_text()
