"""When a series is complete: divide it into volumes, route each, and put the work in the queue.

A series is complete when no association that brought it is open and nothing has come for the
quiet time of its modality. What happens then is decided from the headers alone and written in one
transaction, so a crash leaves the series as it was and the next tick decides alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node.dicom import volume
from dicom_node.dicom.header import read_header, why_ignored
from dicom_node.errors import TransientError, UnreadableInstanceError
from dicom_node.ledger import intake, queue
from dicom_node.ledger.intake import InstanceRow, SeriesProgress
from dicom_node.ledger.queue import NewJob
from dicom_node.ledger.tables import JobState, SeriesState
from dicom_node.observability import get_logger
from dicom_node.routing import Decision, Routes, Titles, decide
from dicom_node.settings import AssemblySettings, NodeSettings, PolicySettings
from dicom_node.spool import Spool

# One slice of CT or MR restores alike in any company, so a late one is restored alone. PET is
# reconstructed and quantified as a set: a late slice makes a new revision of the whole.
_RESTORED_SLICE_BY_SLICE = frozenset({"CT", "MR"})

_log = get_logger(__name__)


def is_quiet(series: SeriesProgress, assembly: AssemblySettings, now: float) -> bool:
    """True when nothing more is to be expected of a series."""
    if series.forced:
        return True
    if series.open_associations:
        return False
    return now - series.last_received >= assembly.quiet_for(series.modality)


@dataclass(frozen=True)
class Plan:
    """What is to become of one series: jobs, or none and the reason it is left alone."""

    state: SeriesState
    reason: str | None
    jobs: tuple[NewJob, ...]


def plan(
    titles: Titles,
    headers: Mapping[str, Dataset],
    *,
    routes: Routes,
    policy: PolicySettings,
    note: str | None = None,
) -> Plan:
    """Decide what becomes of the instances whose headers are given by SOP Instance UID. Pure.

    *note* is what else is to be said in the description of each result.
    """
    wanted = {uid: header for uid, header in headers.items() if why_ignored(header) is None}
    if not wanted:
        reasons = (why_ignored(header) or "" for header in headers.values())
        return Plan(SeriesState.IGNORED, _joined(reasons) or "no instance is left", ())
    groups = volume.group_volumes(list(wanted.values()), policy.split_by)
    gaps = _joined(group.note or "" for group in groups)
    jobs: list[NewJob] = []
    ignored: list[str] = []
    for group in groups:
        members = [wanted[uid] for uid in group.sop_instance_uids]
        decision = decide(titles, _representative(members), routes)
        outcome = _job(group, members, decision, policy, note)
        if isinstance(outcome, NewJob):
            jobs.append(outcome)
        else:
            ignored.append(outcome)
    if not jobs:
        return Plan(SeriesState.IGNORED, _joined(ignored), ())
    state = SeriesState.INCOMPLETE if gaps else SeriesState.COMPLETE
    return Plan(state, _joined((gaps, *ignored)) or None, tuple(jobs))


def _representative(members: Sequence[Dataset]) -> Dataset:
    """The middle slice: tube current is modulated along the patient, and the ends are odd."""
    return members[len(members) // 2]


def _job(
    group: volume.VolumeGroup,
    members: Sequence[Dataset],
    decision: Decision,
    policy: PolicySettings,
    note: str | None,
) -> NewJob | str:
    """The job of one volume in the state its headers put it in, or why there is none."""
    if decision.task is None:
        return decision.reason or "no route matches"
    findings = volume.check(members, task=decision.task, policy=policy)
    ignored = _joined(each.reason for each in findings if each.level == "ignore")
    if ignored:
        return ignored
    refused = _joined(each.reason for each in findings if each.level == "refuse")
    state, reason = _state(group, refused, policy)
    note = note if state is JobState.QUEUED else None
    return NewJob(
        series_instance_uid=str(members[0].SeriesInstanceUID),
        volume_key=group.key,
        task=decision.task,
        destinations=decision.destinations,
        instance_uids=group.sop_instance_uids,
        route=decision.route or "",
        priority=decision.priority,
        state=state,
        reason=_joined((note or "", reason or "")) or None,
    )


def _state(
    group: volume.VolumeGroup, refused: str, policy: PolicySettings
) -> tuple[JobState, str | None]:
    if refused:
        return JobState.REFUSED, refused
    if group.note and policy.incomplete == "refuse":
        return JobState.REFUSED, group.note
    if group.note and policy.incomplete == "hold":
        return JobState.HELD, group.note
    return JobState.QUEUED, group.note


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


class Assembler:
    """Looks at the open series of the ledger and concludes those that are complete."""

    def __init__(
        self, settings: NodeSettings, spool: Spool, ledger: Engine, routes: Routes
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._ledger = ledger
        self.routes = routes

    def tick(self, now: float) -> int:
        """Conclude every series that has become quiet; returns how many."""
        due = [
            series
            for series in intake.series_progress(self._ledger)
            if is_quiet(series, self._settings.assembly, now)
        ]
        return sum(self._conclude_alone(series, now) for series in due)

    def _conclude_alone(self, series: SeriesProgress, now: float) -> int:
        """One series in trouble must not hold up the others; it is looked at again next tick."""
        try:
            self._conclude(series, now)
        except TransientError as error:
            _log.warning(
                "series not concluded",
                action="series_trouble",
                series_instance_uid=series.series_instance_uid,
                error=str(error),
            )
            return 0
        return 1

    def _conclude(self, series: SeriesProgress, now: float) -> None:
        uid = series.series_instance_uid
        rows = intake.series_instances(self._ledger, uid)
        late = [row for row in rows if not row.assigned]
        alone = series.modality in _RESTORED_SLICE_BY_SLICE and 0 < len(late) < len(rows)
        titles = Titles(series.calling_ae, series.called_ae, series.address)
        headers = self._headers(late if alone else rows, now)
        decided = plan(
            titles,
            headers,
            routes=self.routes,
            policy=self._settings.policy,
            note=f"late, apart from {len(rows) - len(late)} earlier instances" if alone else None,
        )
        if self._write(series, decided, now):
            _log.info(
                "series concluded",
                action="series_concluded",
                series_instance_uid=uid,
                state=decided.state.value,
                reason=decided.reason,
                jobs=len(decided.jobs),
            )

    def _headers(self, rows: Sequence[InstanceRow], now: float) -> dict[str, Dataset]:
        """Headers by SOP Instance UID; an instance that has become unreadable is put aside."""
        headers: dict[str, Dataset] = {}
        for row in rows:
            try:
                headers[row.sop_instance_uid] = read_header(self._spool.resolve(row.path))
            except UnreadableInstanceError as error:
                damaged = self._spool.resolve(row.path).read_bytes()
                kept = self._spool.quarantine(damaged, error.message).path
                self._put_aside(row, kept, error.message, now)
                self._spool.delete(row.path)
            except FileNotFoundError:
                self._put_aside(row, row.path, "the file is gone from the spool", now)
        return headers

    def _put_aside(self, row: InstanceRow, path: str, reason: str, now: float) -> None:
        uid = row.sop_instance_uid
        intake.quarantine_instance(self._ledger, uid, path=path, reason=reason, now=now)
        _log.error(
            "instance unreadable",
            action="instance_unreadable",
            sop_instance_uid=uid,
            reason=reason,
        )

    def _write(self, series: SeriesProgress, decided: Plan, now: float) -> bool:
        """False when an instance came in between: the next look sees it."""
        uid = series.series_instance_uid
        if not decided.jobs:
            seen, reason = series.instances, decided.reason or ""
            return intake.ignore_series(self._ledger, uid, reason, now, instances_seen=seen)
        made = queue.enqueue(
            self._ledger,
            uid,
            series_state=decided.state,
            reason=decided.reason,
            jobs=decided.jobs,
            instances_seen=series.instances,
            now=now,
        )
        return made is not None
