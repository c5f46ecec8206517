"""The loop that one writes in an afternoon: pynetdicom, and the model slice by slice.

It stores what comes, and once the association has ended restores and sends slice after slice. It
judges nothing, keeps nothing after a crash, and writes the source's header with new UIDs.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.events import Event

from benchmarks.receivers import DCMTK, free_port
from benchmarks.restored_series import Series


@dataclass(frozen=True)
class Archive:
    """DCMTK's storescp, which stores without a flush."""

    port: int


@dataclass(frozen=True)
class Run:
    """Seconds of the naive loop; *model* is that of the network and nothing else."""

    after_last: float
    load: float
    model: float
    derive: float
    send: float


@contextmanager
def storescp(folder: Path) -> Generator[Archive]:
    """Run an archive in a folder."""
    folder.mkdir(parents=True)
    port = free_port()
    command = [str(DCMTK / "storescp"), "-aet", "ARCHIVE", "-od", str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield Archive(port)
    finally:
        process.terminate()
        process.wait(20)


def send(paths: list[Path], port: int, title: str, rate: float | None) -> float:
    """Send files by one association, so many a second or None; when the last was answered."""
    entity = AE(ae_title="SCANNER")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", port, ae_title=title)
    if not association.is_established:
        raise SystemExit("the receiver did not accept the association")
    begun = time.monotonic()
    for number, path in enumerate(paths):
        if rate is not None:
            time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        status = association.send_c_store(path)
        if status.get("Status") != 0:
            raise SystemExit(f"slice {number} was not stored: {status}")
    last = time.time()
    association.release()
    return last


def measure(folder: Path, bundle: Path, series: Series, threads: int) -> Run:
    """Send a series to the loop and wait until it has sent the last result.

    It does nothing with a slice before the last has come, so none is waited for.
    """
    from restoration.restorer import Restorer

    restorer = Restorer.open(bundle, device="cpu", threads=threads)
    kept = folder / "naive"
    kept.mkdir()
    ended = threading.Event()

    def store(event: Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        dataset.save_as(kept / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
        return 0x0000

    entity = AE(ae_title="NAIVE")
    entity.add_supported_context(CTImageStorage, ExplicitVRLittleEndian)
    handlers = [(evt.EVT_C_STORE, store), (evt.EVT_RELEASED, lambda _: ended.set())]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        with storescp(folder / "naive-archive") as archive:
            paths = series.write(folder / "naive-sent")
            last = send(paths, server.server_address[1], "NAIVE", None)
            ended.wait()
            return _restored(kept, restorer, archive, last)
    finally:
        server.shutdown()


def _restored(kept: Path, restorer: object, archive: Archive, last: float) -> Run:
    from restoration.restorer import Restorer

    assert isinstance(restorer, Restorer)
    entity = AE(ae_title="NAIVE")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", archive.port, ae_title="ARCHIVE")
    uid, spent = generate_uid(), dict.fromkeys(("load", "model", "derive", "send"), 0.0)
    for path in sorted(kept.iterdir()):
        at = [time.perf_counter()]
        dataset = dcmread(path)
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        image = (dataset.pixel_array * slope + intercept).astype(np.float32)
        at.append(time.perf_counter())
        restored = restorer.restore(image[None], "ct_denoise").volume[0]
        at.append(time.perf_counter())
        stored = np.clip((restored - intercept) / slope, 0, 4095).round().astype("<u2")
        dataset.PixelData = stored.tobytes()
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid, generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        at.append(time.perf_counter())
        status = association.send_c_store(dataset)
        if status.get("Status") != 0:
            raise SystemExit("the archive did not store a result")
        at.append(time.perf_counter())
        for name, begun, end in zip(spent, at, at[1:], strict=False):
            spent[name] += end - begun
    done = time.time()
    association.release()
    return Run(done - last, **spent)


def _wait_for(port: int) -> None:
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit("the archive does not listen")
