"""The programs around the node: the archive that receives, the scanner that sends."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, StoragePresentationContexts, build_context, evt
from pynetdicom.presentation import PresentationContext

SENDER_TITLE = "PHANTOMS"
# DCMTK's: a virtual environment has pynetdicom's programs of the same names first on its PATH.
STORESCU = Path("/usr/bin/storescu")
ORTHANC_PLACES = ("/usr/sbin/Orthanc", "/usr/local/sbin/Orthanc", "/opt/orthanc/bin/Orthanc")


class SendError(Exception):
    """A sender reported that not every instance was stored."""


class Archive(Protocol):
    """A destination of restored series, open for as long as the program runs."""

    name: str
    ae_title: str
    port: int

    def fetch(self, series_instance_uid: str, folder: Path) -> tuple[Path, ...]:
        """Write the instances of a series that the archive has into *folder*."""


def free_ports(count: int) -> tuple[int, ...]:
    """TCP ports on the loopback interface that nothing listens on, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return tuple(probe.getsockname()[1] for probe in probes)


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Return when something listens on *port*; raise RuntimeError if the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with exit code {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port} after {seconds:.0f} s")


def start(
    command: Sequence[str | Path], log: IO[bytes], variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that writes to *log* and ends when this one does, however it ends."""
    return subprocess.Popen(
        list(map(str, command)),
        stdout=log,
        stderr=log,
        env={**os.environ, **(variables or {})},
        preexec_fn=_end_with_parent,
    )


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _end_with_parent() -> None:
    # Runs between fork and exec, where nothing may be imported or locked.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[bytes], seconds: float = 20.0) -> int:
    """End a program by SIGTERM, by SIGKILL after *seconds*; return its exit code."""
    process.terminate()
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextmanager
def open_archive(folder: Path, *, own: bool = False) -> Iterator[Archive]:
    """Run Orthanc where it is installed, else a storage SCP of our own."""
    folder.mkdir(parents=True, exist_ok=True)
    program = None if own else find_orthanc()
    with _orthanc(program, folder) if program else _storage_scp(folder) as archive:
        yield archive


def find_orthanc() -> Path | None:
    """The Orthanc server's executable, or None."""
    places = [*ORTHANC_PLACES, shutil.which("Orthanc") or ""]
    return next((Path(place) for place in places if place and os.access(place, os.X_OK)), None)


class OrthancArchive:
    """An Orthanc that is running; read through its REST interface."""

    def __init__(self, dicom_port: int, http_port: int) -> None:
        self.ae_title = "ORTHANC"
        self.port = dicom_port
        self._root = f"http://127.0.0.1:{http_port}"
        self.name = f"Orthanc {json.loads(self._get('/system'))['Version']}"

    def fetch(self, series_instance_uid: str, folder: Path) -> tuple[Path, ...]:
        """Write the instances of a series that the archive has into *folder*."""
        folder.mkdir(parents=True, exist_ok=True)
        query = {"Level": "Instance", "Query": {"SeriesInstanceUID": series_instance_uid}}
        found: list[str] = json.loads(self._get("/tools/find", query))
        paths = tuple(folder / f"{identifier}.dcm" for identifier in sorted(found))
        for path in paths:
            path.write_bytes(self._get(f"/instances/{path.stem}/file"))
        return paths

    def _get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self._root + path, data, timeout=30) as answer:
            content: bytes = answer.read()
        return content


def _orthanc_configuration(folder: Path, dicom_port: int, http_port: int) -> dict[str, Any]:
    return {
        "Name": "Main job",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "Plugins": [],
    }


@contextmanager
def _orthanc(program: Path, folder: Path) -> Iterator[OrthancArchive]:
    folder = folder.resolve()
    dicom_port, http_port = free_ports(2)
    configuration = folder / "orthanc.json"
    configuration.write_text(json.dumps(_orthanc_configuration(folder, dicom_port, http_port)))
    with (folder / "orthanc.log").open("wb") as log:
        process = start([program, configuration], log)
        try:
            wait_for_port(dicom_port, process)
            wait_for_port(http_port, process)
            yield OrthancArchive(dicom_port, http_port)
        finally:
            stop(process)


class OwnArchive:
    """A storage SCP in this process that keeps each instance as a file."""

    def __init__(self, folder: Path, port: int) -> None:
        self.name = "own storage SCP"
        self.ae_title = "ARCHIVE"
        self.port = port
        self._folder = folder

    def store(self, event: evt.Event) -> int:
        """Answer a C-STORE: the file lies on the disk before the status goes out."""
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        series = self._folder / str(dataset.SeriesInstanceUID)
        series.mkdir(exist_ok=True)
        dataset.save_as(series / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
        return 0x0000

    def fetch(self, series_instance_uid: str, folder: Path) -> tuple[Path, ...]:
        """Copy the instances of a series that the archive has into *folder*."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = sorted((self._folder / series_instance_uid).glob("*.dcm"))
        return tuple(Path(shutil.copy(path, folder)) for path in stored)


@contextmanager
def _storage_scp(folder: Path) -> Iterator[OwnArchive]:
    (port,) = free_ports(1)
    archive = OwnArchive(folder, port)
    entity = AE(ae_title=archive.ae_title)
    entity.supported_contexts = StoragePresentationContexts
    entity.add_supported_context("1.2.840.10008.1.1")
    handlers: list[Any] = [(evt.EVT_C_STORE, archive.store)]
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    try:
        yield archive
    finally:
        if server is not None:
            server.shutdown()


def send(paths: Sequence[Path], *, ae_title: str, port: int) -> str:
    """Send files to the node by C-STORE; return the name of the sender that was used.

    DCMTK's `storescu` goes first; it is left aside for compressed files, whose transfer syntaxes
    it wants to be told one by one. Raises SendError.
    """
    headers = [dcmread(path, stop_before_pixels=True) for path in paths]
    plain = all(_transfer_syntax(header) in _UNCOMPRESSED for header in headers)
    if plain and os.access(STORESCU, os.X_OK):
        _send_by_dcmtk(paths, ae_title, port)
        return "DCMTK storescu"
    _send_by_pynetdicom(paths, headers, ae_title, port)
    return "pynetdicom SCU"


_UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)


def _transfer_syntax(header: Dataset) -> str:
    return str(header.file_meta.TransferSyntaxUID)


def _send_by_dcmtk(paths: Sequence[Path], ae_title: str, port: int) -> None:
    titles = ["-aet", SENDER_TITLE, "-aec", ae_title]
    command = [str(STORESCU), *titles, "127.0.0.1", str(port), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SendError(f"storescu: {(done.stderr or done.stdout).strip()}")


def _contexts(headers: Sequence[Dataset]) -> list[PresentationContext]:
    kinds = Counter((str(header.SOPClassUID), _transfer_syntax(header)) for header in headers)
    # PS3.8 9.3.2.2: an association has at most 128 presentation contexts.
    return [build_context(sop_class, syntax) for (sop_class, syntax), _ in kinds.most_common(128)]


def _send_by_pynetdicom(
    paths: Sequence[Path], headers: Sequence[Dataset], ae_title: str, port: int
) -> None:
    entity = AE(ae_title=SENDER_TITLE)
    entity.requested_contexts = _contexts(headers)
    association = entity.associate("127.0.0.1", port, ae_title=ae_title)
    if not association.is_established:
        raise SendError(f"{ae_title} on port {port} accepted no association")
    try:
        for path in paths:
            status = association.send_c_store(path).get("Status")
            if status != 0x0000:
                raise SendError(f"{path.name}: C-STORE status {status!r}")
    finally:
        association.release()
