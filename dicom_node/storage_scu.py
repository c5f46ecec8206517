"""C-STORE and C-ECHO as SCU: files to one peer, with an answer for each instance (PS3.4 A, B).

A :class:`StoreLink` keeps its association for the next series to the same peer.  Bytes go out as
they lie on disk (:mod:`dicom_node.store_requests`).  Only where the peer does not take their
transfer syntax are they decoded for it, pixel values unchanged.  Nothing here knows the ledger.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    UncompressedTransferSyntaxes,
)
from pynetdicom import build_context
from pynetdicom.association import Association
from pynetdicom.dsutils import encode, split_dataset

from dicom_node.association import MAX_CONTEXTS, VERIFICATION, Peer, contexts_for
from dicom_node.dicom.header import quiet_pydicom, text, valid_uid
from dicom_node.errors import NodeError, PermanentError, UnreadableInstanceError
from dicom_node.requestor import associate
from dicom_node.store_requests import Loan, StoreRequest

Outcome = Literal["delivered", "retry", "dead"]

_SOP_CLASS_NOT_SUPPORTED = 0x0122
# The time-out for an answer runs from the first byte sent: large objects need more than small.
_SLOWEST_RATE = 256 * 1024  # bytes per second
# What an instance is encoded in where the peer does not take it as it is stored.
_PLAIN = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))

# Where the first element of the file meta information is: DICM, (0002,0000) UL of four bytes.
_META, _META_BEGIN = b"DICM\x02\x00\x00\x00UL\x04\x00", 144

# PS3.7 C.4 and C.5, PS3.4 B.2.3.  0x0111 is a duplicate: it has the instance already.
_STORED = frozenset({0x0000, 0x0001, 0x0107, 0x0111, 0x0116})
# 0x0110 processing failure, 0x0213 resource limitation, 0xFE00 cancelled.
_PASSING = frozenset({0x0110, 0x0213, 0xFE00})


def classify_status(status: int | None) -> Outcome:
    """What a C-STORE status means for the instance; None is no answer (abort, time-out).

    Warnings (0xBxxx) have been stored.  Out of resources (0xA7xx) passes; a data set that does
    not match (0xA9xx), is not understood (0xCxxx) or whose class is refused (0x01xx) stays so.
    """
    if status is None or status in _PASSING or status & 0xFF00 == 0xA700:
        return "retry"
    if status in _STORED or status & 0xF000 == 0xB000:
        return "delivered"
    return "dead"


def is_out_of_resources(status: int | None) -> bool:
    """Whether the next instance would fare no better: no answer (abort, time-out), or no room."""
    return status is None or status == 0x0213 or status & 0xFF00 == 0xA700


@dataclass(frozen=True)
class Sendable:
    """One PS3.10 file to send, by what negotiation and the command set need to know.

    Where the meta information names another instance than the data set does, the data set is right.
    """

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str

    @classmethod
    def of(cls, path: Path) -> Sendable:
        """Read a file's identity; UnreadableInstanceError where it is no DICOM file."""
        try:
            with quiet_pydicom():
                head = dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID"])
        except Exception as error:
            raise UnreadableInstanceError(f"not a DICOM file ({type(error).__name__})") from None
        uids = (
            text(head, "SOPClassUID") or text(head.file_meta, "MediaStorageSOPClassUID"),
            text(head, "SOPInstanceUID") or text(head.file_meta, "MediaStorageSOPInstanceUID"),
        )
        syntax = text(head.file_meta, "TransferSyntaxUID")
        if not all(valid_uid(uid) for uid in (*uids, syntax)):
            raise UnreadableInstanceError("not a DICOM file with UIDs and a transfer syntax")
        return cls(path, *uids, syntax)


@dataclass(frozen=True)
class Sent:
    """The answer for one instance: its status (None: there was none) and what it means."""

    sop_instance_uid: str
    status: int | None
    outcome: Outcome
    why: str
    #: The peer's Error Comment: for the ledger, never for a log or a notice.
    comment: str = ""
    #: Another follows in any case: it came with this one, or its instance is on its way.
    more_follow: bool = False

    @property
    def words(self) -> str:
        """Why, with what the peer says."""
        return f"{self.why} ({self.comment})" if self.comment else self.why


def send_all(peer: Peer, items: Sequence[Sendable]) -> Generator[Sent]:
    """Send instances in order over as few associations as their contexts need.

    Ends early when the association is gone: what was not answered is simply not yielded.
    Raises DestinationError or DestinationRefusedError when no association could be opened.
    """
    link = StoreLink(peer)
    try:
        yield from link.send(items)
    finally:
        link.close()


class StoreLink:
    """Associations with one peer, one at a time, each for as many instances as it will take.

    The association outlives :meth:`send`, so that the next series goes over it too.  One thread.
    """

    def __init__(self, peer: Peer, *, instances: int | None = None) -> None:
        """*instances* is how many go over one association; None: any number."""
        self._peer = peer
        self._most = instances
        self._stack = ExitStack()
        self._association: Association | None = None
        self._loan: Loan | None = None
        self._proposed: frozenset[tuple[str, str]] = frozenset()
        self._sent = 0
        self._enough = False
        #: How many associations were opened.
        self.opened = 0

    def send(self, items: Sequence[Sendable]) -> Generator[Sent]:
        """Send instances in order; an answer for each.

        An answer is told while the next instance is on its way, so that what is done about it costs
        no time. Ends early when the association is gone: what was not answered is simply not
        yielded. Raises DestinationError or DestinationRefusedError when no association could be
        opened.
        """
        self._enough = False
        told: Sent | None = None
        is_under_way = False
        try:
            for item, kinds in _with_kinds(items):
                if told is not None and self._ends_with(told):
                    yield told
                    told = None
                    if self._enough or not self._is_established():
                        return
                try:
                    begun = self._begin(item, kinds)
                except NodeError:
                    if told is not None:
                        yield told
                    raise
                is_under_way = True
                if told is not None:
                    yield replace(told, more_follow=True)
                told, is_under_way = self._answered(item, begun), False
            if told is not None:
                yield told
        finally:
            self._give_back()
            if is_under_way and self._association is not None:
                self._association.abort()  # nobody is left to read its answer
            if not self._is_established():
                self.close()

    def enough(self) -> None:
        """Begin no other instance; the one that is on its way is answered still."""
        self._enough = True

    def close(self) -> None:
        """Release the association, where there is one."""
        self._give_back()
        self._association = None
        self._stack.close()

    def _ends_with(self, told: Sent) -> bool:
        """Whether who is told decides first if another is begun."""
        return self._enough or is_out_of_resources(told.status) or not self._is_established()

    def _is_established(self) -> bool:
        return self._association is not None and self._association.is_established

    def _begin(self, item: Sendable, kinds: frozenset[tuple[str, str]]) -> StoreRequest | Sent:
        """Send the request for one instance; an answer of our own where none can be sent."""
        association = self._ready(kinds)
        self._loan = self._loan or Loan(association)
        self._sent += 1
        with self._unbroken(association):
            return _requested(association, self._loan, item, message_id=self._sent % 65535 + 1)

    def _answered(self, item: Sendable, begun: StoreRequest | Sent) -> Sent:
        """The answer for one instance."""
        if isinstance(begun, Sent):
            return begun
        assert self._association is not None
        assert self._loan is not None
        with self._unbroken(self._association):
            answer = self._loan.answer(begun)
        status = None if answer is None else answer.status
        return Sent(
            item.sop_instance_uid,
            status,
            classify_status(status),
            _answer_words(status),
            "" if answer is None else answer.comment,
        )

    @contextmanager
    def _unbroken(self, association: Association) -> Iterator[None]:
        """Abort where a request has begun and will not end."""
        try:
            yield
        except BaseException:
            self._give_back()
            association.abort()
            raise

    def _give_back(self) -> None:
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.give_back()

    def _ready(self, kinds: frozenset[tuple[str, str]]) -> Association:
        """An association for instances of these SOP Classes and transfer syntaxes."""
        association = self._association
        # A peer may have ended it since the last series.
        is_open = association is not None and association.is_established
        is_full = self._most is not None and self._sent >= self._most
        if association is not None and is_open and not is_full and kinds <= self._proposed:
            return association
        self.close()
        association = self._stack.enter_context(associate(self._peer, contexts_for(sorted(kinds))))
        self._association, self._proposed, self._sent = association, kinds, 0
        self.opened += 1
        return association


def _with_kinds(
    items: Sequence[Sendable],
) -> Iterator[tuple[Sendable, frozenset[tuple[str, str]]]]:
    """Each instance with the kinds of all those that go over one association with it."""
    for batch in _batches(items):
        kinds = frozenset((one.sop_class_uid, one.transfer_syntax_uid) for one in batch)
        for item in batch:
            yield item, kinds


def _batches(items: Sequence[Sendable]) -> Iterator[list[Sendable]]:
    """Split where more than 128 presentation contexts would be needed: three for each kind."""
    batch: list[Sendable] = []
    kinds: set[tuple[str, str]] = set()
    for item in items:
        kind = (item.sop_class_uid, item.transfer_syntax_uid)
        if kind not in kinds and len(kinds) == MAX_CONTEXTS // 3:
            yield batch
            batch, kinds = [], set()
        kinds.add(kind)
        batch.append(item)
    if batch:
        yield batch


def _requested(
    association: Association, loan: Loan, item: Sendable, message_id: int
) -> StoreRequest | Sent:
    accepted = {
        str(context.transfer_syntax[0]): int(context.context_id or 0)
        for context in association.accepted_contexts
        if context.abstract_syntax == item.sop_class_uid
    }
    if not accepted:
        why = "the destination does not accept the SOP Class"
        return Sent(item.sop_instance_uid, _SOP_CLASS_NOT_SUPPORTED, "dead", why)
    try:
        data, size, syntax = _in_accepted_syntax(item, accepted)
    except PermanentError as error:
        return Sent(item.sop_instance_uid, error.dimse_status, "dead", error.message)
    # How long the answer may take, transfer included.
    limit = (association.dimse_timeout or 0.0) + size / _SLOWEST_RATE
    request = StoreRequest(
        accepted[syntax],
        message_id,
        item.sop_class_uid,
        item.sop_instance_uid,
        time.monotonic() + limit,
    )
    with data:
        loan.begin(request, data, size)
    return request


def _answer_words(status: int | None) -> str:
    if status is None:
        return "no answer: the association was aborted or timed out"
    return f"answered 0x{status:04X}"


def _in_accepted_syntax(item: Sendable, accepted: Mapping[str, int]) -> tuple[BinaryIO, int, str]:
    """The encoded data set, its size and transfer syntax: as stored where the peer takes that.

    Raises PermanentError where the peer takes no syntax that the instance can be given.
    """
    if not item.path.is_file():
        raise PermanentError("the file of the instance is missing")
    if item.transfer_syntax_uid in accepted:
        return _as_stored(item)
    dataset = _decoded(item)
    if not dataset.file_meta.TransferSyntaxUID.is_little_endian:
        raise PermanentError("the destination does not accept big endian data")
    syntax = next((each for each in _PLAIN if each in accepted), None)
    if syntax is None:
        raise PermanentError("the destination takes no uncompressed transfer syntax")
    with quiet_pydicom():
        octets = encode(dataset, syntax == ImplicitVRLittleEndian, True)
    if octets is None:
        raise PermanentError("the data set cannot be encoded for the destination")
    return BytesIO(octets), len(octets), syntax


def _as_stored(item: Sendable) -> tuple[BinaryIO, int, str]:
    try:
        data = item.path.open("rb")
        start = _data_set_start(data)
        if start is None:
            with quiet_pydicom():
                _, start = split_dataset(item.path)
    except Exception as error:
        raise PermanentError(f"the file does not parse ({type(error).__name__})") from None
    data.seek(start)
    return data, os.fstat(data.fileno()).st_size - start, item.transfer_syntax_uid


def _data_set_start(file: BinaryIO) -> int | None:
    """Where the data set begins by (0002,0000) (PS3.10 7.1); None where a file has no such word."""
    head = file.read(_META_BEGIN)
    if len(head) < _META_BEGIN or head[128:140] != _META:
        return None
    return _META_BEGIN + int.from_bytes(head[140:], "little")


def _decoded(item: Sendable) -> Dataset:
    try:
        with quiet_pydicom():
            dataset = dcmread(item.path)
    except Exception as error:
        raise PermanentError(f"the file does not parse ({type(error).__name__})") from None
    if item.transfer_syntax_uid in UncompressedTransferSyntaxes:
        return dataset
    try:
        with quiet_pydicom():
            dataset.decompress(generate_instance_uid=False)
    except Exception as error:
        kind = type(error).__name__
        raise PermanentError(
            f"the destination takes uncompressed data only, and the pixels do not decode ({kind})"
        ) from None
    return dataset


@dataclass(frozen=True)
class EchoResult:
    """What C-ECHO came to, in words for a person; seconds include the association."""

    ok: bool
    words: str
    seconds: float


def echo(peer: Peer) -> EchoResult:
    """Ask *peer* with C-ECHO whether it is there and knows us (PS3.4 A)."""
    started = time.monotonic()
    try:
        with associate(peer, [build_context(VERIFICATION, ImplicitVRLittleEndian)]) as association:
            response = association.send_c_echo()
        status = int(response.Status) if "Status" in response else None
        words = f"{peer.where}: {_answer_words(status)}"
        ok = status == 0
    except (NodeError, ValueError) as error:
        ok, words = False, str(error)
    return EchoResult(ok, f"{peer.where}: answers" if ok else words, time.monotonic() - started)


@dataclass(frozen=True)
class SendReport:
    """What :func:`send_files` came to; *unreadable* are files that are no DICOM."""

    sent: tuple[Sent, ...]
    unreadable: tuple[tuple[Path, str], ...] = ()
    trouble: str = ""
    total: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def delivered(self) -> int:
        """How many instances the peer has stored."""
        return sum(one.outcome == "delivered" for one in self.sent)

    @property
    def ok(self) -> bool:
        """Whether every readable file was stored and there was one."""
        return self.total > 0 and self.delivered == self.total


def send_files(
    paths: Iterable[Path],
    peer: Peer,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SendReport:
    """Send DICOM files, folders searched, to *peer*; *progress* is called with (done, total)."""
    started = time.monotonic()
    items, unreadable = _readable(files_under(paths))
    sent: list[Sent] = []
    trouble = ""
    try:
        for answer in send_all(peer, items):
            sent.append(answer)
            if progress is not None:
                progress(len(sent), len(items))
    except NodeError as error:
        trouble = error.message
    if not trouble and len(sent) < len(items):
        trouble = f"{peer.where}: the association ended after {len(sent)} of {len(items)}"
    return SendReport(
        tuple(sent), tuple(unreadable), trouble, len(items), time.monotonic() - started
    )


def files_under(paths: Iterable[Path]) -> list[Path]:
    """Every file named, and every file in a folder named, sorted within the folder."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else None
        found.extend(inside if inside is not None else [path])
    return found


def _readable(paths: Iterable[Path]) -> tuple[list[Sendable], list[tuple[Path, str]]]:
    items: list[Sendable] = []
    unreadable: list[tuple[Path, str]] = []
    for path in paths:
        try:
            items.append(Sendable.of(path))
        except UnreadableInstanceError as error:
            unreadable.append((path, error.message))
    return items, unreadable
