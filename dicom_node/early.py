"""Slices restored while their series still comes, for its job to find when it is complete.

Only what a slice becomes whatever its volume is made early; whether the series is complete, may be
restored, passes the gates and goes anywhere is decided where it always is. A guess that proves
wrong has wasted work, and its results are thrown away.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydicom.dataset import Dataset
from sqlalchemy import Engine as Ledger

from dicom_node.dicom import derived, geometry, multiframe
from dicom_node.dicom.header import text
from dicom_node.dicom.volume import SeriesVolume, load
from dicom_node.early_results import Claim, EarlyResults
from dicom_node.errors import NodeError, RefusedError, TransientError, UnreadableInstanceError
from dicom_node.headers_ahead import HeadersAhead
from dicom_node.inference import Engine, SliceRequest
from dicom_node.kept_slices import IMAGE, PLANE, STORED, TWICE, KeptSlices, key_of
from dicom_node.ledger import intake, open_series
from dicom_node.ledger.open_series import Arrival
from dicom_node.ledger.queue import Job, NewJob
from dicom_node.ledger.tables import JobState
from dicom_node.observability import get_logger
from dicom_node.planning import plan, titles_of, why_sent_back
from dicom_node.rehearsal import Expected, Rehearsal, Subject, Written, rehearsed
from dicom_node.reported import delivered_drift
from dicom_node.restored_volumes import RestoredVolumes, judge_domain, seeds
from dicom_node.restoring import parameters_hash
from dicom_node.routing import Routes
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool

#: MR needs the scale and the k-space of its volume, PET is quantified as a set.
MODALITY = "CT"
# A series that was silent for so long, or so many times as long as between slices of late, may be
# all there: then the slices that the gates look at twice are taken to be those of now.
_CALM_S, _CALM_PACES, _MOST_CALM_S = 1.3, 1.5, 5.0
_PACE_KEPT = 0.8
# While it is tried as a whole, the queue of jobs is looked at so often, in seconds.
_DISTURBED_S = 0.25
# So many headers are looked at before the queue of jobs is asked again.
_HEADERS_AT_ONCE = 20

# Headers of series whose jobs have not begun; each takes some 20 kB.
_MOST_HEADERS = 4000

_log = get_logger(__name__)


@dataclass(frozen=True)
class MadeEarly:
    """What a job finds of its series."""

    headers: Mapping[Path, Dataset]  #: some, by file
    kept: KeptSlices | None = None
    volumes: RestoredVolumes | None = None  #: of all its files, without a given scale
    written: Written | None = None  #: the same, as it is expected


@dataclass(frozen=True)
class _Slice:
    """A slice that would be restored if its series were complete."""

    arrival: Arrival
    job: NewJob
    seed: int
    key: str
    place: tuple[float, str]  #: along the normal, as `geometry.order` has it


@dataclass
class _Series:
    """What has come of one series."""

    uid: str
    waiting: deque[Arrival] = field(default_factory=deque)  #: not looked at yet
    looked_at: int = 0
    next: _Slice | None = None
    served: int = 0
    slices: list[_Slice] = field(default_factory=list)  #: that would be restored, in order of place
    changed: float = 0.0  #: when the last of them came
    pace: float = 0.0  #: seconds between them of late
    rehearsed: int = 0  #: of how many all was tried ahead
    probed: set[str] = field(default_factory=set)  #: keys that were looked at twice
    #: Keys at the places of a second look, now and before the last slice came.
    looks: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

    def add(self, found: _Slice, now: float, at: Callable[[int], Sequence[int]]) -> None:
        """Take note of a slice; *at* tells the places of a second look among so many slices."""
        insort(self.slices, found, key=lambda each: each.place)
        places = at(len(self.slices))
        self.looks = frozenset(self.slices[i].key for i in places), self.looks[0]
        if self.changed:
            self.pace = max(now - self.changed, self.pace * _PACE_KEPT)
        self.changed = now

    def is_calm(self, now: float) -> bool:
        """Whether it was silent for longer than it uses to be: it may be all there."""
        return now - self.changed >= max(_CALM_S, min(_CALM_PACES * self.pace, _MOST_CALM_S))

    def second_look(self, now: float) -> _Slice | None:
        """A slice at which the gates will look twice, as far as can be known, and have not yet."""
        settled, before = self.looks
        if not self.is_calm(now):
            settled &= before
        wanted = settled - self.probed
        return next((each for each in self.slices if each.key in wanted), None)


class EarlySlices:
    """Restores a slice at a time, of the most urgent route first, series taking turns."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        ledger: Ledger,
        engine: Engine,
        routes: Routes,
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._ledger = ledger
        self._engine = engine
        self.routes = routes
        self.results = EarlyResults(spool)
        self._series: dict[str, _Series] = {}
        self._headers = HeadersAhead(_MOST_HEADERS)
        self._last = 0
        self._turns = itertools.count(1)
        self._not_before = 0.0
        self._rehearsal: Rehearsal[KeptSlices] | None = None

    def made(self, job: Job) -> MadeEarly:
        """What was made early for a job; it is taken along."""
        headers = self._headers.taken(job.series_instance_uid)
        subject = Subject(
            job.series_instance_uid,
            frozenset(self._spool.resolve(path) for _, path in job.paths),
            job.task,
            job.strength,
        )
        rehearsal, self._rehearsal = self._rehearsal, None
        if rehearsal is not None and rehearsal.subject == subject:
            ready = rehearsal.written
            if ready is not None and ready.expected != Expected.of(job):
                self._forget(rehearsal)
                ready = None
            return MadeEarly(headers, rehearsal.kept, rehearsal.volumes, ready)
        self._forget(rehearsal)
        # A received file is named by the digest of its bytes: `Spool.write`.
        files = {uid: path.rpartition("/")[2].partition(".")[0] for uid, path in job.paths}
        return MadeEarly(headers, self._kept(job.series_instance_uid, job, files))

    def _forget(self, rehearsal: Rehearsal[KeptSlices] | None) -> None:
        """Remove the files that no job will have."""
        if rehearsal is not None and rehearsal.written is not None:
            uid, names = rehearsal.subject.series_instance_uid, rehearsal.written.names
            self.results.remove(uid, names)

    def _kept(
        self, series_uid: str, job: Job | NewJob, files: Mapping[str, str]
    ) -> KeptSlices | None:
        key = key_of(self._engine, job.task, job.strength)
        return None if key is None else KeptSlices(self.results, series_uid, key, files)

    def turn(self, now: float, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Restore one slice; False where none is to be restored.

        Where none is left, a series that is calm is tried as a whole, until *is_stopped*.
        """
        if now < self._not_before:
            return False
        self._look()
        looked = self._choose(now)
        ready = [series for series in self._series.values() if series.next is not None]
        if not ready:
            # To try a series is to look twice where that is not done, all at once.
            return looked or self._rehearse(now, is_stopped) or self._probe(now)
        chosen = min(ready, key=_urgency)
        wanted, chosen.next, chosen.served = chosen.next, None, next(self._turns)
        assert wanted is not None
        with self._making(wanted, wanted.key, now) as claim:
            if claim is not None:
                self._make(wanted, claim)
        return True

    def _make(self, wanted: _Slice, claim: Claim) -> None:
        """Restore a slice, and make what can be made of its derived image."""
        volume = self._volume(wanted)
        made = self._engine.restore_slice(_request(wanted, volume))
        if made is None:
            return
        task, strength, model = wanted.job.task, wanted.job.strength, self._engine.model
        restored = self._engine.plane(made, _plane_shape(volume))
        quantised = derived.quantise(volume, restored[None])
        drift = next((each.value for each in delivered_drift(volume, quantised)), None)
        image = derived.prepare(
            quantised,
            task=task,
            model=model,
            identity=self._settings.identity,
            strength=strength,
            parameters_hash=parameters_hash(task, self._engine.parameters(task), strength),
            drift=drift,
        )
        beside = {PLANE: made.plane}
        if image is not None:
            beside |= {IMAGE: image.image, STORED: image.stored}
        claim.keep(made.facts, beside)

    def _probe(self, now: float) -> bool:
        """Have the gates look twice at one slice that was restored; False where none waits."""
        for series in sorted(self._series.values(), key=lambda each: each.served):
            if self._is_tried(series) or (wanted := series.second_look(now)) is None:
                continue
            series.probed.add(wanted.key)
            series.served = next(self._turns)
            with self._making(wanted, wanted.key + TWICE, now) as claim:
                made = self.results.read(series.uid, wanted.key) if claim is not None else None
                if claim is not None and made is not None:
                    request = _request(wanted, self._volume(wanted))
                    if (probed := self._engine.probe_slice(request, made)) is not None:
                        claim.keep(probed)
            return True
        return False

    def _rehearse(self, now: float, is_stopped: Callable[[], bool]) -> bool:
        """Try a series as a whole of which all was restored; False where there is none."""
        for series in self._series.values():
            if series.rehearsed == len(series.slices) or not series.is_calm(now):
                continue
            series.rehearsed = len(series.slices)
            if self._is_whole(series):
                with self._left_to_its_job(now):
                    self._forget(self._rehearsal)
                    self._rehearsal = None  # memory for one
                    self._rehearsal = self._tried(series, is_stopped)
                return True
        return False

    def _is_tried(self, series: _Series) -> bool:
        """Whether its job would find an outcome, in which every look was taken."""
        tried = self._rehearsal
        return (
            tried is not None
            and tried.subject.series_instance_uid == series.uid
            and len(tried.subject.files) == series.looked_at
        )

    def _is_whole(self, series: _Series) -> bool:
        """Whether one job would have all that came, and each slice of it is restored."""
        jobs = {(each.job.task, each.job.strength) for each in series.slices}
        return (
            series.looked_at == len(series.slices)
            and len(jobs) == 1
            and all(self.results.has(series.uid, each.key) for each in series.slices)
        )

    def _tried(
        self, series: _Series, is_stopped: Callable[[], bool]
    ) -> Rehearsal[KeptSlices] | None:
        arrivals, job = [each.arrival for each in series.slices], series.slices[0].job
        files = {each.sop_instance_uid: each.sha256 for each in arrivals}
        kept = self._kept(series.uid, job, files)
        # In single precision, in stored values, and in files.
        room = self.results.has_room(5 * sum(each.size for each in arrivals))
        if kept is None or not room:
            return None
        paths = frozenset(self._spool.resolve(each.path) for each in arrivals)
        asked_at = time.monotonic()

        def is_disturbed() -> bool:
            nonlocal asked_at
            if is_stopped():
                return True
            if time.monotonic() - asked_at < _DISTURBED_S:
                return False
            asked_at = time.monotonic()
            return open_series.others_wait(self._ledger, series.uid)

        return rehearsed(
            Subject(series.uid, paths, job.task, job.strength),
            Expected(
                datetime.fromtimestamp(max(each.received_at for each in arrivals), UTC),
                job.destinations,
                None,
            ),
            kept,
            self._headers.of(series.uid),
            self._engine,
            self._settings,
            self.results,
            self._spool.root / "temporary",
            is_disturbed,
        )

    def _look(self) -> None:
        """Take note of what has come, and forget series that are not open any more."""
        arrived = open_series.arrivals(self._ledger, after=self._last, modality=MODALITY)
        for each in arrived:
            uid = each.series_instance_uid
            self._series.setdefault(uid, _Series(uid)).waiting.append(each)
            self._last = max(self._last, each.id)
        if self._series:
            for uid in self._series.keys() - open_series.receiving(
                self._ledger, self._series.keys()
            ):
                del self._series[uid]
        rehearsal = self._rehearsal
        if rehearsal is not None and rehearsal.subject.series_instance_uid not in self._series:
            self._forget(rehearsal)
            self._rehearsal = None

    def _choose(self, now: float) -> bool:
        """Find the next slice of each series; whether there is more to look at."""
        left = _HEADERS_AT_ONCE
        for series in self._series.values():
            while series.next is None and series.waiting:
                if left == 0:
                    return True
                left -= 1
                series.looked_at += 1
                found = self._wanted(series.waiting.popleft(), now)
                if found is None:
                    continue
                series.add(found, now, partial(self._engine.probed, found.job.task))
                if not self.results.has(series.uid, found.key):
                    series.next = found
        return left < _HEADERS_AT_ONCE and any(each.waiting for each in self._series.values())

    def _wanted(self, arrival: Arrival, now: float) -> _Slice | None:
        """The slice as it would be restored by the rules of now; None: it would not be."""
        try:
            path = self._spool.resolve(arrival.path)
            header = self._headers.read(arrival.series_instance_uid, path)
            job = self._job(arrival, header, now)
            if job is None or job.task not in self._engine.tasks:
                return None
            verdict = judge_domain(header, job.task, self._engine, self._settings)
            frame = geometry.slice_frame(header)
        except (RefusedError, UnreadableInstanceError, FileNotFoundError):
            return None  # its job will say so
        key = key_of(self._engine, job.task, job.strength)
        if key is None or verdict.upsample > 1:
            return None
        (seed,) = seeds([header], self._engine.model)
        place = float(geometry.positions([frame])[0]), arrival.sop_instance_uid
        return _Slice(arrival, job, seed, key(arrival.sha256, seed), place)

    def _job(self, arrival: Arrival, header: Dataset, now: float) -> NewJob | None:
        """The job that there would be if the slice were all."""
        if multiframe.is_multiframe(header):
            return None
        senders = intake.series_senders(self._ledger, arrival.series_instance_uid)
        titles = titles_of(senders)
        decided = plan(
            titles,
            {text(header, "SOPInstanceUID"): header},
            routes=self.routes,
            policy=self._settings.policy,
            sent_back=partial(why_sent_back, titles=titles, settings=self._settings),
            now=now,
        )
        for job in decided.jobs:
            # More slices come: that some are missing says nothing yet.
            if (job.state is JobState.QUEUED or job.awaits_rest) and job.not_before <= now:
                return job
        return None

    @contextmanager
    def _making(self, wanted: _Slice, key: str, now: float) -> Generator[Claim | None]:
        """Claim a result of a slice."""
        arrival = wanted.arrival
        with (
            self._left_to_its_job(now),
            self.results.claimed(arrival.series_instance_uid, key) as claim,
        ):
            # In single precision, with thumbnails and words beside it.
            room = claim is not None and self.results.has_room(16 * arrival.size)
            yield claim if room else None

    @contextmanager
    def _left_to_its_job(self, now: float) -> Generator[None]:
        """Leave what goes wrong within for the job to find."""
        try:
            yield
        except TransientError as error:
            self._not_before = now + self._settings.engine.retry_s
            _log.warning("early slices wait", action="early_waits", error=error.message)
        except (NodeError, OSError) as error:
            words = error.message if isinstance(error, NodeError) else error.strerror
            _log.info("slice not restored early", action="early_skipped", error=words)
        except Exception as error:
            # The text may quote a header; its type is enough, and the job will tell where.
            _log.warning("early slice failed", action="early_failed", error=type(error).__name__)

    def _volume(self, wanted: _Slice) -> SeriesVolume:
        path = self._spool.resolve(wanted.arrival.path)
        return load([path], wanted.job.task, self._settings.policy)


def _plane_shape(volume: SeriesVolume) -> tuple[int, int]:
    _, rows, columns = volume.array.shape
    return rows, columns


def _request(wanted: _Slice, volume: SeriesVolume) -> SliceRequest:
    return SliceRequest(volume.array[0], wanted.job.task, wanted.seed, wanted.job.strength)


def _urgency(series: _Series) -> tuple[int, int]:
    assert series.next is not None
    return -series.next.job.priority, series.served
