"""C-STORE and C-ECHO from real senders: what they are answered and what is kept."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_node.association import contexts_for
from dicom_node.errors import ConfigurationError
from dicom_node.requestor import associate
from dicom_node.storage_scp import StorageSCP
from dicom_node.storage_scu import Sendable, echo
from tests.integration.conftest import RECEIVE_PATHS
from tests.integration.peers import (
    CT,
    DCMSEND,
    ROOT,
    STORESCU,
    Node,
    Orthanc,
    connected,
    ct_slice,
    data_set_bytes,
    run_sender,
    series_files,
    statuses,
    until,
    write,
)
from tests.unit.dicom_node.sockets import peer, read_pdu
from tests.unit.dicom_node.test_request import request_pdu

# Folder of the shared data, and what storescu proposes for its transfer syntax.
SERIES = {
    "ct_ge_petct_lowdose": "--propose-little",
    "pet_ge_slope_per_slice": "--propose-implicit",
    "mr_siemens_t2_tse": "--propose-uncompr",
    "mr_ts_j2k": "--propose-j2k-lossless",
    "mr_ts_jpegls": "--propose-jls-lossless",
    "mr_ts_jpeg_lossless": "--propose-lossless",
    "mr_ts_rle": "--propose-rle",
    "mr_hitachi_iso2022": "--propose-implicit",
}


@pytest.fixture(params=RECEIVE_PATHS)
def receive_path(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Both ways to receive must do all of this."""
    return RECEIVE_PATHS[request.param]


@pytest.mark.dcmtk
@pytest.mark.parametrize("name", SERIES)
def test_storescu_stores_a_real_series(name: str, node_scp: Node, shared_data: Path) -> None:
    folder = shared_data / "dicom" / name
    run_sender(
        [STORESCU, SERIES[name], "+sd", "-aec", "DIFFCODE", "127.0.0.1", str(node_scp.port), folder]
    )
    sources = {str(dcmread(path).SOPInstanceUID): path for path in series_files(folder)}
    rows = node_scp.instances()
    assert {row["sop_instance_uid"] for row in rows} == set(sources)
    assert {row["state"] for row in rows} == {"received"}
    for row in rows:
        kept = dcmread(node_scp.spool.resolve(row["path"]))
        source = dcmread(sources[row["sop_instance_uid"]])
        assert kept.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
        assert kept.PixelData == source.PixelData
        assert {element.tag for element in kept} == {element.tag for element in source}


@pytest.mark.dcmtk
def test_dcmsend_stores_every_transfer_syntax_in_one_association(
    node_scp: Node, shared_data: Path
) -> None:
    folder = shared_data / "dicom" / "ct_ts_variants"
    # -dn: what is lossless compressed goes as it is.
    run_sender([DCMSEND, "-dn", "+sd", "-aec", "DIFFCODE", "127.0.0.1", str(node_scp.port), folder])
    sent = {str(dcmread(path).SOPInstanceUID) for path in series_files(folder)}
    assert {row["sop_instance_uid"] for row in node_scp.instances()} == sent


@pytest.mark.orthanc
def test_orthanc_stores_a_series_with_us(
    node_scp: Node, orthanc: Orthanc, shared_data: Path
) -> None:
    for path in series_files(shared_data / "dicom" / "mr_ts_j2k"):
        orthanc.upload(path)
    orthanc.put("/modalities/node", {"AET": "DIFFCODE", "Host": "127.0.0.1", "Port": node_scp.port})
    orthanc.put("/modalities/node/store", orthanc.get("/series"), method="POST")
    assert [row["state"] for row in node_scp.instances()] == ["received"] * 4


def test_the_bytes_kept_are_the_bytes_received(node_scp: Node, shared_data: Path) -> None:
    paths = [
        path
        for name in ("ct_ts_variants", "pet_gml_nonsquare", "mr_siemens_haste_coronal", "mr_uih_t1")
        for path in series_files(shared_data / "dicom" / name)[:10]
    ]
    with connected(node_scp.peer(), paths) as association:
        assert set(statuses(association, paths)) == {0x0000}
    assert node_scp.stored() == {data_set_bytes(path) for path in paths}


def test_the_same_instance_again_is_acknowledged_and_makes_no_work(
    node_scp: Node, tmp_path: Path
) -> None:
    path = write(ct_slice(1), tmp_path / "1.dcm")
    for calling in ("SCANNER", "PACS"):
        with connected(node_scp.peer(calling), [path]) as association:
            assert statuses(association, [path, path]) == [0x0000, 0x0000]
    assert [row["state"] for row in node_scp.instances()] == ["received"]
    assert len(node_scp.stored()) == 1


def test_other_bytes_under_a_known_uid_are_acknowledged_and_set_aside(
    node_scp: Node, tmp_path: Path
) -> None:
    first = write(ct_slice(1), tmp_path / "first.dcm")
    other = write(ct_slice(1, PatientID="OTHER"), tmp_path / "other.dcm")
    with connected(node_scp.peer(), [first]) as association:
        assert statuses(association, [first, other]) == [0x0000, 0x0000]
    states = {row["state"]: row["path"] for row in node_scp.instances()}
    assert set(states) == {"received", "conflict"}
    assert data_set_bytes(node_scp.spool.resolve(states["received"])) == data_set_bytes(first)
    assert data_set_bytes(node_scp.spool.resolve(states["conflict"])) == data_set_bytes(other)


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.99])
def test_a_data_set_that_ends_early_is_refused_and_kept_for_support(
    keep: float, node_scp: Node, tmp_path: Path
) -> None:
    whole = write(ct_slice(1), tmp_path / "whole.dcm")
    length = len(data_set_bytes(whole))
    head = whole.read_bytes()[:-length]
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(head + data_set_bytes(whole)[: int(keep * length) // 2 * 2 or 2])
    with connected(node_scp.peer(), [whole]) as association:
        assert statuses(association, [cut]) == [0xC000]
        assert statuses(association, [whole]) == [0x0000]
    assert sorted(row["state"] for row in node_scp.instances()) == ["received", "rejected"]
    assert [data_set_bytes(path) for path in node_scp.quarantined()] == [data_set_bytes(cut)]


def test_truncated_compressed_pixels_are_refused(
    node_scp: Node, shared_data: Path, tmp_path: Path
) -> None:
    whole = series_files(shared_data / "dicom" / "mr_ts_jpegls")[0]
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with connected(node_scp.peer(), [whole]) as association:
        assert statuses(association, [cut]) == [0xC000]


def test_a_data_set_that_contradicts_its_command_is_refused(node_scp: Node, tmp_path: Path) -> None:
    other_class = ct_slice(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    other_instance = ct_slice(2)
    paths = []
    for name, dataset in (("class", other_class), ("instance", other_instance)):
        path = write(dataset, tmp_path / f"{name}.dcm")
        # The command set takes its UIDs from the meta information.
        told = dcmread(write(ct_slice(3), tmp_path / "told.dcm")).file_meta
        head = (tmp_path / "told.dcm").read_bytes()[: -len(data_set_bytes(tmp_path / "told.dcm"))]
        assert told.MediaStorageSOPClassUID == CT
        path.write_bytes(head + data_set_bytes(path))
        paths.append(path)
    with connected(node_scp.peer(), paths) as association:
        assert statuses(association, paths) == [0xA900, 0xA900]
    assert [row["state"] for row in node_scp.instances()] == ["rejected", "rejected"]


@pytest.mark.parametrize("uid", ["../../escape", "1..2", "/etc/x"])
def test_a_uid_that_is_none_never_reaches_a_path(uid: str, node_scp: Node, tmp_path: Path) -> None:
    path = tmp_path / "bad.dcm"
    dataset = ct_slice(1)
    dataset.SOPInstanceUID = uid
    write(dataset, path)
    before = {entry for entry in tmp_path.rglob("*") if entry.is_file()}
    with connected(node_scp.peer(), [write(ct_slice(2), tmp_path / "good.dcm")]) as association:
        assert statuses(association, [path]) == [0xC000]
    new = {entry for entry in tmp_path.rglob("*") if entry.is_file()} - before
    assert all(
        "spool" in entry.parts or "ledger" in entry.name or entry.name in ("good.dcm", "audit.log")
        for entry in new
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ct_philips_localizer", "localizer"),
        ("ct_philips_exam_summary", "not an acquired image"),
    ],
)
def test_what_is_never_restored_is_acknowledged_and_ignored(
    name: str, words: str, node_scp: Node, shared_data: Path
) -> None:
    paths = series_files(shared_data / "dicom" / name)
    with connected(node_scp.peer(), paths) as association:
        assert set(statuses(association, paths)) == {0x0000}
    rows = node_scp.instances()
    assert {row["state"] for row in rows} == {"ignored"}
    assert all(words in row["reason"] for row in rows)


def test_an_instance_of_our_own_making_is_acknowledged_and_ignored(
    node_scp: Node, tmp_path: Path
) -> None:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.Manufacturer, item.ManufacturerModelName = "DiffCode", "DiffCode DICOM node"
    path = write(ct_slice(1, ContributingEquipmentSequence=[item]), tmp_path / "own.dcm")
    with connected(node_scp.peer(), [path]) as association:
        assert statuses(association, [path]) == [0x0000]
    (row,) = node_scp.instances()
    assert row["state"] == "ignored"
    assert "our own output" in row["reason"]


def test_a_full_spool_asks_the_sender_to_wait_and_recovers(node_scp: Node, tmp_path: Path) -> None:
    paths = [write(ct_slice(number), tmp_path / f"{number}.dcm") for number in (1, 2, 3)]
    with connected(node_scp.peer(), paths) as association:
        assert statuses(association, paths[:1]) == [0x0000]
        node_scp.spool.full = True  # type: ignore[attr-defined]
        assert statuses(association, paths[1:]) == [0xA700, 0xA700]
        node_scp.spool.full = False  # type: ignore[attr-defined]
        assert statuses(association, paths[1:]) == [0x0000, 0x0000]
    assert [row["state"] for row in node_scp.instances()] == ["received"] * 3


def test_a_lost_ledger_asks_the_sender_to_wait_and_recovers(node_scp: Node, tmp_path: Path) -> None:
    path = write(ct_slice(1), tmp_path / "1.dcm")
    database = Path(str(node_scp.ledger.url.database))
    with connected(node_scp.peer(), [path]) as association:
        node_scp.ledger.dispose()
        aside = tmp_path / "aside"
        aside.mkdir()
        for file in tmp_path.glob("ledger.sqlite*"):
            shutil.move(file, aside / file.name)
        database.mkdir()
        assert statuses(association, [path]) == [0xA700]
        node_scp.ledger.dispose()
        database.rmdir()
        for file in aside.iterdir():
            shutil.move(file, tmp_path / file.name)
        assert statuses(association, [path]) == [0x0000]
    assert [row["state"] for row in node_scp.instances()] == ["received"]


def test_an_aborted_association_keeps_what_arrived(node_scp: Node, tmp_path: Path) -> None:
    paths = [write(ct_slice(number), tmp_path / f"{number}.dcm") for number in (1, 2, 3)]
    with connected(node_scp.peer(), paths) as association:
        assert statuses(association, paths[:2]) == [0x0000, 0x0000]
        association.abort()
    assert len(node_scp.instances()) == 2
    until(node_scp.all_released, "the association is closed in the ledger")
    with connected(node_scp.peer(), paths) as association:
        assert set(statuses(association, paths)) == {0x0000}
    assert [row["state"] for row in node_scp.instances()] == ["received"] * 3


def test_a_released_association_is_closed_in_the_ledger(node_scp: Node, tmp_path: Path) -> None:
    from dicom_node.ledger import intake

    path = write(ct_slice(1), tmp_path / "1.dcm")
    with connected(node_scp.peer("SCANNER1"), [path]) as association:
        statuses(association, [path])
        (progress,) = intake.series_progress(node_scp.ledger)
        assert progress.open_associations == 1
        assert (progress.calling_ae, progress.called_ae) == ("SCANNER1", "DIFFCODE")
        assert progress.address == "127.0.0.1"
    until(node_scp.all_released, "the association is closed in the ledger")


def test_the_same_instance_over_four_associations_at_once_is_received_once(
    node_scp: Node, tmp_path: Path
) -> None:
    paths = [write(ct_slice(number), tmp_path / f"{number}.dcm") for number in range(1, 6)]
    answers: list[list[int]] = []

    def send() -> None:
        with connected(node_scp.peer(), paths) as association:
            answers.append(statuses(association, paths))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [[0x0000] * 5] * 4
    assert [row["state"] for row in node_scp.instances()] == ["received"] * 5
    assert node_scp.stored() == {data_set_bytes(path) for path in paths}


def test_an_unlisted_sender_is_rejected_with_the_reason(start_node: Callable[..., Node]) -> None:
    node = start_node(association={"allow": [{"calling_ae": "SCANNER"}]})
    assert echo(node.peer("SCANNER")).ok
    answer = echo(node.peer("STRANGER"))
    assert not answer.ok
    assert "rejected permanently: our calling AE title 'STRANGER' is not known" in answer.words


def test_a_wrong_called_ae_title_is_rejected_where_it_is_required(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"require_called_ae_title": True})
    with peer(("127.0.0.1", node.port)) as connection:
        connection.sendall(request_pdu(called=b"WRONG"))
        # PS3.8 9.3.4: result, source and reason are the last three octets.
        assert read_pdu(connection)[7:] == bytes([1, 1, 7])


def test_more_associations_than_allowed_are_rejected_for_now(
    start_node: Callable[..., Node], tmp_path: Path
) -> None:
    node = start_node(association={"max_associations": 1})
    path = write(ct_slice(1), tmp_path / "1.dcm")
    with connected(node.peer(), [path]):
        answer = echo(node.peer())
        assert "rejected for now: it has as many associations as it allows" in answer.words
    until(lambda: echo(node.peer()).ok, "the association is free again")


def test_a_sender_that_holds_only_a_lossy_copy_is_not_blocked(node_scp: Node) -> None:
    contexts = contexts_for([(CT, "1.2.840.10008.1.2.4.50")])[:1]
    with associate(node_scp.peer(), contexts) as association:
        assert len(association.accepted_contexts) == 1


def test_a_port_in_use_is_a_mistake_of_the_configuration(node_scp: Node) -> None:
    second = StorageSCP(node_scp.settings, node_scp.spool, node_scp.ledger)
    with pytest.raises(ConfigurationError, match=r"node\.host, node\.port: cannot listen"):
        second.start()


def test_stopping_waits_for_the_instance_in_hand_and_aborts_what_stays(
    node_scp: Node, tmp_path: Path
) -> None:
    path = write(ct_slice(1), tmp_path / "1.dcm")
    with connected(node_scp.peer(), [path]) as association:
        assert statuses(association, [path]) == [0x0000]
        peer = node_scp.peer()
        node_scp.scp.stop(drain_s=0.1)
        until(lambda: not association.is_established, "the association is aborted")
    assert "connection refused" in echo(peer).words


def test_a_sendable_knows_its_uids_from_the_meta_information(tmp_path: Path) -> None:
    item = Sendable.of(write(ct_slice(4), tmp_path / "4.dcm"))
    assert (item.sop_class_uid, item.sop_instance_uid) == (CT, f"{ROOT}.1.1.4")
