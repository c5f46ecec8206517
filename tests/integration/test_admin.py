"""What an operator asks and orders on the command line, and what a real archive sees of it."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from sqlalchemy import Engine

from dicom_node.audit_trail import AuditTrail
from dicom_node.dicom.rejection import KEY_OBJECT_SELECTION
from dicom_node.ledger.tables import open_ledger
from dicom_node.supervisor.process import Signals
from dicom_node.supervisor.roles import DeliverService
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.integration.conftest import node_settings
from tests.integration.peers import Archive, serving, until
from tests.integration.served import command
from tests.unit.dicom_node.bench import Bench, Gain, bench

MODEL = "ab" * 32


@pytest.fixture
def ledger(tmp_path: Path) -> Generator[Engine]:
    opened = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    yield opened
    opened.dispose()


def restored_node(folder: Path, ledger: Engine, archive: Archive) -> Bench:
    """A node that has restored a CT series, on the files and rows that its node.toml names."""
    to = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
    (folder / "node.toml").write_text(
        f'[destinations.pacs]\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\nport = {archive.port}\n'
    )
    made = bench(folder, ledger, ManualClock(time.time() - 60), destinations={"pacs": to})
    made.receive(make_series("CT", slices=3, rows=16))
    made.tick()
    assert made.worker(Gain()).run_once(made.clock())
    return made


def deliver(node: Bench) -> None:
    settings = node_settings(node.folder, destinations=node.settings.destinations)
    trail = AuditTrail(settings)
    service = DeliverService(settings, Signals().stop, trail)
    try:
        until(lambda: service.turn(time.time()) is False, "nothing is left to send")
    finally:
        service.close()
        trail.close()


def ask(node: Bench, *arguments: str) -> Any:
    done = command(*arguments, "--json", config=node.folder / "node.toml")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_recalled_series_is_followed_by_its_note_at_the_archive(
    tmp_path: Path, ledger: Engine
) -> None:
    with serving(Archive()) as archive:
        node = restored_node(tmp_path, ledger, archive)
        deliver(node)
        images = set(archive.stored)
        recalled = ask(node, "recall", "--model", MODEL[:16])
        assert {each["sop_instance_uid"] for each in recalled} == images
        (rejection,) = ask(node, "recall", "--model", MODEL, "--reject", "--yes")
        deliver(node)
    (uid,) = set(archive.stored) - images
    assert uid == rejection["note_sop_instance_uid"]
    note = dcmread(BytesIO(archive.stored[uid]), force=True)
    assert note.SOPClassUID == KEY_OBJECT_SELECTION
    (evidence,) = note.CurrentRequestedProcedureEvidenceSequence
    (series,) = evidence.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence} == images
    (delivery,) = ask(node, "deliveries", "list", "--state", "delivered")
    assert (delivery["sent"], delivery["total"]) == (4, 4)
    # Each image was sent once, and so was the note.
    assert archive.asked == 4


def test_the_story_of_an_instance_ends_where_the_archive_has_it(
    tmp_path: Path, ledger: Engine
) -> None:
    with serving(Archive(script=lambda number, event: 0xB000 if number == 1 else 0)) as archive:
        node = restored_node(tmp_path, ledger, archive)
        deliver(node)
        first = archive.received[0]
    story = ask(node, "instances", "show", first)
    assert story["story"][-1]["happened"] == "delivered"
    answers = [each["detail"] for each in story["story"] if each["what"].startswith("result")]
    assert answers == ["answered 0xB000"]
    assert story == ask(node, "jobs", "show", "1", "--instance", first)
    plain = command("instances", "show", first, config=node.folder / "node.toml")
    assert plain.returncode == 0
    assert "answered 0xB000" in plain.stdout
    assert "Phantom" not in plain.stdout  # no patient in what is printed


def test_what_cannot_be_done_says_so_and_exits_with_1_and_wrong_usage_with_2(
    tmp_path: Path, ledger: Engine
) -> None:
    with serving(Archive()) as archive:
        node = restored_node(tmp_path, ledger, archive)
    config = node.folder / "node.toml"
    for arguments, code, words in (
        (("recall", "--model", "c0ffee00"), 1, "knows no result of model c0ffee00"),
        (("jobs", "retry", "1"), 1, "job 1 is done; retry does not apply"),
        (("instances", "show", "9.9"), 1, "there is no instance 9.9"),
        (("jobs", "list", "--since", "yesterday"), 2, "neither a span"),
        (("recall",), 2, "Missing option '--model'"),
    ):
        done = command(*arguments, config=config)
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert words in done.stderr
