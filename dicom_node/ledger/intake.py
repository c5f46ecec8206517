"""Writing what arrives: associations, instances and their series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Engine

from dicom_node.ledger.tables import InstanceState, SeriesState

Outcome = Literal["released", "aborted", "lost"]


@dataclass(frozen=True)
class ReceivedInstance:
    """One SOP Instance that lies durable in the spool."""

    sop_instance_uid: str
    sop_class_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str
    transfer_syntax_uid: str
    path: str
    sha256: str
    size: int
    association_id: int | None = None
    ignored_reason: str | None = None


@dataclass(frozen=True)
class SeriesProgress:
    """A series in state `receiving`, as the assembler judges it."""

    series_instance_uid: str
    study_instance_uid: str
    modality: str
    state: SeriesState
    #: Instances in state `received`; `queue.enqueue` compares it (`instances_seen`).
    instances: int
    last_received: float
    open_associations: int
    #: A person asked to take it as complete now.
    forced: bool
    calling_ae: str
    called_ae: str
    address: str


@dataclass(frozen=True)
class InstanceRow:
    """One received SOP Instance of a series."""

    sop_instance_uid: str
    sop_class_uid: str
    path: str
    received_at: float
    #: An earlier `queue.enqueue` has already dealt with it.
    assigned: bool


def open_association(
    engine: Engine, *, calling_ae: str, called_ae: str, address: str, now: float
) -> int:
    """Record an accepted association and return its id."""
    raise NotImplementedError


def close_association(engine: Engine, association_id: int, outcome: Outcome, now: float) -> None:
    """Record the end of an association."""
    raise NotImplementedError


def close_lost_associations(engine: Engine, now: float) -> int:
    """Close associations that a killed receive process left open; call before listening."""
    raise NotImplementedError


def record_instance(engine: Engine, instance: ReceivedInstance, now: float) -> InstanceState:
    """Record a stored instance once: received, duplicate, conflict or ignored."""
    raise NotImplementedError


def reject_instance(
    engine: Engine,
    *,
    sop_instance_uid: str | None,
    path: str | None,
    reason: str,
    association_id: int | None,
    now: float,
) -> None:
    """Record an instance that was refused on arrival; `path` is its quarantined copy."""
    raise NotImplementedError


def quarantine_instance(
    engine: Engine, sop_instance_uid: str, *, path: str, reason: str, now: float
) -> bool:
    """Turn a received instance whose pixel data do not decode into a rejected one."""
    raise NotImplementedError


def series_progress(engine: Engine) -> list[SeriesProgress]:
    """Return the series in state `receiving`, oldest first."""
    raise NotImplementedError


def series_instances(
    engine: Engine, series_uid: str, *, only_unassigned: bool = False
) -> list[InstanceRow]:
    """Return the received instances of a series in order of arrival."""
    raise NotImplementedError


def ignore_series(engine: Engine, series_uid: str, reason: str, now: float) -> bool:
    """Close a receiving series without a job."""
    raise NotImplementedError


def force_series(engine: Engine, series_uid: str, *, reason: str, now: float) -> bool:
    """Ask the assembler to take a series as complete at its next look; reopens a closed one."""
    raise NotImplementedError


def known_paths(engine: Engine) -> set[str]:
    """Return every path in the spool that a row of an instance names."""
    raise NotImplementedError
