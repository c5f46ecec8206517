"""What every command prints with: values as they are, whoever wrote them."""

from __future__ import annotations

import pytest

from dicom_node.cli import common, doctor


@pytest.mark.parametrize("title", ["[/x]", "[red]CT1", ":smile:", "[bold]"])
def test_what_a_peer_calls_itself_is_shown_as_it_is_and_never_taken_for_markup(
    title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common.print_rows([{"calling_ae": title}], {"calling_ae": "from"}, as_json=False, empty="")
    common.print_story({"calling_ae": title, "reason": title}, as_json=False)
    assert capsys.readouterr().out.count(title) == 3


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_rows([{"reason": "a\x1b[2Jb"}], {"reason": "why"}, as_json=False, empty="")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"a\x1b[2Jb" in out


def test_a_time_is_local_and_a_sentence_that_begins_with_one_is_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = "2026-11-23T12:22:45Z CT1 at 127.0.0.1: called AE title 'NOPE' is not one of ours"
    assert common.plain(sentence) == sentence
    assert len(common.plain("2026-11-23T12:22:45.125+00:00")) == len("2026-11-23 12:22:45")
    doctor.show([doctor.Diagnosis("refused", "warning", sentence)], as_json=False)
    assert "called AE title" in capsys.readouterr().out


def test_a_sentence_is_folded_and_takes_no_room_from_the_columns_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = " ".join(f"word{number}" for number in range(60))
    rows = [{"job": 1, "uid": "2.25.272676345735493117354402728147468114697", "problem": sentence}]
    columns = {"job": "made by job", "uid": "series", "problem": "reason"}
    common.print_rows(rows, columns, as_json=False, empty="")
    out = capsys.readouterr().out
    assert "made by job" in out
    assert "series" in out
    assert all(word in out.split() for word in sentence.split())
