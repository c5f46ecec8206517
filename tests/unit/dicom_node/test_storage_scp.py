"""One instance through check, spool and ledger, without a network."""

from __future__ import annotations

from collections.abc import Generator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node.dicom.header import read_header
from dicom_node.errors import MismatchError, UnreadableInstanceError
from dicom_node.ledger import reports
from dicom_node.ledger.tables import open_ledger
from dicom_node.spool import Spool
from dicom_node.storage_scp import Incoming, StorageReceiver, check_instance
from tests.conftest import ManualClock
from tests.factories import make_series


def incoming(dataset: Dataset, *, drop: int = 0) -> Incoming:
    """The C-STORE request that sends *dataset*, without its last *drop* bytes."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    # PS3.10 7.1: preamble, prefix, and Group Length of the meta information as the first element.
    meta = 144 + int.from_bytes(data[140:144], "little")
    return Incoming(
        str(dataset.SOPClassUID),
        str(dataset.SOPInstanceUID),
        str(dataset.file_meta.TransferSyntaxUID),
        data[meta : len(data) - drop],
    )


@pytest.fixture
def image() -> Dataset:
    return make_series("CT", slices=1)[0]


@pytest.fixture
def ledger(tmp_path: Path) -> Generator[Engine]:
    engine = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    yield engine
    engine.dispose()


@pytest.fixture
def receiver(tmp_path: Path, ledger: Engine, clock: ManualClock) -> StorageReceiver:
    return StorageReceiver(Spool(tmp_path / "spool"), ledger, clock)


def test_the_file_of_an_instance_is_readable_and_always_the_same(image: Dataset) -> None:
    request = incoming(image)
    assert request.as_file() == request.as_file()
    header = read_header(request.as_file())
    assert header.SOPInstanceUID == image.SOPInstanceUID
    assert request.as_file().endswith(request.data_set)


def test_a_whole_instance_passes_with_its_identity(image: Dataset) -> None:
    request = incoming(image)
    summary, header = check_instance(request, request.as_file())
    assert summary.series_instance_uid == image.SeriesInstanceUID
    assert summary.modality == header.Modality == "CT"


def test_an_instance_without_its_last_bytes_does_not_pass(image: Dataset) -> None:
    request = incoming(image, drop=2)
    with pytest.raises(UnreadableInstanceError, match="ends early"):
        check_instance(request, request.as_file())


def test_an_image_that_ends_before_its_pixels_does_not_pass(image: Dataset) -> None:
    del image.PixelData
    request = incoming(image)
    with pytest.raises(UnreadableInstanceError, match="no pixel data"):
        check_instance(request, request.as_file())


def test_a_request_without_data_set_does_not_pass(image: Dataset) -> None:
    request = Incoming(image.SOPClassUID, image.SOPInstanceUID, "1.2.840.10008.1.2", b"")
    with pytest.raises(UnreadableInstanceError, match="no data set"):
        check_instance(request, request.as_file())


def test_a_data_set_of_another_instance_does_not_pass(image: Dataset) -> None:
    told = incoming(image)
    request = Incoming(told.sop_class_uid, "1.2.3", told.transfer_syntax_uid, told.data_set)
    with pytest.raises(MismatchError, match="SOP Instance UID differs"):
        check_instance(request, request.as_file())


def test_a_received_instance_is_durable_and_recorded(
    image: Dataset, receiver: StorageReceiver, ledger: Engine
) -> None:
    assert receiver.receive(incoming(image)) == (0x0000, "")
    (row,) = reports.instances(ledger)
    assert (row["state"], row["sop_instance_uid"]) == ("received", image.SOPInstanceUID)


def test_a_rejected_instance_is_answered_with_words_that_fit_an_error_comment(
    image: Dataset, receiver: StorageReceiver, ledger: Engine
) -> None:
    status, why = receiver.receive(incoming(image, drop=2))
    assert status == 0xC000
    assert 0 < len(why) <= 64  # PS3.7 C.5: Error Comment is an LO
    (row,) = reports.instances(ledger)
    assert row["state"] == "rejected"


def test_no_answer_and_no_row_carries_a_patient_s_name(
    image: Dataset, receiver: StorageReceiver, ledger: Engine
) -> None:
    image.PatientName = "SECRET^NAME"
    answers = [receiver.receive(incoming(image, drop=drop)) for drop in (0, 2)]
    assert "SECRET" not in str(answers) + str(reports.instances(ledger))
