"""What becomes of a series: divided into volumes, each judged and routed. Pure functions.

The assembler decides when; ``dicom-node restore`` comes the same way without network or ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from pydicom.dataset import Dataset

from dicom_node.dicom import division
from dicom_node.dicom.division import VolumeGroup
from dicom_node.dicom.expected import COUNTS, Evidence, counts
from dicom_node.dicom.header import text, texts, why_ignored
from dicom_node.errors import RefusedError
from dicom_node.ledger.intake import Sender
from dicom_node.ledger.queue import EarlierJob, NewJob
from dicom_node.ledger.tables import JobState, SeriesState
from dicom_node.routing import Decision, Routes, Titles, decide, opted_out
from dicom_node.settings import NodeSettings, PolicySettings

__all__ = ["Plan", "is_whole", "lacking", "plan", "titles_of", "why_sent_back"]


@dataclass(frozen=True)
class Plan:
    """What is to become of one series: jobs, or none and the reason it is left alone."""

    state: SeriesState
    reason: str | None
    jobs: tuple[NewJob, ...]
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class Circumstances:
    """What a volume is planned in the light of: the rules, the time, and what went before."""

    titles: Titles
    routes: Routes
    policy: PolicySettings
    now: float
    earlier: tuple[EarlierJob, ...]
    #: What says of the series as a whole whether it is all there.
    series: tuple[Evidence, ...]
    #: A person took it as it is.
    forced: bool
    #: Instances whose files have left the spool.
    purged: frozenset[str]


def plan(
    titles: Titles,
    headers: Mapping[str, Dataset],
    *,
    routes: Routes,
    policy: PolicySettings,
    sent_back: Callable[[Dataset], str | None] = lambda header: None,
    earlier: Sequence[EarlierJob] = (),
    evidence: Sequence[Evidence] = (),
    forced: bool = False,
    trust: bool = False,
    purged: Collection[str] = (),
    now: float = 0.0,
) -> Plan:
    """Decide what becomes of the instances whose headers are given by SOP Instance UID. Pure.

    *sent_back* says why an instance is taken for our own work returned by a destination. *earlier*
    are the jobs that the series has had: what they deal with is not restored again, but for PET,
    which becomes a new revision as a whole. *evidence* speaks of the series beside what its headers
    announce, of which Images in Acquisition counts by *trust*. *forced*: a person took it as it is;
    the files of *purged* instances have left the spool.
    *now* is in seconds since 1970 UTC.
    """
    reasons = {uid: why_ignored(h) or sent_back(h) for uid, h in headers.items()}
    wanted = {uid: header for uid, header in headers.items() if reasons[uid] is None}
    if not wanted:
        found = (reason or "" for reason in reasons.values())
        left = _joined(found) or "no instance is left"
        return Plan(SeriesState.IGNORED, left, (), tuple(evidence))
    of_series = (*evidence, *counts(list(wanted.values()), trust_images_in_acquisition=trust))
    given = Circumstances(
        titles, routes, policy, now, tuple(earlier), of_series, forced, frozenset(purged)
    )
    groups = division.group_volumes(list(wanted.values()), policy.split_by)
    every = (*of_series, *(each for group in groups for each in _named(group, len(groups))))
    outcomes = [_volume(group, wanted, given) for group in groups]
    jobs = tuple(each for each in outcomes if isinstance(each, NewJob))
    ignored = [each for each in outcomes if isinstance(each, str)]
    missing = lacking(every)
    if not jobs and not earlier:
        return Plan(SeriesState.IGNORED, _joined(ignored), (), every)
    state = SeriesState.INCOMPLETE if missing else SeriesState.COMPLETE
    return Plan(state, _joined((*missing, *ignored)) or None, jobs, every)


def _named(group: VolumeGroup, groups: int) -> tuple[Evidence, ...]:
    """The evidence of a volume under its key, where there are several."""
    if groups == 1:
        return group.evidence
    return tuple(replace(each, volume=group.key) for each in group.evidence)


def lacking(evidence: Iterable[Evidence]) -> tuple[str, ...]:
    """What says that instances are missing, in words.

    That the sender broke off says so only where no count shows that it had sent everything.
    """
    every = tuple(evidence)
    short = [each for each in every if each.verdict == "short"]
    if is_whole(each for each in every if each.signal != "association"):
        short = [each for each in short if each.signal != "association"]
    return tuple(dict.fromkeys(each.words for each in short))


def is_whole(evidence: Iterable[Evidence]) -> bool:
    """Whether a count proves that every instance is there, and nothing speaks against it."""
    every = tuple(evidence)
    proven = any(each.verdict == "whole" and each.signal in COUNTS for each in every)
    return proven and not any(each.verdict == "short" for each in every)


def _volume(
    group: VolumeGroup, wanted: Mapping[str, Dataset], given: Circumstances
) -> NewJob | str:
    """The job of one volume, why there is none, or '' where nothing is left to do."""
    members = [wanted[uid] for uid in group.sop_instance_uids]
    before = [job for job in given.earlier if job.instance_uids & set(group.sop_instance_uids)]
    as_a_set = text(members[0], "Modality") == "PT"
    settled = [job for job in before if not job.waits_for_more]
    gone = [] if settled else [job for job in given.earlier if job.instance_uids & given.purged]
    done = frozenset[str]() if as_a_set else _uids_of(settled)
    uids = tuple(uid for uid in group.sop_instance_uids if uid not in done)
    if not uids or (as_a_set and any(job.instance_uids == set(uids) for job in settled)):
        return ""
    decision = _decision(members, settled or gone, given)
    if decision.task is None:
        return decision.reason or "no route matches"
    apart = len(group.sop_instance_uids) - len(uids) + len(_uids_of(gone))
    late = f"late, apart from {apart} earlier instances" if apart else ""
    notes = (late, _revision(settled, uids) if as_a_set else "")
    rest = replace(group, sop_instance_uids=uids)
    job = _job(rest, members, decision, given, _joined(notes), _superseded(before, as_a_set))
    alone = _why_not_alone(gone, [*before, *gone], given.purged, as_a_set=as_a_set)
    return replace(job, state=JobState.REFUSED, reason=alone, awaits_rest=False) if alone else job


def _why_not_alone(
    gone: Sequence[EarlierJob],
    every: Sequence[EarlierJob],
    purged: frozenset[str],
    *,
    as_a_set: bool,
) -> str | None:
    """Why what came late may not be restored without those before it, whose files are gone."""
    if as_a_set and any(job.instance_uids & purged for job in every):
        return "the earlier instances have left the spool; send the whole series again"
    if len({job.volume_key for job in gone}) > 1:
        return "the volumes that these may belong to have left the spool; send the series again"
    return None


def _uids_of(jobs: Iterable[EarlierJob]) -> frozenset[str]:
    return frozenset(uid for job in jobs for uid in job.instance_uids)


def _decision(
    members: Sequence[Dataset], settled: Sequence[EarlierJob], given: Circumstances
) -> Decision:
    """Where a volume goes: what comes late goes where those before it went."""
    representative = division.representative(members)
    if settled:
        last, refused = settled[-1], opted_out(representative, given.routes)
        if refused is not None:
            return Decision(None, (), None, 0, refused)
        return Decision(
            last.task, last.destinations, last.route, last.priority, None, last.strength
        )
    return decide(given.titles, representative, given.routes, given.now)


def _revision(settled: Sequence[EarlierJob], uids: Sequence[str]) -> str:
    if not settled:
        return ""
    last = settled[-1]
    before = len(last.instance_uids)
    made = last.derived_series_instance_uid
    of = f" restored as {made}" if made else ""
    return f"revision with {len(uids)} instances of a series{of} when it had {before}"


def _superseded(before: Sequence[EarlierJob], as_a_set: bool) -> tuple[int, ...]:
    """Jobs that have not begun and that the new one includes."""
    return tuple(
        job.id
        for job in before
        if (as_a_set and job.state is JobState.QUEUED)
        or (job.waits_for_more and job.state is JobState.HELD)
    )


def _job(
    group: VolumeGroup,
    members: Sequence[Dataset],
    decision: Decision,
    given: Circumstances,
    note: str,
    supersedes: tuple[int, ...],
) -> NewJob:
    """The job of one volume in the state that its headers put it in."""
    assert decision.task is not None
    state, reason = JobState.QUEUED, ""
    missing = _joined(lacking((*given.series, *group.evidence)))
    try:
        # Of all that lies beside them: one slice alone of a mixed series looks like any other.
        division.judge(members, task=decision.task, policy=given.policy)
    except RefusedError as error:
        state, reason = JobState.REFUSED, error.message
    awaits_rest = bool(missing) and state is JobState.QUEUED and not given.forced
    if awaits_rest:
        state = _INCOMPLETE[given.policy.incomplete]
        awaits_rest = state is not JobState.QUEUED
    said = (note, missing) if state is JobState.QUEUED else (reason, "" if reason else missing)
    return NewJob(
        series_instance_uid=text(members[0], "SeriesInstanceUID"),
        volume_key=group.key,
        task=decision.task,
        destinations=decision.destinations,
        instance_uids=group.sop_instance_uids,
        route=decision.route or "",
        priority=decision.priority,
        state=state,
        reason=_joined(said) or None,
        strength=decision.strength,
        not_before=decision.not_before,
        evidence=tuple(each.as_row() for each in (*given.series, *group.evidence)),
        awaits_rest=awaits_rest,
        supersedes=supersedes,
    )


_INCOMPLETE: Mapping[str, JobState] = {
    "restore": JobState.QUEUED,
    "hold": JobState.HELD,
    "refuse": JobState.REFUSED,
}


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def titles_of(senders: Sequence[Sender], otherwise: Titles | None = None) -> Titles:
    """Who sent a series: of several senders the one that brought most, of those the first.

    *otherwise* where none is known to have brought anything.
    """
    brought: dict[Titles, int] = {}
    for sender in senders:
        titles = Titles(sender.calling_ae, sender.called_ae, sender.address)
        brought[titles] = brought.get(titles, 0) + sender.instances
    if not any(brought.values()):
        return otherwise or Titles()
    return max(brought, key=lambda titles: brought[titles])


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
