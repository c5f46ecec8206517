"""The whole way through: sent to a served node, restored, and stored at the destination."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Generator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_node.association import Peer
from dicom_node.storage_scu import send_files
from tests.factories import make_series, write_series
from tests.integration.peers import STORESCU, Archive, serving, until
from tests.integration.served import (
    ServedNode,
    command,
    initialise,
    listening_port,
    served,
    write_tiny_bundle,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def archive() -> Generator[Archive]:
    with serving(Archive()) as peer:
        yield peer


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, archive: Archive
) -> Generator[ServedNode]:
    """One node for the tests that do it no harm."""
    folder = tmp_path_factory.mktemp("node") / "n"
    config = initialise(folder, bundle, {"pacs": f"ARCHIVE@127.0.0.1:{archive.port}"})
    with served(config) as running:
        yield running


def send(node: ServedNode, paths: Sequence[Path]) -> None:
    report = send_files(paths, Peer("DIFFCODE", "127.0.0.1", node.port, "TESTER"))
    assert report.ok, report


def restored(archive: Archive, source: Dataset) -> dict[str, Dataset]:
    """What the archive has of a source's study and modality, by source SOP Instance UID."""
    found = {}
    for data in archive.stored.values():
        made = dcmread(BytesIO(data), force=True)
        if (made.StudyInstanceUID, made.Modality) == (source.StudyInstanceUID, source.Modality):
            found[made.SourceImageSequence[0].ReferencedSOPInstanceUID] = made
    return found


@pytest.mark.dcmtk
def test_three_series_from_dcmtk_come_out_restored(
    node: ServedNode, archive: Archive, tmp_path: Path
) -> None:
    sent = {m: make_series(m, slices=4, study="three") for m in ("CT", "MR", "PT")}
    for modality, datasets in sent.items():
        folder = tmp_path / modality
        write_series(datasets, folder)
        arguments = [STORESCU, "-aec", "DIFFCODE", "127.0.0.1", str(node.port), "+sd", str(folder)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    node.wait_for_delivery(*(str(each[0].SeriesInstanceUID) for each in sent.values()))
    jobs = {job["task"]: job for job in node.ask("jobs", "list")}
    assert set(jobs) == {"ct_denoise", "mri_sr", "pet_synthesis"}
    for job in jobs.values():
        assert (job["state"], job["instances"]) == ("done", 4)
        assert set(job["seconds"]) == {"load", "restore", "derive"}
        assert all(seconds > 0 for seconds in job["seconds"].values())
        assert [(d["destination"], d["sent"], d["total"]) for d in job["deliveries"]] == [
            ("pacs", 4, 4)
        ]
    for datasets in sent.values():
        made = restored(archive, datasets[0])
        assert set(made) == {dataset.SOPInstanceUID for dataset in datasets}
        for source in datasets:
            derived = made[source.SOPInstanceUID]
            assert derived.PatientID == source.PatientID
            assert derived.FrameOfReferenceUID == source.FrameOfReferenceUID
            assert derived.ImagePositionPatient == source.ImagePositionPatient
            assert derived.SeriesInstanceUID != source.SeriesInstanceUID
            assert (derived.Rows, derived.Columns) == (source.Rows, source.Columns)
            assert len(derived.PixelData) == len(source.PixelData)
        assert len({derived.SeriesInstanceUID for derived in made.values()}) == 1


def test_what_is_not_for_us_is_acknowledged_and_ignored(node: ServedNode, tmp_path: Path) -> None:
    localizer = make_series("CT", slices=1, study="ignored", series="localizer", localizer=True)
    capture = make_series("CT", slices=1, study="ignored", series="capture")
    for dataset in capture:
        dataset.SOPClassUID = SecondaryCaptureImageStorage
        dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    before = node.jobs()
    send(node, write_series([*localizer, *capture], tmp_path))
    ours = {str(localizer[0].SeriesInstanceUID), str(capture[0].SeriesInstanceUID)}
    listed = {s["series_instance_uid"]: s for s in node.ask("series", "list")}
    assert {listed[uid]["state"] for uid in ours} == {"ignored"}
    assert all(listed[uid]["reason"] for uid in ours)
    assert node.jobs() == before


def test_our_own_output_that_comes_back_starts_nothing(
    node: ServedNode, archive: Archive, tmp_path: Path
) -> None:
    sent = make_series("MR", slices=2, study="loop")
    send(node, write_series(sent, tmp_path / "in"))
    uid = str(sent[0].SeriesInstanceUID)
    node.wait_for_delivery(uid)
    before = node.jobs()
    (job,) = [j for j in before if j["series_instance_uid"] == uid]
    outputs = node.ask("jobs", "show", str(job["id"]))["outputs"]
    send(node, [node.config.parent / "spool" / output["path"] for output in outputs])
    derived = job["derived_series_instance_uid"]
    (back,) = [s for s in node.ask("series", "list") if s["series_instance_uid"] == derived]
    assert back["state"] == "ignored"
    assert "our own output" in back["reason"]
    assert node.jobs() == before


def test_kill_9_of_the_restore_process_in_the_middle_changes_nothing(
    tmp_path: Path, bundle: Path
) -> None:
    sent = make_series("CT", slices=16, rows=64, study="killed")
    paths = write_series(sent, tmp_path / "in")
    with serving(Archive()) as archive:
        to = {"pacs": f"ARCHIVE@127.0.0.1:{archive.port}"}
        config = initialise(tmp_path / "n", bundle, to)
        undisturbed = command("restore", tmp_path / "in", tmp_path / "calm", config=config)
        assert undisturbed.returncode == 0, undisturbed.stderr
        expected = {path.stem for path in (tmp_path / "calm").rglob("*.dcm")}
        with served(config) as node:
            send(node, paths)
            until(lambda: node.events("job_started"), "the job runs", limit_s=60)
            os.kill(node.child("restore"), signal.SIGKILL)
            until(lambda: len(node.events("job_started")) == 2, "it runs again", limit_s=120)
            outgoing = config.parent / "spool" / "outgoing"
            until(lambda: list(outgoing.rglob("*.dcm")), "the first file is there", limit_s=120)
            os.kill(node.child("restore"), signal.SIGKILL)
            node.wait_for_delivery(str(sent[0].SeriesInstanceUID))
            (job,) = node.jobs()
            assert job["instances"] == 16
            code, seconds = node.stop()
    assert set(archive.stored) == expected
    assert archive.asked == len(expected) == 16
    assert code == 0
    assert seconds < 10


def test_sigterm_while_a_job_runs_gives_it_back_and_exits_0_within_10_seconds(
    tmp_path: Path, bundle: Path
) -> None:
    sent = make_series("CT", slices=40, rows=96, study="drained")
    config = initialise(tmp_path / "n", bundle, {})
    with served(config) as node:
        children = [node.child(role) for role in ("receive", "restore", "deliver")]
        send(node, write_series(sent, tmp_path / "in"))
        until(lambda: node.events("job_started"), "the job runs", limit_s=60)
        code, seconds = node.stop()
        assert (code, seconds < 10) == (0, True), seconds
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        (job,) = node.jobs()
        assert job["state"] == "queued"


def test_a_port_that_is_taken_ends_serve_with_the_reason(tmp_path: Path, bundle: Path) -> None:
    config = initialise(tmp_path / "n", bundle, {})
    port = listening_port(config)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = command("serve", config=config)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_a_bundle_that_is_missing_ends_serve_with_the_reason(tmp_path: Path) -> None:
    config = initialise(tmp_path / "n", "no-such-bundle", {})
    done = command("serve", config=config)
    assert done.returncode == 1
    assert "engine: " in done.stderr
    assert "no-such-bundle" in done.stderr
