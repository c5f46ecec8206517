"""Every error the node raises on purpose.

NodeError
 ├─ PermanentError             trying again gives the same answer
 │   ├─ RefusedError           the series is outside what may be restored
 │   ├─ MismatchError          the data set contradicts the C-STORE command
 │   ├─ UnreadableInstanceError  header or pixel data do not parse
 │   ├─ NotFoundError          no such row or file
 │   ├─ DestinationRefusedError  a peer rejects us for good
 │   └─ ConfigurationError     node.toml or routes.toml is wrong
 └─ TransientError             trying again later may succeed
     ├─ SpoolFullError         the spool could not make the bytes durable
     ├─ LedgerError            the database did not answer or did not commit
     ├─ DestinationError       a peer is down, slow or out of resources
     └─ EngineMemoryError      the accelerator ran out of memory

Permanent or transient is the type, so that a retry decision never reads a message.
Messages name UIDs, states and keys; they never carry patient data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class NodeError(Exception):
    """Base of all errors of the node; `dimse_status` is the C-STORE answer for it (PS3.4 B.2.3)."""

    #: PS3.7 C.5.8: processing failure, the catch-all of C-STORE failures.
    dimse_status: ClassVar[int] = 0x0110

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class PermanentError(NodeError):
    """Trying again gives the same answer."""

    #: PS3.4 B.2.3: cannot understand.
    dimse_status: ClassVar[int] = 0xC000


class RefusedError(PermanentError):
    """The series is outside what may be restored; the reason is for people."""


class MismatchError(PermanentError):
    """SOP Class or Instance UID of the data set is not that of the C-STORE command."""

    #: PS3.4 B.2.3: data set does not match SOP Class.
    dimse_status: ClassVar[int] = 0xA900


class UnreadableInstanceError(PermanentError):
    """A header does not parse, a data set ends early, or pixel data do not decode.

    Attributes:
        sop_instance_uid: The SOP Instance, where it is known.
    """

    def __init__(self, message: str, *, sop_instance_uid: str | None = None) -> None:
        super().__init__(message)
        self.sop_instance_uid = sop_instance_uid


class NotFoundError(PermanentError):
    """There is no such row or file."""


class DestinationRefusedError(PermanentError):
    """A destination rejects us, or what we send, for good: someone has to change a setting."""


class ConfigurationError(PermanentError):
    """A configuration is wrong; `problems` lists every fault with its file and key path."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class TransientError(NodeError):
    """Trying again later may succeed."""

    #: PS3.4 B.2.3: refused, out of resources; the sender keeps the instance and retries.
    dimse_status: ClassVar[int] = 0xA700


class SpoolFullError(TransientError):
    """The spool could not make the bytes durable: full, read-only, over quota or broken."""


class LedgerError(TransientError):
    """The ledger did not answer or did not commit."""


class DestinationError(TransientError):
    """A destination is down, slow, or refused for now."""


class EngineMemoryError(TransientError):
    """The accelerator ran out of memory."""


def whereabouts(error: BaseException) -> str:
    """Type and place of an unforeseen error: its text may quote a header."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = type(error).__name__
    if trace is None:
        return name
    return f"{name} at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
