"""When a series is complete: it is looked at until signals say so, planned, and put in the queue.

Signals are the end of the associations that brought it, the quiet time of its source and modality,
the counts that headers announce or the source tells by C-FIND, and gaps in position. What they say
is kept with the series. Jobs and state are written in one transaction, so a crash leaves the series
as it was and the next tick decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node.dicom.expected import Evidence, announced_by
from dicom_node.dicom.header import read_header
from dicom_node.errors import TransientError, UnreadableInstanceError, whereabouts
from dicom_node.headers_ahead import HeadersAhead
from dicom_node.ledger import intake, open_series, queue
from dicom_node.ledger.intake import InstanceRow, Sender, SeriesProgress
from dicom_node.ledger.tables import SeriesState
from dicom_node.observability import get_logger
from dicom_node.planning import Plan, is_whole, plan, titles_of, why_sent_back
from dicom_node.query_scu import SourceCount, count_instances, source_peer
from dicom_node.routing import Routes, Titles
from dicom_node.settings import NodeSettings, Source, SourceQuery
from dicom_node.spool import Spool

# A source that did not answer holds up every series at each look; it is left alone for so long.
_NOT_ASKED_AGAIN_S = 60.0
# So many instances between two looks are little; so many headers are read ahead in one look, and
# so many are kept.
_LITTLE, _AT_ONCE = 40, 100
_MOST_HEADERS = 1000

Ask = Callable[[SourceQuery, str, str], SourceCount]

_log = get_logger(__name__)


@dataclass(frozen=True)
class Readiness:
    """Why a series is looked at now: what the clock, the senders and a person say of it."""

    evidence: tuple[Evidence, ...]
    #: Only counts that prove it whole let it be concluded, as its quiet time is not over.
    only_if_whole: bool = False


def quiet_time(
    settings: NodeSettings, modality: str, senders: Iterable[Sender]
) -> tuple[float, str]:
    """How long a series must be quiet, in seconds, and by whose habit; the longest counts."""
    default = settings.assembly.quiet_for(modality), "any source"
    known = {
        name: source.quiet_for(modality)
        for sender in senders
        for name, source in sources_of(settings, sender)
    }
    own = [(seconds, name) for name, seconds in known.items() if seconds is not None]
    return max(own) if own else default


def sources_of(settings: NodeSettings, sender: Sender) -> list[tuple[str, Source]]:
    """The `[sources]` tables that a sender matches, by name."""
    found = settings.sources.items()
    return [(n, s) for n, s in found if s.matches(sender.calling_ae, sender.address)]


def readiness(
    series: SeriesProgress,
    senders: Sequence[Sender],
    settings: NodeSettings,
    now: float,
    *,
    last_activity: float | None = None,
    open_since: float | None = None,
) -> Readiness | None:
    """Whether a series is to be concluded now, and on what; None: it is left open. Pure.

    *last_activity* replaces the time of the last instance where the clock has gone back;
    *open_since* is when the first instance came that has not been dealt with.
    """
    if series.forced:
        words = f"taken as it is by a person: {series.reason or 'no reason given'}"
        return Readiness((Evidence("forced", "unproven", words), *_brought(senders)))
    last = series.last_received if last_activity is None else last_activity
    quiet_s, by = quiet_time(settings, series.modality, senders)
    idle = now - last
    if not series.open_associations and idle >= quiet_s:
        words = f"quiet for {idle:.0f} s of {quiet_s:g} s ({by})"
        return Readiness((Evidence("quiet", "unproven", words), *_ended(senders)))
    limit = settings.assembly.longest_s
    if open_since is not None and now - open_since >= limit:
        words = f"still being sent after {limit:g} s"
        return Readiness((Evidence("overdue", "short", words), *_brought(senders)))
    released = bool(senders) and senders[-1].outcome == "released"
    if settings.assembly.complete_when_counted and released and not series.open_associations:
        return Readiness(_ended(senders), only_if_whole=True)
    return None


def _brought(senders: Sequence[Sender]) -> tuple[Evidence, ...]:
    if not senders:
        return ()
    return (Evidence("association", "unproven", _words(senders)),)


def _ended(senders: Sequence[Sender]) -> tuple[Evidence, ...]:
    """How the associations ended: a sender that broke off had not sent everything."""
    if not senders:
        return ()
    last = senders[-1].outcome
    if last in ("aborted", "lost"):
        broke = {"aborted": "was aborted", "lost": "was lost when the node ended"}[last]
        words = f"the last association {broke}: {_words(senders)}"
        return (Evidence("association", "short", words),)
    return _brought(senders)


def _words(senders: Sequence[Sender]) -> str:
    shown = [
        f"{each.calling_ae}@{each.address} {each.outcome or 'open'}, {each.instances} instances"
        for each in senders[-5:]
    ]
    earlier = len(senders) - len(shown)
    return "; ".join([*([f"{earlier} associations before"] if earlier else []), *shown])


class Assembler:
    """Looks at the open series of the ledger and concludes those that are complete."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        ledger: Engine,
        routes: Routes,
        ask: Ask | None = None,
    ) -> None:
        """*ask* counts the instances of (study, series) at a source; by C-FIND where it is None."""
        self._settings = settings
        self._spool = spool
        self._ledger = ledger
        self.routes = routes
        self._ask = ask or partial(_ask_by_c_find, settings)
        self._clock_went_back: dict[str, tuple[float, float]] = {}
        self._looked_at: dict[str, int] = {}
        # What was left open as it stood, and until when nothing but a change of it matters.
        self._left_open: dict[str, tuple[SeriesProgress, float]] = {}
        self._silent_until: dict[str, float] = {}
        self._ahead, self._read_to, self._newest = HeadersAhead(_MOST_HEADERS), 0, 0

    def tick(self, now: float) -> int:
        """Conclude every series that is complete; returns how many."""
        progress = intake.series_progress(self._ledger)
        known = {series.series_instance_uid for series in progress}
        for memory in (self._clock_went_back, self._looked_at, self._left_open):
            for gone in memory.keys() - known:
                del memory[gone]
        concluded = sum(self._consider_alone(series, now) for series in progress)
        if self._settings.engine.early:
            self._ahead.keep_only(known)
            self._read_ahead()
        return concluded

    def next_look(self, now: float) -> float:
        """In how many seconds a series that was left open may be complete; may be infinite."""
        times = (until for _, until in self._left_open.values())
        return min((until - now for until in times if until > now), default=float("inf"))

    def _read_ahead(self) -> None:
        """Read headers of what has come to open series, where little has come since the last look.

        All of a series at once would be 5 ms for each slice between its completeness and its job.
        """
        try:
            newest = open_series.newest(self._ledger)
            came, self._newest = newest - self._newest, newest
            if newest == self._read_to or came > _LITTLE:
                return  # receiving comes first: a burst is read when it is over
            arrived = open_series.arrivals(self._ledger, after=self._read_to, limit=_AT_ONCE)
            if not arrived:
                self._read_to = newest  # of series that are not open any more
        except TransientError:
            return
        for each in arrived:
            self._read_to = max(self._read_to, each.id)
            with suppress(UnreadableInstanceError, FileNotFoundError):
                self._ahead.read(each.series_instance_uid, self._spool.resolve(each.path))

    def _consider_alone(self, series: SeriesProgress, now: float) -> int:
        """One series in trouble must not hold up the others; it is looked at again next tick."""
        try:
            return self._consider(series, now)
        except TransientError as error:
            _log.warning(
                "series not concluded",
                action="series_trouble",
                series_instance_uid=series.series_instance_uid,
                error=str(error),
            )
        except Exception as error:
            # Our mistake, and it would be made again at each tick, by each process after this one.
            reason = f"unexpected {whereabouts(error)}"
            _log.error(
                "series not concluded",
                action="series_failed",
                series_instance_uid=series.series_instance_uid,
                error=reason,
            )
            uid, seen = series.series_instance_uid, series.instances
            intake.ignore_series(self._ledger, uid, reason, now, instances_seen=seen)
        return 0

    def _consider(self, series: SeriesProgress, now: float) -> int:
        uid = series.series_instance_uid
        overdue = now - series.first_received >= self._settings.assembly.longest_s
        if series.open_associations and not overdue and not series.forced:
            return 0
        if self._stays_open(series, now):
            return 0
        senders = intake.series_senders(self._ledger, uid)
        last = self._last_activity(series, now)
        ready = readiness(
            series,
            senders,
            self._settings,
            now,
            last_activity=last,
            open_since=intake.open_since(self._ledger, uid) if overdue else None,
        )
        if ready is None or (ready.only_if_whole and not self._may_be_whole(series)):
            quiet_s, _ = quiet_time(self._settings, series.modality, senders)
            over = min(quiet_s, self._settings.assembly.longest_s + series.first_received - last)
            self._left_open[uid] = (series, last + over)
            return 0
        return self._conclude(series, senders, ready, now)

    def _stays_open(self, series: SeriesProgress, now: float) -> bool:
        """Whether it is as it was when it was left open, and its time is not over.

        With its associations closed only an instance, a person or the clock can change what is
        said of it: a node that has many open series does not ask for their senders each second.
        """
        left, until = self._left_open.get(series.series_instance_uid, (None, 0.0))
        return series == left and series.last_received <= now < until

    def _last_activity(self, series: SeriesProgress, now: float) -> float:
        """When the last instance came; where the clock has gone back since, when we saw that."""
        uid, last = series.series_instance_uid, series.last_received
        if last <= now:
            self._clock_went_back.pop(uid, None)
            return last
        stamp, seen = self._clock_went_back.get(uid, (last, now))
        if stamp != last or seen > now:
            seen = now
        self._clock_went_back[uid] = (last, seen)
        return seen

    def _may_be_whole(self, series: SeriesProgress) -> bool:
        """Whether it is worth reading every header before the quiet time is over.

        Once for each number of instances, and only where one header announces no more than came.
        """
        uid = series.series_instance_uid
        if self._looked_at.get(uid) == series.instances:
            return False
        self._looked_at[uid] = series.instances
        rows = intake.series_instances(self._ledger, uid)
        if not rows:
            return False
        try:
            announced = announced_by(read_header(self._spool.resolve(rows[0].path)))
        except (UnreadableInstanceError, FileNotFoundError):
            return False
        return announced is not None and series.instances >= announced

    def _conclude(
        self, series: SeriesProgress, senders: Sequence[Sender], ready: Readiness, now: float
    ) -> int:
        uid = series.series_instance_uid
        rows = intake.series_instances(self._ledger, uid)
        headers = self._headers(uid, rows, now)
        last = Titles(series.calling_ae, series.called_ae, series.address)
        titles = titles_of(senders, otherwise=last)
        asked = [] if ready.only_if_whole else self._source_counts(series, senders, now)
        decided = plan(
            titles,
            headers,
            routes=self.routes,
            policy=self._settings.policy,
            sent_back=partial(why_sent_back, titles=titles, settings=self._settings),
            earlier=queue.series_jobs(self._ledger, uid),
            evidence=[*ready.evidence, *asked],
            forced=series.forced,
            trust=self._settings.assembly.trust_images_in_acquisition,
            purged=intake.instances_purged(self._ledger, uid),
            now=now,
        )
        if ready.only_if_whole and not is_whole(decided.evidence):
            return 0
        if not self._write(series, decided, now):
            return 0
        _log.info(
            "series concluded",
            action="series_concluded",
            series_instance_uid=uid,
            state=decided.state.value,
            reason=decided.reason,
            jobs=len(decided.jobs),
        )
        return 1

    def _source_counts(
        self, series: SeriesProgress, senders: Sequence[Sender], now: float
    ) -> list[Evidence]:
        """What the sources that can be asked say of the number of instances."""
        finds = {
            name: source.find
            for sender in senders
            for name, source in sources_of(self._settings, sender)
            if source.find is not None
        }
        kept = intake.instances_kept(self._ledger, series.series_instance_uid) if finds else ()
        return [
            _compared(name, self._asked(name, find, series, now), frozenset(kept))
            for name, find in finds.items()
        ]

    def _asked(
        self, name: str, find: SourceQuery, series: SeriesProgress, now: float
    ) -> SourceCount:
        if now < self._silent_until.get(name, now):
            return SourceCount(name, None, trouble="did not answer a moment ago")
        counted = self._ask(find, series.study_instance_uid, series.series_instance_uid)
        if counted.trouble is not None:
            self._silent_until[name] = now + _NOT_ASKED_AGAIN_S
            _log.warning(
                "source not counted", action="source_trouble", source=name, error=counted.trouble
            )
        return counted

    def _headers(
        self, series_uid: str, rows: Sequence[InstanceRow], now: float
    ) -> dict[str, Dataset]:
        """Headers by SOP Instance UID; an instance that has become unreadable is put aside."""
        headers: dict[str, Dataset] = {}
        known = self._ahead.of(series_uid)
        for row in rows:
            path = self._spool.resolve(row.path)
            try:
                headers[row.sop_instance_uid] = known.get(path) or read_header(path)
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
        uid, seen = series.series_instance_uid, series.instances
        evidence: list[Mapping[str, object]] = [each.as_row() for each in decided.evidence]
        if decided.state is SeriesState.IGNORED:
            reason = decided.reason or ""
            return intake.ignore_series(
                self._ledger, uid, reason, now, instances_seen=seen, evidence=evidence
            )
        made = queue.enqueue(
            self._ledger,
            uid,
            series_state=decided.state,
            reason=decided.reason,
            jobs=decided.jobs,
            instances_seen=seen,
            now=now,
            evidence=evidence,
        )
        return made is not None


def _ask_by_c_find(
    settings: NodeSettings, find: SourceQuery, study_uid: str, series_uid: str
) -> SourceCount:
    return count_instances(source_peer(find, settings.node.ae_title), study_uid, series_uid)


def _compared(name: str, told: SourceCount, kept: frozenset[str]) -> Evidence:
    """What a source has beside what we have of a series."""
    if told.expected is None:
        words = f"source {name}: {told.trouble or 'gave no number'}"
        return Evidence("c_find", "unproven", words, found=len(kept))
    absent = told.expected - len(kept)
    if told.sop_instance_uids is not None:
        absent = len(told.sop_instance_uids - kept)
    if absent > 0:
        words = f"source {name} has {told.expected} instances, {absent} of them are missing here"
        return Evidence("c_find", "short", words, told.expected, len(kept))
    words = f"source {name} has {told.expected} instances, all of them here"
    return Evidence("c_find", "whole", words, told.expected, len(kept))
