"""When a series is complete: divide it into volumes, route each, and put the work in the queue.

A series is complete when no association that brought it is open and nothing has come for the
quiet time of its modality. What happens then is decided from the headers alone and written in one
transaction, so a crash leaves the series as it was and the next tick decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address

from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node.dicom import division
from dicom_node.dicom.division import VolumeGroup
from dicom_node.dicom.header import read_header, texts, why_ignored
from dicom_node.errors import RefusedError, TransientError, UnreadableInstanceError
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
    sent_back: Callable[[Dataset], str | None] = lambda header: None,
    late: Collection[str] = (),
) -> Plan:
    """Decide what becomes of the instances whose headers are given by SOP Instance UID. Pure.

    *sent_back* says why an instance is taken for our own work returned by a destination. Where
    there are *late* instances, the others have had their jobs and only tell the volumes apart.
    """
    reasons = {uid: why_ignored(h) or sent_back(h) for uid, h in headers.items()}
    wanted = {uid: header for uid, header in headers.items() if reasons[uid] is None}
    if not wanted:
        found = (reason or "" for reason in reasons.values())
        return Plan(SeriesState.IGNORED, _joined(found) or "no instance is left", ())
    groups = division.group_volumes(list(wanted.values()), policy.split_by)
    gaps = _joined(group.note or "" for group in groups)
    note = f"late, apart from {len(headers) - len(late)} earlier instances" if late else None
    jobs: list[NewJob] = []
    ignored: list[str] = []
    for whole in groups:
        group = _only(whole, late) if late else whole
        if not group.sop_instance_uids:
            continue
        members = [wanted[uid] for uid in group.sop_instance_uids]
        decision = decide(titles, division.representative(members), routes)
        outcome = _job(group, members, decision, policy, note)
        if isinstance(outcome, NewJob):
            jobs.append(outcome)
        else:
            ignored.append(outcome)
    if not jobs:
        return Plan(SeriesState.IGNORED, _joined(ignored), ())
    state = SeriesState.INCOMPLETE if gaps else SeriesState.COMPLETE
    return Plan(state, _joined((gaps, *ignored)) or None, tuple(jobs))


def _only(group: VolumeGroup, late: Collection[str]) -> VolumeGroup:
    uids = tuple(uid for uid in group.sop_instance_uids if uid in late)
    return replace(group, sop_instance_uids=uids)


def _job(
    group: VolumeGroup,
    members: Sequence[Dataset],
    decision: Decision,
    policy: PolicySettings,
    note: str | None,
) -> NewJob | str:
    """The job of one volume in the state its headers put it in, or why there is none."""
    if decision.task is None:
        return decision.reason or "no route matches"
    refused = ""
    try:
        division.judge(members, task=decision.task, policy=policy)
    except RefusedError as error:
        refused = error.message
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


def _state(group: VolumeGroup, refused: str, policy: PolicySettings) -> tuple[JobState, str | None]:
    if refused:
        return JobState.REFUSED, refused
    if group.note and policy.incomplete == "refuse":
        return JobState.REFUSED, group.note
    if group.note and policy.incomplete == "hold":
        return JobState.HELD, group.note
    return JobState.QUEUED, group.note


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def why_sent_back(header: Dataset, *, titles: Titles, settings: NodeSettings) -> str | None:
    """Why an instance counts as our own work that a destination returns; None: it does not.

    The last of the loop guards, for a destination that keeps no attribute of ours: what it sends
    is not restored where it calls itself derived, or by policy in any case.
    """
    rule = settings.policy.from_destinations
    if rule == "restore" or not _is_destination(titles, settings):
        return None
    if rule == "ignore":
        return "sent by one of our destinations"
    derived = texts(header, "ImageType")[:1] == ("DERIVED",)
    return "a derived image, sent by one of our destinations" if derived else None


def _is_destination(titles: Titles, settings: NodeSettings) -> bool:
    return any(
        peer.ae_title == titles.calling_ae and peer.host in (titles.address, _name(peer.host))
        for peer in settings.destinations.values()
    )


def _name(host: str) -> str | None:
    """The host itself where it is a name, which is not looked up; None where an address."""
    try:
        ip_address(host)
    except ValueError:
        return host
    return None


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
        decided = plan(
            titles,
            self._headers(rows, now),
            routes=self.routes,
            policy=self._settings.policy,
            sent_back=partial(why_sent_back, titles=titles, settings=self._settings),
            late=[row.sop_instance_uid for row in late] if alone else (),
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
