"""Senders that do not give up, and the books in which they keep what was acknowledged."""

from __future__ import annotations

import gc
import hashlib
import queue
import re
import sqlite3
import subprocess
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association

from dicom_node.association import configure_protocol, connection_of
from dicom_node.settings import NodeSettings
from tests.integration.peers import CT, ROOT, STORESCU, ct_slice, data_set_bytes, listens

# PS3.5 9.1: 64 characters at most. The running number has a fixed length, so that a file of the
# supply is made by replacing it in a template.
_DIGITS = "9" * 12

_STORE_RESPONSE = re.compile(r"Received Store Response \((.*)\)")
_STATUS = re.compile(r"0x([0-9A-Fa-f]{4})")


def instance_uid(number: int) -> str:
    """The SOP Instance UID of an instance of the supply."""
    return f"{ROOT}.7.{_running(number)}"


def _running(number: int) -> str:
    return f"1{number:011d}"


@dataclass(frozen=True)
class Item:
    """A file to send, and the digest of its data set."""

    path: Path
    sop_instance_uid: str
    sha256: str


class Supply:
    """Small CT instances without end, each with a UID and a pixel of its own; from any thread."""

    def __init__(
        self, folder: Path, *, per_series: int = 50, rows: int = 16, first: int = 0
    ) -> None:
        """*rows* sets the size: rows × rows × 2 bytes of pixels; *first* is the first number."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._per_series = folder, per_series
        dataset = ct_slice(1, SOPInstanceUID=f"{ROOT}.7.{_DIGITS}")
        dataset.SeriesInstanceUID = f"{ROOT}.8.{_DIGITS}"
        dataset.Rows = dataset.Columns = rows
        dataset.PixelData = bytes(2 * rows * rows)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        self._template = buffer.getvalue()
        # PS3.10 7.1: preamble, prefix, and Group Length of the meta information as first element.
        self._offset = 144 + int.from_bytes(self._template[140:144], "little")
        self._next = first
        self._back: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def take(self) -> Item:
        """The next instance to send: one that was given back, else a new one."""
        try:
            return self._back.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            number, self._next = self._next, self._next + 1
        return self._write(number)

    def give_back(self, item: Item) -> None:
        """An instance that was not acknowledged, to be sent again."""
        self._back.put(item)

    def _write(self, number: int) -> Item:
        series = _running(number // self._per_series)
        data = self._template.replace(f"{ROOT}.8.{_DIGITS}".encode(), f"{ROOT}.8.{series}".encode())
        data = data.replace(f"{ROOT}.7.{_DIGITS}".encode(), instance_uid(number).encode())
        path = self._folder / f"{instance_uid(number)}.dcm"
        data = data[:-8] + number.to_bytes(8, "little")
        path.write_bytes(data)
        return Item(path, instance_uid(number), hashlib.sha256(data[self._offset :]).hexdigest())


@dataclass
class Books:
    """What has been answered 0x0000, and what has been answered otherwise."""

    #: Digest of the data set that was sent, by SOP Instance UID.
    acknowledged: dict[str, str] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)
    again: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, item: Item, status: int | None) -> bool:
        """Enter an answer (None: the association ended first); whether it is a success."""
        with self.lock:
            if status == 0x0000:
                self.acknowledged[item.sop_instance_uid] = item.sha256
            elif status is None:
                self.again += 1
            else:
                self.failures[status] += 1
        return status == 0x0000

    def entries(self) -> list[tuple[str, str]]:
        """The acknowledged instances so far."""
        with self.lock:
            return list(self.acknowledged.items())


class _Sending(threading.Thread):
    """Sends from a supply over one association after another until told to stop."""

    def __init__(
        self, supply: Supply, books: Books, port: int, name: str, *, per_association: int = 200
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._supply, self._books, self._port = supply, books, port
        self._per_association = per_association
        self._enough = threading.Event()
        self.trouble: BaseException | None = None

    def run(self) -> None:
        """Associate and send, again and again."""
        try:
            while not self._enough.is_set():
                if listens(self._port):
                    self._associate()
                else:
                    self._enough.wait(0.01)
        except BaseException as error:
            self.trouble = error

    def _associate(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Release after the instance in hand; AssertionError when the thread has failed."""
        self._enough.set()
        self.join(60)
        # pynetdicom forgets the socket of a connection that is refused.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        assert not self.is_alive(), f"{self.name} still sends"
        assert self.trouble is None, repr(self.trouble)


class Sender(_Sending):
    """pynetdicom's SCU."""

    def __init__(
        self, supply: Supply, books: Books, port: int, name: str, *, per_association: int = 200
    ) -> None:
        super().__init__(supply, books, port, name, per_association=per_association)
        self._entity = AE(ae_title=name)
        self._entity.add_requested_context(CT, ExplicitVRLittleEndian)
        self._entity.acse_timeout = self._entity.dimse_timeout = 30
        configure_protocol()

    def _associate(self) -> None:
        association = self._entity.associate("127.0.0.1", self._port, ae_title="DIFFCODE")
        connection = connection_of(association)
        for _ in range(self._per_association * association.is_established):
            if self._enough.is_set() or not self._send(association, self._supply.take()):
                break
        if association.is_established:
            association.release()
        if connection is not None:
            connection.close()

    def _send(self, association: Association, item: Item) -> bool:
        """Send one instance; False when the association has ended under it."""
        try:
            answer = association.send_c_store(item.path)
        except RuntimeError:  # it ended before the request
            answer = None
        status = None if answer is None or "Status" not in answer else int(answer.Status)
        if self._books.note(item, status):
            item.path.unlink()
        else:
            self._supply.give_back(item)
        return status is not None


class Storescu(_Sending):
    """DCMTK's storescu, a process for each association; what it was answered it says itself."""

    def __init__(self, supply: Supply, books: Books, port: int, name: str) -> None:
        # Its files are written before it starts: few, so that it sends most of the time.
        super().__init__(supply, books, port, name, per_association=40)

    def _associate(self) -> None:
        items = [self._supply.take() for _ in range(self._per_association)]
        command = ["-v", "-aet", self.name, "-aec", "DIFFCODE", "127.0.0.1", str(self._port)]
        process = subprocess.Popen(
            [STORESCU, *command, *(str(item.path) for item in items)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout as said:
            in_flight = self._follow(said, items)
        process.wait(60)
        if in_flight is not None:
            self._books.note(in_flight, None)
        for item in [*([in_flight] if in_flight is not None else []), *items]:
            self._supply.give_back(item)

    def _follow(self, said: Iterable[str], items: list[Item]) -> Item | None:
        """Enter each answer as it comes; *items* keeps what was not sent, the one in flight is
        returned.
        """
        sent: Item | None = None
        for line in said:
            if "Sending file:" in line:
                assert sent is None, line
                sent = items.pop(0)
                assert line.rstrip().endswith(str(sent.path)), line
            elif (answer := _STORE_RESPONSE.search(line)) is not None:
                assert sent is not None, line
                self._enter(sent, answer[1])
                sent = None
        return sent

    def _enter(self, item: Item, words: str) -> None:
        # Of other statuses than Success it gives the number behind the words.
        number = _STATUS.search(words)
        status = 0x0000 if words == "Success" else int(number[1], 16) if number else 0xFFFF
        if self._books.note(item, status):
            item.path.unlink()
        else:
            self._supply.give_back(item)


@dataclass
class Auditor:
    """Compares books with what lies in the spool and the ledger, read without the node's code."""

    settings: NodeSettings
    seen: dict[str, str] = field(default_factory=dict)
    visible: set[str] = field(default_factory=set)

    def nothing_half_written(self) -> None:
        """Every file that has appeared in incoming/ since the last look is whole."""
        for path in (self.settings.spool.path / "incoming").glob("??/*"):
            if path.name in self.visible:
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert path.name == f"{digest}.dcm", f"{path.name} has the digest {digest}"
            self.visible.add(path.name)

    def all_there_once(self, acknowledged: Iterable[tuple[str, str]]) -> int:
        """Each acknowledged instance has one valid row, and its file the bytes that were sent."""
        count = 0
        rows = self.rows()
        for uid, sent in acknowledged:  # the digest of the data set
            found = rows.get(uid, [])
            assert [state for state, *_ in found] == ["received"], f"{uid}: {found}"
            _, path, sha256 = found[0]
            if self.seen.get(uid) != sha256:
                kept = self.settings.spool.path / path
                assert hashlib.sha256(kept.read_bytes()).hexdigest() == sha256, uid
                assert hashlib.sha256(data_set_bytes(kept)).hexdigest() == sent, uid
                self.seen[uid] = sha256
            count += 1
        return count

    def rows(self) -> dict[str, list[tuple[str, str, str]]]:
        """State, path and digest of every row, by SOP Instance UID."""
        query = "SELECT sop_instance_uid, state, path, sha256 FROM instances"
        rows: dict[str, list[tuple[str, str, str]]] = {}
        with closing(sqlite3.connect(database_of(self.settings), timeout=20)) as connection:
            for uid, *rest in connection.execute(query):
                rows.setdefault(uid, []).append((rest[0], rest[1], rest[2]))
        return rows

    def orphans(self) -> set[str]:
        """Files in incoming/ that no row names."""
        named = {path for rows in self.rows().values() for _, path, _ in rows}
        return {f"incoming/{name[:2]}/{name}" for name in self._names()} - named

    def temporary(self) -> list[Path]:
        """Files that were being written."""
        return sorted((self.settings.spool.path / "temporary").iterdir())

    def _names(self) -> Iterator[str]:
        return (path.name for path in (self.settings.spool.path / "incoming").glob("??/*"))


def database_of(settings: NodeSettings) -> str:
    """The file of a SQLite ledger."""
    return settings.ledger.url.removeprefix("sqlite:///")
