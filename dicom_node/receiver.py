"""One instance through check, spool and ledger to its DIMSE status (PS3.4 B.2.3).

0x0000 is given only when the header was checked, the bytes are durable in the spool under their
name, and the row is committed.  Stored bytes are the bytes received: a data set is never decoded
and encoded again, and never held as a whole.  Instances of several associations that wait at the
same time share one transaction, and the file system joins their flushes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from pydicom.uid import UID
from pynetdicom.dsutils import create_file_meta, encode_file_meta
from sqlalchemy import Engine

from dicom_node.association import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.dicom import identity
from dicom_node.dicom.header import RESTORABLE, InstanceSummary, valid_uid
from dicom_node.dicom.stream import Contents, Scanner
from dicom_node.draft import Draft, Octets
from dicom_node.errors import (
    MismatchError,
    NodeError,
    PermanentError,
    SpoolFullError,
    UnreadableInstanceError,
)
from dicom_node.ledger import intake
from dicom_node.ledger.tables import InstanceState
from dicom_node.ledger.writer import Writer
from dicom_node.observability import get_logger
from dicom_node.spool import Spool
from dicom_node.upper_layer import Limits

Clock = Callable[[], float]

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700

_PREAMBLE = b"\0" * 128 + b"DICM"
_PIXEL_DATA = frozenset({(0x7FE0, 0x0010), (0x7FE0, 0x0009), (0x7FE0, 0x0008)})
# PS3.10 7.1: group 0002 has no place in a data set. These say what a file holds, and how.
_FILE_META = frozenset({(0x0002, 0x0002), (0x0002, 0x0003), (0x0002, 0x0010)})
NOTED = _PIXEL_DATA | _FILE_META
"""The tags whose presence `check_instance` looks at, beside the values of `identity.WANTED`."""
# The room on the disk is looked at again after so many bytes of one instance.
_ROOM_STEP = 1 << 26
# PS3.7 C: an Error Comment is an LO.
_COMMENT_LENGTH = 64

_log = get_logger(__name__)
# Asked before: a line that is not written costs twenty microseconds by structlog.
_standard_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a C-STORE request says of its data set."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    association_id: int | None = None

    @cached_property
    def is_named(self) -> bool:
        """Whether both UIDs are valid, so that they may stand in a file and a query."""
        return valid_uid(self.sop_instance_uid) and valid_uid(self.sop_class_uid)

    def file_head(self) -> bytes:
        """What stands before the data set in a PS3.10 file; always the same bytes for the same."""
        head, tail = _meta_around(self.sop_class_uid, self.transfer_syntax_uid)
        uid = self.sop_instance_uid.encode("ascii")
        uid += b"\0" * (len(uid) % 2)
        element = b"\x02\x00\x03\x00UI" + len(uid).to_bytes(2, "little") + uid
        # PS3.10 7.1: the group length counts what follows its own twelve bytes.
        length = len(head) + len(element) + len(tail)
        group = b"\x02\x00\x00\x00UL\x04\x00" + length.to_bytes(4, "little")
        return b"".join((_PREAMBLE, group, head, element, tail))


@lru_cache(maxsize=512)
def _meta_around(sop_class_uid: str, transfer_syntax_uid: str) -> tuple[bytes, bytes]:
    """The meta information before and after the SOP Instance UID, without its group length."""
    meta = create_file_meta(
        sop_class_uid=UID(sop_class_uid),
        sop_instance_uid=UID("1.2"),
        transfer_syntax=UID(transfer_syntax_uid),
        implementation_uid=UID(IMPLEMENTATION_CLASS_UID),
        implementation_version=IMPLEMENTATION_VERSION_NAME,
    )
    encoded = encode_file_meta(meta)[12:]
    head, tail = encoded.split(b"\x02\x00\x03\x00UI\x04\x001.2\0")
    return head, tail


@dataclass(frozen=True)
class Answer:
    """A DIMSE status and, for a failure, why in at most 64 characters."""

    status: int
    comment: str = ""


def check_instance(request: Request, contents: Contents) -> tuple[InstanceSummary, str | None]:
    """The identity of an instance that may be acknowledged, and why it is ignored if it is.

    Raises UnreadableInstanceError for a data set that has no valid UIDs or lacks its pixels,
    MismatchError where it contradicts the command set (PS3.4 B.2.3).
    """
    if contents.tags & _FILE_META:
        # In the file it would stand behind the real one, and readers would believe either.
        raise UnreadableInstanceError("the data set holds file meta information")
    found = identity.summary(contents.values, request.transfer_syntax_uid)
    if found.sop_class_uid != request.sop_class_uid:
        raise MismatchError("SOP Class UID differs between command and data set")
    if found.sop_instance_uid != request.sop_instance_uid:
        raise MismatchError("SOP Instance UID differs between command and data set")
    if found.sop_class_uid in RESTORABLE and not contents.tags & _PIXEL_DATA:
        raise UnreadableInstanceError("the data set ends early: no pixel data")
    return found, identity.verdict(contents.values, request.transfer_syntax_uid)


class StorageReceiver:
    """Takes instances to their status; any number of threads may use it at once."""

    def __init__(
        self,
        spool: Spool,
        engine: Engine,
        clock: Clock,
        limits: Limits | None = None,
    ) -> None:
        self.spool = spool
        self.limits = limits or Limits()
        self._engine = engine
        self._writer = Writer(engine)
        self._clock = clock
        self._group = GroupCommit(self._record)

    def begin(self, request: Request) -> Reception:
        """Begin one instance; to be used in a with statement."""
        return Reception(self, request)

    def receive(self, request: Request, data_set: Octets) -> Answer:
        """Store one instance that has come as a whole."""
        with self.begin(request) as reception:
            reception.write((data_set,))
            return reception.finish()

    def record(self, instance: intake.ReceivedInstance) -> InstanceState:
        """Commit the row of a durable file, together with those who wait."""
        # File before row: a crash between the two leaves an orphan file, which is adopted.
        return self._group.submit(instance)

    def reject(self, request: Request, source: Draft | bytes, error: PermanentError) -> None:
        """Keep what was refused, for support; failing to do so does not change the answer."""
        _log.warning(
            "instance rejected",
            action="instance_rejected",
            status=f"0x{error.dimse_status:04X}",
            reason=error.message,
        )
        uid = request.sop_instance_uid if valid_uid(request.sop_instance_uid) else None
        try:
            kept = self.spool.quarantine(source, error.message)
            intake.reject_instance(
                self._engine,
                sop_instance_uid=uid,
                path=kept.path,
                reason=error.message,
                association_id=request.association_id,
                now=self._clock(),
            )
        except NodeError as failure:
            _log.error(
                "rejected instance not kept", action="quarantine_failed", error=failure.message
            )

    def _record(self, group: Sequence[intake.ReceivedInstance]) -> list[Outcome]:
        """Record a group; where that fails, each by itself."""
        now = self._clock()
        try:
            return [*intake.record_instances(self._writer, group, now, self.spool.set_aside)]
        except NodeError as error:
            if len(group) == 1:
                return [error]
        return [outcome for instance in group for outcome in self._record([instance])]


class Reception:
    """One instance being received: checked, hashed and written as its bytes come.

    A fault is kept for the answer, and what comes after it is read and dropped, or kept for
    support where the instance is at fault.  Leaving the with statement removes what has no name.
    """

    def __init__(self, receiver: StorageReceiver, request: Request) -> None:
        self._receiver = receiver
        self._request = request
        self._draft: Draft | None = None
        self._error: Exception | None = None
        self._size = 0
        self._room_checked = -_ROOM_STEP
        limits = receiver.limits
        self._scanner = Scanner(
            request.transfer_syntax_uid,
            identity.WANTED,
            noted=NOTED,
            max_elements=limits.elements,
            max_inflated=limits.inflated,
        )
        if not request.is_named:
            self._error = UnreadableInstanceError("the command set names no valid SOP Instance")

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what has no name; again is no error."""
        if self._draft is not None:
            self._draft.close()

    def write(self, pieces: Sequence[Octets]) -> None:
        """Take the next octets of the data set; they may change once this returns."""
        self._size += sum(map(len, pieces))
        if not isinstance(self._error, PermanentError | None):
            return
        try:
            self._keep(pieces)
            if self._error is None:
                self._scan(pieces)
        except Exception as error:
            self._error = error

    def finish(self) -> Answer:
        """Answer for the whole data set."""
        try:
            if self._error is not None:
                raise self._error
            state = self._store()
        except PermanentError as error:
            head = self._request.file_head() if self._request.is_named else b""
            self._receiver.reject(self._request, self._draft or head, error)
            return Answer(error.dimse_status, error.message[:_COMMENT_LENGTH])
        except NodeError as error:
            _log.error(
                "instance not stored",
                action="instance_refused",
                sop_instance_uid=self._request.sop_instance_uid,
                error=error.message,
            )
            return Answer(error.dimse_status, error.message[:_COMMENT_LENGTH])
        except Exception as error:
            # Nothing says that the instance is at fault, so the sender should keep it.
            _log.error("C-STORE failed", action="unexpected_error", error=type(error).__name__)
            return Answer(OUT_OF_RESOURCES, "internal error; try again later")
        if _standard_log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "instance stored",
                action="instance_stored",
                sop_instance_uid=self._request.sop_instance_uid,
                state=state.value,
            )
        return Answer(SUCCESS)

    def _keep(self, pieces: Sequence[Octets]) -> None:
        if self._size > self._receiver.limits.data_set:
            raise SpoolFullError("the data set is larger than this node takes")
        if self._size - self._room_checked >= _ROOM_STEP:
            if not self._receiver.spool.has_room(self._size):
                raise SpoolFullError("the spool has no room; try again later")
            self._room_checked = self._size
        if self._draft is None:
            self._draft = self._receiver.spool.draft()
            if self._request.is_named:
                pieces = (self._request.file_head(), *pieces)
        self._draft.write(pieces)

    def _scan(self, pieces: Sequence[Octets]) -> None:
        for piece in pieces:
            self._scanner.feed(piece)

    def _store(self) -> InstanceState:
        if not self._size or self._draft is None:
            raise UnreadableInstanceError("the request has no data set")
        found, ignored = check_instance(self._request, self._scanner.finish())
        stored = self._receiver.spool.keep(self._draft)
        return self._receiver.record(
            intake.ReceivedInstance(
                sop_instance_uid=found.sop_instance_uid,
                sop_class_uid=found.sop_class_uid,
                study_instance_uid=found.study_instance_uid,
                series_instance_uid=found.series_instance_uid,
                modality=found.modality,
                transfer_syntax_uid=found.transfer_syntax_uid,
                path=stored.path,
                sha256=stored.sha256,
                size=stored.size,
                association_id=self._request.association_id,
                ignored_reason=ignored,
            )
        )


Outcome = InstanceState | BaseException
Commit = Callable[[Sequence[intake.ReceivedInstance]], Sequence[Outcome]]


@dataclass
class _Waiting:
    instance: intake.ReceivedInstance
    outcome: Outcome | None = field(default=None)


class GroupCommit:
    """Lets threads that commit at the same time share one commit, without a thread of its own.

    Who comes first commits for all that wait.  Who comes while a commit runs waits for its end,
    and is then in the next one: nobody waits for a time, and one thread alone never waits.
    """

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._queue: list[_Waiting] = []
        self._running = False
        self._changed = threading.Condition()

    def submit(self, instance: intake.ReceivedInstance) -> InstanceState:
        """Commit with whoever waits; raises what the commit of this instance raised."""
        mine = _Waiting(instance)
        with self._changed:
            self._queue.append(mine)
            while self._running and mine.outcome is None:
                self._changed.wait()
            if mine.outcome is None:
                self._running = True
                group, self._queue = self._queue, []
        if mine.outcome is None:
            self._lead(group)
        if isinstance(mine.outcome, InstanceState):
            return mine.outcome
        raise mine.outcome or RuntimeError("a commit had no outcome")

    def _lead(self, group: Sequence[_Waiting]) -> None:
        outcomes: Sequence[Outcome]
        try:
            outcomes = self._commit([waiting.instance for waiting in group])
        except BaseException as error:
            # Whatever it was, those who wait must hear of it.
            outcomes = [error] * len(group)
        with self._changed:
            for waiting, outcome in zip(group, outcomes, strict=True):
                waiting.outcome = outcome
            self._running = False
            self._changed.notify_all()
