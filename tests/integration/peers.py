"""Real peers on loopback and what the integration tests send to them."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.dsutils import split_dataset
from pynetdicom.events import Event
from sqlalchemy import Engine

from dicom_node.association import (
    Peer,
    configure_protocol,
    connection_of,
    contexts_for,
    contexts_scp,
)
from dicom_node.ledger import intake, queue, reports
from dicom_node.ledger.tables import SeriesState
from dicom_node.requestor import keep_answers
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from dicom_node.storage_scu import Sendable
from tests.unit.dicom_node.ledger.examples import judged

STORESCU = "/usr/bin/storescu"
DCMSEND = "/usr/bin/dcmsend"
STORESCP = "/usr/bin/storescp"
CT = "1.2.840.10008.5.1.4.1.1.2"
ROOT = "1.2.826.0.1.3680043.10.511"


def reserve_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str, limit_s: float = 20.0) -> Any:
    """Poll until *condition* gives something true; AssertionError names what did not come."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} within {limit_s:g} s")


def ct_slice(number: int, *, series: int = 1, **changes: Any) -> Dataset:
    """One small CT image; *changes* are attributes by keyword."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CT, f"{ROOT}.1.{series}.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{ROOT}.1", f"{ROOT}.1.{series}"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientName, dataset.PatientID = "Phantom^Test", "PHANTOM"
    dataset.InstanceNumber = number
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 16, 12, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    pixels = np.arange(16 * 12, dtype="<i2") + 100 * number
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return dataset


def write(dataset: Dataset, path: Path) -> Path:
    """Write a PS3.10 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def data_set_bytes(path: Path) -> bytes:
    """The bytes of a file behind its meta information: what a C-STORE transfers."""
    _, offset = split_dataset(path)
    return path.read_bytes()[offset:]


def series_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix == ".dcm")


@dataclass
class Node:
    """Our own receiving side in this process, on a spool and a ledger of its own."""

    settings: NodeSettings
    spool: Spool
    ledger: Engine
    scp: StorageSCP

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self.scp.address[1]

    def peer(self, calling_ae: str = "TESTER", **limits: Any) -> Peer:
        """The node as a sender configures it."""
        return Peer("DIFFCODE", "127.0.0.1", self.port, calling_ae, **limits)

    def instances(self, state: str | None = None) -> list[dict[str, Any]]:
        """The ledger's rows of received instances."""
        return reports.instances(self.ledger, state=state)

    def stored(self) -> set[bytes]:
        """The data sets of every file in the spool's incoming folder."""
        files = (self.spool.root / "incoming").glob("??/*.dcm")
        return {data_set_bytes(path) for path in files}

    def quarantined(self) -> list[Path]:
        """The files set aside."""
        return sorted((self.spool.root / "quarantine").glob("*.dcm"))

    def all_released(self) -> bool:
        """Whether no association is open in the ledger."""
        progress = intake.series_progress(self.ledger)
        return all(one.open_associations == 0 for one in progress)


@contextmanager
def connected(peer: Peer, paths: Iterable[Path]) -> Generator[Association]:
    """A raw association of a test sender that proposes what *paths* need, and nothing of ours."""
    configure_protocol()
    items = [Sendable.of(path) for path in paths]
    contexts = contexts_for((one.sop_class_uid, one.transfer_syntax_uid) for one in items)
    entity = AE(ae_title=peer.calling_ae)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 20
    association = entity.associate(peer.host, peer.port, contexts, ae_title=peer.ae_title)
    assert association.is_established
    # Else an answer of ours is lost now and then on a busy machine, by the sender's own fault.
    keep_answers(association)
    connection = connection_of(association)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()
        if connection is not None:
            # pynetdicom forgets the socket of a connection that was reset.
            connection.close()


def statuses(association: Association, paths: Iterable[Path]) -> list[int]:
    """Send files one by one; the status of each."""
    return [int(association.send_c_store(path).Status) for path in paths]


def run_sender(command: Sequence[str | Path], limit_s: float = 60.0) -> str:
    """Run a peer's sender to its end; AssertionError with its words when it fails."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=limit_s
    )
    words = done.stdout + done.stderr
    assert done.returncode == 0, words
    return words


@contextmanager
def running(command: Sequence[str | Path], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A peer's server process, ended by its own handle."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def listens(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Orthanc asks it of each instance before it looks whether it has one of the same UID.
_ARRIVALS = """
function ReceivedInstanceFilter(dicom, origin)
  local file = io.open("{path}", "a")
  file:write(dicom.SOPInstanceUID, "\\n")
  file:close()
  return true
end
"""


@dataclass
class Orthanc:
    """A running Orthanc with an empty storage, and its REST interface."""

    dicom_port: int
    http_port: int
    folder: Path

    def get(self, path: str) -> Any:
        """A JSON resource."""
        return json.loads(self.raw(path))

    def raw(self, path: str) -> bytes:
        """A resource's bytes."""
        with urllib.request.urlopen(self._url(path), timeout=20) as answer:
            return bytes(answer.read())

    def put(self, path: str, value: Any, method: str = "PUT") -> bytes:
        """Send a JSON value."""
        return self._send(path, json.dumps(value).encode(), method)

    def upload(self, path: Path) -> None:
        """Store a DICOM file."""
        self._send("/instances", path.read_bytes(), "POST")

    def _send(self, path: str, body: bytes | None, method: str) -> bytes:
        request = urllib.request.Request(self._url(path), body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def stores(self) -> Counter[str]:
        """How often each SOP Instance has come, again under the same UID included."""
        return Counter(self._arrivals.read_text().split())

    def forget(self) -> None:
        """Remove every patient, and forget what has come."""
        for patient in self.get("/patients"):
            self._send(f"/patients/{patient}", None, "DELETE")
        self._arrivals.write_text("")

    def write_configuration(self, **changes: Any) -> Path:
        """Write its configuration, but for *changes*, with a script that notes what comes."""
        self._arrivals.write_text("")
        script = self.folder / "arrivals.lua"
        script.write_text(_ARRIVALS.format(path=self._arrivals))
        given = orthanc_configuration(self.folder, self.dicom_port, self.http_port)
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps({**given, "LuaScripts": [str(script)], **changes}))
        return path

    @property
    def _arrivals(self) -> Path:
        return self.folder / "arrivals.txt"

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return bool(self.get("/system"))
        except OSError:
            return False

    def files(self) -> dict[str, bytes]:
        """Every stored instance as a file, by SOP Instance UID."""
        found = {}
        for identifier in self.get("/instances"):
            found[self._uid(identifier)] = self.raw(f"/instances/{identifier}/file")
        return found

    def _uid(self, identifier: str) -> str:
        tags = self.get(f"/instances/{identifier}")["MainDicomTags"]
        return str(tags["SOPInstanceUID"])

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"


def orthanc_configuration(folder: Path, dicom_port: int, http_port: int) -> dict[str, Any]:
    """A configuration of its own: nothing is shared with an Orthanc that the machine may run."""
    return {
        "Name": "integration",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [],
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "DicomCheckCalledAet": False,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowEcho": True,
        "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowFind": True,
        "TcpNoDelay": True,
        "StableAge": 1,
    }


@contextmanager
def running_orthanc(program: Path, folder: Path, **changes: Any) -> Generator[Orthanc]:
    """An Orthanc with a configuration, but for *changes*, and a storage in *folder*."""
    orthanc = Orthanc(reserve_port(), reserve_port(), folder)
    configuration = orthanc.write_configuration(**changes)
    log = folder / "orthanc.log"
    with running([program, configuration], log) as process:
        until(lambda: orthanc.is_up() or process.poll() is not None, "Orthanc answers", limit_s=60)
        assert process.poll() is None, log.read_text()
        yield orthanc


Script = Callable[[int, Event], int | None]


@dataclass
class Archive:
    """A scripted C-STORE SCP: keeps what it stores, and counts each instance."""

    script: Script = lambda number, event: 0x0000
    received: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def on_store(self, event: Event) -> int:
        """Answer as the script says for the running number (from 1) of the request."""
        uid = str(event.request.AffectedSOPInstanceUID)
        with self.lock:
            self.asked += 1
            status = self.script(self.asked, event)
            if status is None:
                return 0x0110
            self.received.append(uid)
            if status == 0 or status & 0xF000 == 0xB000:
                self.stored[uid] = event.encoded_dataset(include_meta=False)
        return status


@contextmanager
def serving(
    archive: Archive,
    *,
    syntaxes: Sequence[str] | None = None,
    calling: Sequence[str] = (),
    port: int = 0,
) -> Generator[Archive]:
    """Run a scripted archive; *calling* restricts whom it accepts."""
    configure_protocol()
    entity = AE(ae_title="ARCHIVE")
    entity.require_calling_aet = list(calling)
    contexts = contexts_scp()
    if syntaxes is not None:
        contexts = [build_context(CT, list(syntaxes))]
    server = entity.start_server(
        ("127.0.0.1", port),
        block=False,
        contexts=contexts,
        evt_handlers=[(evt.EVT_C_STORE, archive.on_store)],
    )
    archive.port = int(server.server_address[1])
    try:
        yield archive
    finally:
        server.shutdown()


def outgoing_series(
    node: Node, destinations: Sequence[str], *, slices: int = 5, series: int = 7
) -> list[Path]:
    """A restored series in the spool with a delivery for each destination, as a job leaves it."""
    now, uid = 1_700_000_000.0, f"{ROOT}.1.{series}"
    sources = tuple(f"{uid}.0.{number}" for number in range(slices))
    for source in sources:
        kept = node.spool.write(source.encode())
        intake.record_instance(
            node.ledger,
            intake.ReceivedInstance(
                source, CT, f"{ROOT}.1", uid, "CT", str(ExplicitVRLittleEndian), *_stored(kept)
            ),
            now,
        )
    job = queue.NewJob(uid, "all", "ct_denoise", tuple(destinations), sources, "test")
    queue.enqueue(
        node.ledger,
        uid,
        series_state=SeriesState.COMPLETE,
        reason=None,
        jobs=[job],
        instances_seen=slices,
        now=now,
    )
    claimed = queue.claim(node.ledger, "test", lease_s=60, now=now)
    assert claimed is not None
    outputs = [
        _output(node, source, number, series) for number, source in enumerate(sources, start=1)
    ]
    assert queue.finish(
        node.ledger,
        claimed.id,
        "test",
        judged=judged(*destinations),
        outputs=outputs,
        derived_series_instance_uid=f"{ROOT}.2.{series}",
        model_sha256="0" * 64,
        seconds={},
        note=None,
        now=now,
    )
    return [node.spool.resolve(output.path) for output in outputs]


def _stored(kept: Any) -> tuple[str, str, int]:
    return kept.path, kept.sha256, kept.size


def _output(node: Node, source: str, number: int, series: int) -> queue.Output:
    from io import BytesIO

    dataset = ct_slice(number, series=series + 1000)
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    uid = str(dataset.SOPInstanceUID)
    kept = node.spool.write_outgoing(str(dataset.SeriesInstanceUID), uid, buffer.getvalue())
    return queue.Output(uid, CT, source, *_stored(kept))
