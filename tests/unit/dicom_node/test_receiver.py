"""One instance through check, spool and ledger, without a network."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom.dsutils import create_file_meta, encode_file_meta, split_dataset
from sqlalchemy import Engine

from dicom_node import flushing
from dicom_node.association import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.dicom.header import instance_summary, read_header, why_ignored
from dicom_node.errors import LedgerError, UnreadableInstanceError
from dicom_node.ledger import intake, reports
from dicom_node.ledger.tables import InstanceState, open_ledger
from dicom_node.receiver import Answer, GroupCommit, Outcome, Request, StorageReceiver
from dicom_node.spool import Spool
from dicom_node.upper_layer import Limits
from tests.conftest import ManualClock
from tests.factories import make_series


def sent(dataset: Dataset) -> tuple[Request, bytes]:
    """The C-STORE request that sends *dataset*, and its data set."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    # PS3.10 7.1: preamble, prefix, and Group Length of the meta information as the first element.
    meta = 144 + int.from_bytes(data[140:144], "little")
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    return Request(str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), syntax), data[meta:]


@pytest.fixture
def image() -> Dataset:
    return make_series("CT", slices=1)[0]


@pytest.fixture
def ledger(tmp_path: Path) -> Generator[Engine]:
    engine = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    yield engine
    engine.dispose()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def receiver(spool: Spool, ledger: Engine, clock: ManualClock) -> StorageReceiver:
    return StorageReceiver(spool, ledger, clock)


def files(spool: Spool, area: str) -> list[Path]:
    return sorted(path for path in (spool.root / area).rglob("*") if path.is_file())


def test_the_head_of_a_file_is_that_of_pynetdicom_for_any_uid(image: Dataset) -> None:
    for uid in ("1.2.3", "1.2.34", image.SOPInstanceUID):
        request = replace(sent(image)[0], sop_instance_uid=str(uid))
        meta = create_file_meta(
            sop_class_uid=image.SOPClassUID,
            sop_instance_uid=uid,
            transfer_syntax=image.file_meta.TransferSyntaxUID,
            implementation_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version=IMPLEMENTATION_VERSION_NAME,
        )
        assert request.file_head() == b"\0" * 128 + b"DICM" + encode_file_meta(meta)


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_a_received_instance_is_durable_and_recorded_whatever_the_pieces(
    image: Dataset, receiver: StorageReceiver, ledger: Engine, spool: Spool, step: int
) -> None:
    request, data_set = sent(image)
    view = memoryview(data_set)
    with receiver.begin(request) as reception:
        for at in range(0, len(view), step):
            reception.write([view[at : at + step]])
        assert reception.finish() == Answer(0x0000)
    (row,) = reports.instances(ledger)
    assert (row["state"], row["sop_instance_uid"]) == ("received", image.SOPInstanceUID)
    kept = spool.resolve(row["path"])
    assert kept.read_bytes() == request.file_head() + data_set
    assert dcmread(kept).PixelData == image.PixelData
    assert files(spool, "temporary") == []


def test_an_instance_without_its_last_bytes_is_refused_in_words_that_fit_a_comment(
    image: Dataset, receiver: StorageReceiver, ledger: Engine, spool: Spool
) -> None:
    request, data_set = sent(image)
    assert receiver.receive(request, data_set[:-2]) == Answer(0xC000, "the data set ends early")
    (row,) = reports.instances(ledger)
    assert row["state"] == "rejected"
    assert spool.resolve(row["path"]).read_bytes() == request.file_head() + data_set[:-2]


def test_an_image_that_ends_before_its_pixels_is_refused(
    image: Dataset, receiver: StorageReceiver
) -> None:
    del image.PixelData
    answer = receiver.receive(*sent(image))
    assert answer == Answer(0xC000, "the data set ends early: no pixel data")


def test_a_request_without_data_set_is_refused(image: Dataset, receiver: StorageReceiver) -> None:
    answer = receiver.receive(sent(image)[0], b"")
    assert answer == Answer(0xC000, "the request has no data set")


def test_a_data_set_of_another_instance_is_refused(
    image: Dataset, receiver: StorageReceiver
) -> None:
    request, data_set = sent(image)
    answer = receiver.receive(replace(request, sop_instance_uid="1.2.3"), data_set)
    assert answer.status == 0xA900
    assert "SOP Instance UID differs" in answer.comment


def test_uids_that_are_none_reach_no_path(
    image: Dataset, receiver: StorageReceiver, spool: Spool
) -> None:
    request, data_set = sent(image)
    for uid in ("../../escape", "1..2", "/etc/x", "1" * 65, "a\0b"):
        assert receiver.receive(replace(request, sop_instance_uid=uid), data_set).status == 0xC000
    # Without names there is no file meta information either.
    assert [path.read_bytes() for path in files(spool, "quarantine") if path.suffix == ".dcm"] == [
        data_set
    ]


@pytest.mark.parametrize(
    ("limits", "status"),
    [(Limits(data_set=1000), 0xA700), (Limits(elements=5), 0xC000)],
)
def test_an_instance_beyond_a_limit_is_refused(
    image: Dataset, spool: Spool, ledger: Engine, clock: ManualClock, limits: Limits, status: int
) -> None:
    answer = StorageReceiver(spool, ledger, clock, limits).receive(*sent(image))
    assert answer.status == status
    assert files(spool, "incoming") + files(spool, "temporary") == []


def test_an_instance_that_breaks_off_leaves_nothing(
    image: Dataset, receiver: StorageReceiver, ledger: Engine, spool: Spool
) -> None:
    request, data_set = sent(image)
    with receiver.begin(request) as reception:
        reception.write([data_set[:1000]])
    assert files(spool, "incoming") + files(spool, "temporary") == []
    assert reports.instances(ledger) == []


def test_no_answer_and_no_row_carries_a_patient_s_name(
    image: Dataset, receiver: StorageReceiver, ledger: Engine
) -> None:
    image.PatientName = "SECRET^NAME"
    request, data_set = sent(image)
    answers = [receiver.receive(request, data) for data in (data_set, data_set[:-2])]
    assert "SECRET" not in str(answers) + str(reports.instances(ledger))


def test_the_bytes_of_a_conflict_lie_in_the_quarantine_and_the_first_stay(
    image: Dataset, receiver: StorageReceiver, ledger: Engine, spool: Spool
) -> None:
    request, first = sent(image)
    image.PatientID = "OTHER"
    _, second = sent(image)
    answers = [receiver.receive(request, data).status for data in (first, second, second, first)]
    assert answers == [0x0000] * 4
    rows = {row["state"]: row["path"] for row in reports.instances(ledger)}
    assert set(rows) == {"received", "conflict"}
    assert [path.read_bytes() for path in files(spool, "incoming")] == [request.file_head() + first]
    assert rows["conflict"].startswith("quarantine/")
    assert spool.resolve(rows["conflict"]).read_bytes() == request.file_head() + second
    assert "other bytes" in spool.resolve(rows["conflict"]).with_suffix(".txt").read_text()


def test_a_folder_that_cannot_be_flushed_fails_its_instance_alone(
    image: Dataset, receiver: StorageReceiver, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(flushing, "flush_together", lambda _: [0, errno.EIO])
        assert receiver.receive(*sent(image)).status == 0xA700
    assert receiver.receive(*sent(image)).status == 0x0000


def test_a_member_that_fails_does_not_fail_its_group(
    receiver: StorageReceiver, ledger: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of three forms while a first commit waits; one of them cannot be committed."""
    images = make_series("CT", slices=4)
    bad = str(images[2].SOPInstanceUID)
    held, begun = threading.Event(), threading.Event()
    groups: list[int] = []
    record = intake.record_instances

    def recording(
        engine: Engine, group: Sequence[intake.ReceivedInstance], *rest: Any
    ) -> list[InstanceState]:
        groups.append(len(group))
        if len(groups) == 1:
            begun.set()
            assert held.wait(20)
        if any(one.sop_instance_uid == bad for one in group):
            raise LedgerError("ledger: broken")
        return record(engine, group, *rest)

    monkeypatch.setattr(intake, "record_instances", recording)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(receiver.receive, *sent(images[0]))
        assert begun.wait(20)
        rest = [pool.submit(receiver.receive, *sent(image)) for image in images[1:]]
        while len(receiver._group._queue) < 3:
            pass
        held.set()
        answers = [first.result(20), *(one.result(20) for one in rest)]
    assert [answer.status for answer in answers] == [0, 0, 0xA700, 0]
    assert groups == [1, 3, 1, 1, 1]
    assert {row["sop_instance_uid"] for row in reports.instances(ledger)} == {
        str(image.SOPInstanceUID) for image in images
    } - {bad}


def test_who_waits_while_a_commit_runs_is_in_the_next_one() -> None:
    started, go, groups = threading.Event(), threading.Event(), []

    def commit(group: Sequence[str]) -> list[Outcome]:
        groups.append(sorted(group))
        if len(groups) == 1:
            started.set()
            assert go.wait(20)
        return [InstanceState.RECEIVED for _ in group]

    shared = GroupCommit(commit)  # type: ignore[arg-type]
    with ThreadPoolExecutor(5) as pool:
        leader = pool.submit(shared.submit, "first")  # type: ignore[arg-type]
        assert started.wait(20)
        others = [pool.submit(shared.submit, name) for name in "abcd"]  # type: ignore[arg-type]
        while len(shared._queue) < 4:
            pass
        go.set()
        states = [future.result(20) for future in (leader, *others)]
    assert states == [InstanceState.RECEIVED] * 5
    assert groups == [["first"], ["a", "b", "c", "d"]]


def test_a_commit_that_breaks_is_heard_of_by_all_and_ends_nothing() -> None:
    def commit(group: Sequence[str]) -> list[Outcome]:
        raise MemoryError

    shared = GroupCommit(commit)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(MemoryError):
            shared.submit("one")  # type: ignore[arg-type]


def outcome(read: Callable[[], object]) -> object:
    """What a reading gives, or the words of its refusal."""
    try:
        return read()
    except UnreadableInstanceError as error:
        return error.message


def test_what_the_receiver_sees_of_a_header_is_what_pydicom_sees(shared_data: Path) -> None:
    """Identity and verdict, for one file of every series and transfer syntax there is."""
    from dicom_node.dicom import identity
    from dicom_node.dicom.stream import Scanner

    folders = sorted(path for path in (shared_data / "dicom").iterdir() if path.is_dir())
    judged = 0
    for folder in folders:
        paths = sorted(folder.glob("*.dcm"))
        for path in paths[:: max(1, len(paths) // 8)]:
            header = read_header(path)
            syntax = str(header.file_meta.TransferSyntaxUID)
            _, offset = split_dataset(path)
            scanner = Scanner(syntax, identity.WANTED)
            scanner.feed(path.read_bytes()[offset:])
            values = scanner.finish().values
            seen = outcome(partial(identity.summary, values, syntax))
            assert seen == outcome(partial(instance_summary, header)), path
            assert identity.verdict(values, syntax) == why_ignored(header), path
            judged += 1
    assert judged > 50
