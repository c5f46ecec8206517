"""Recall of a model: what it made, and a rejection note for each series of it (IHE RAD IOCM)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from sqlalchemy import Engine

from dicom_node.dicom import rejection
from dicom_node.dicom.documents import OBJECT_CLASSES, Reference
from dicom_node.dicom.header import read_header, text
from dicom_node.dicom.rejection import KEY_OBJECT_SELECTION, Title
from dicom_node.errors import NodeError, PermanentError
from dicom_node.ledger import recalls
from dicom_node.ledger.queue import Output
from dicom_node.ledger.recalls import MadeInstance
from dicom_node.settings import IdentitySettings
from dicom_node.spool import Spool

# Fewer digits say too little of a digest to recall by.
_DIGEST = re.compile(r"[0-9a-fA-F]{8,64}")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rejection:
    """What became of the note of one series."""

    job_id: int
    series_instance_uid: str
    instances: int
    destinations: tuple[str, ...] = ()  #: where the note goes
    note_sop_instance_uid: str | None = None
    note_path: str | None = None  #: in the spool
    problem: str | None = None  #: why there is no note


def made_by(engine: Engine, model: str) -> list[MadeInstance]:
    """Every instance that a model made; *model* is its SHA-256 or at least 8 digits of it.

    Raises:
        NotFoundError: The ledger knows no result of it.
        PermanentError: That is no digest.
    """
    if not _DIGEST.fullmatch(model):
        raise PermanentError("a model is named by its SHA-256: 8 to 64 hexadecimal digits")
    digest = recalls.full_digest(engine, model)
    return recalls.made_by(engine, digest, except_class=KEY_OBJECT_SELECTION)


def reject(
    engine: Engine,
    spool: Spool,
    instances: Sequence[MadeInstance],
    *,
    model_sha256: str,
    title: Title,
    reason: str,
    identity: IdentitySettings,
    now: float,
    progress: Progress | None = None,
) -> Iterator[Rejection]:
    """Make the note of each series and put it in the outbox; one in trouble stops no other."""
    groups = [
        (job_id, list(members)) for job_id, members in groupby(instances, lambda one: one.job_id)
    ]
    for done, (job_id, members) in enumerate(groups, start=1):
        try:
            yield _reject_one(
                engine,
                spool,
                members,
                model_sha256=model_sha256,
                title=title,
                reason=reason,
                identity=identity,
                now=now,
            )
        except NodeError as error:
            series = members[0].series_instance_uid
            yield Rejection(job_id, series, len(members), problem=error.message)
        if progress is not None:
            progress(done, len(groups))


def _reject_one(
    engine: Engine,
    spool: Spool,
    members: Sequence[MadeInstance],
    *,
    model_sha256: str,
    title: Title,
    reason: str,
    identity: IdentitySettings,
    now: float,
) -> Rejection:
    first = members[0]
    note = rejection.rejection_note(
        read_header(spool.resolve(_readable(members).path)),
        [reference for each in members if (reference := _reference(spool, each))],
        title=title,
        why=f"{reason} (model {model_sha256[:12]})",
        task=first.task,
        model_sha256=model_sha256,
        identity=identity,
        created=datetime.fromtimestamp(now, UTC),
    )
    found = Rejection(first.job_id, first.series_instance_uid, len(members))
    if recalls.is_noted(engine, note.sop_instance_uid):
        raise PermanentError("its note has been made before; see `dicom-node deliveries list`")
    stored = spool.write_outgoing(note.series_instance_uid, note.sop_instance_uid, note.data)
    destinations = recalls.record_note(
        engine,
        first.job_id,
        Output(
            sop_instance_uid=note.sop_instance_uid,
            sop_class_uid=KEY_OBJECT_SELECTION,
            source_sop_instance_uid=first.source_sop_instance_uid,
            path=stored.path,
            sha256=stored.sha256,
            size=stored.size,
        ),
        reason=f"recalled: {reason}",
        now=now,
    )
    return Rejection(
        found.job_id,
        found.series_instance_uid,
        found.instances,
        tuple(destinations),
        note.sop_instance_uid,
        stored.path,
    )


def _reference(spool: Spool, made: MadeInstance) -> Reference | None:
    """What the note says of an instance; None for a report whose series is not known any more."""
    series = made.series_instance_uid
    if made.sop_class_uid in OBJECT_CLASSES:
        # A report and a presentation state are in series of their own.
        if made.purged:
            return None
        series = text(read_header(spool.resolve(made.path)), "SeriesInstanceUID")
    return Reference(made.sop_class_uid, made.sop_instance_uid, series)


def out_of_reach(instances: Sequence[MadeInstance]) -> list[str]:
    """The series of which no file is left: a note names the patient, whom no row names."""
    by_series: dict[str, bool] = {}
    for each in instances:
        series = each.series_instance_uid
        by_series[series] = by_series.get(series, False) or _is_readable(each)
    return [series for series, is_readable in by_series.items() if not is_readable]


def _readable(members: Sequence[MadeInstance]) -> MadeInstance:
    """An image whose file is there: the note takes patient and study from it."""
    for each in members:
        if _is_readable(each):
            return each
    raise PermanentError(
        "its files have left the spool, and the patient whom a note must name with them:"
        f" reject series {members[0].series_instance_uid} in the archive itself"
    )


def _is_readable(made: MadeInstance) -> bool:
    return not made.purged and made.sop_class_uid not in OBJECT_CLASSES
