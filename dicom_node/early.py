"""Slices restored while their series still comes, for its job to find when it is complete.

Only what a slice becomes whatever its volume is made early; whether the series is complete, may be
restored, passes the gates and goes anywhere is decided where it always is. A guess that proves
wrong has wasted work, and its results are thrown away.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import insort
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydicom.dataset import Dataset
from sqlalchemy import Engine as Ledger

from dicom_node import __version__
from dicom_node.dicom import derived, geometry, multiframe
from dicom_node.dicom.header import text
from dicom_node.dicom.volume import SeriesVolume, load
from dicom_node.early_results import Claim, EarlyResults
from dicom_node.errors import NodeError, RefusedError, TransientError, UnreadableInstanceError
from dicom_node.headers_ahead import HeadersAhead
from dicom_node.inference import Engine, SliceRequest
from dicom_node.ledger import intake, open_series
from dicom_node.ledger.open_series import Arrival
from dicom_node.ledger.queue import Job, NewJob
from dicom_node.ledger.tables import JobState
from dicom_node.observability import get_logger
from dicom_node.planning import plan, titles_of, why_sent_back
from dicom_node.reported import delivered_drift
from dicom_node.restoring import judge_domain, parameters_hash, seeds
from dicom_node.routing import Routes
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool

#: MR needs the scale and the k-space of its volume, PET is quantified as a set.
MODALITY = "CT"
# Behind the key of a result: the same facts with those of a second look, the restored pixels, and
# of the image that is derived of them all but the pixels, and those.
_TWICE = "-twice"
PLANE, IMAGE, STORED = BESIDE = ("-plane", "-image", "-stored")
# A series that was silent for so long may be all there: then the slices that the gates look at
# twice are taken to be those of now.
_CALM_S = 2.0
# So many headers are looked at before the queue of jobs is asked again.
_HEADERS_AT_ONCE = 20

# Headers of series whose jobs have not begun; each takes some 20 kB.
_MOST_HEADERS = 4000

_log = get_logger(__name__)

KeyOf = Callable[[str, int], str]


def key_of(engine: Engine, task: str, strength: float) -> KeyOf | None:
    """Name the result of a slice by (digest of its file, seed); None where none is made early.

    Everything else that its bits rest on is in the name too: weights, parameters, the way that this
    machine computes, and the program.
    """
    basis = engine.basis(task)
    if basis is None:
        return None
    rest = {
        "task": task,
        "model": engine.model.sha256,
        "parameters": parameters_hash(task, engine.parameters(task), strength),
        "basis": basis,
        "node": __version__,
    }

    def key(sha256: str, seed: int) -> str:
        named = json.dumps({**rest, "file": sha256, "seed": seed}, sort_keys=True)
        return hashlib.sha256(named.encode()).hexdigest()

    return key


class KeptSlices:
    """The early results that a job may use, by SOP Instance UID and seed."""

    def __init__(
        self, results: EarlyResults, job: Job, key: KeyOf, headers: Mapping[Path, Dataset]
    ) -> None:
        self.headers = headers
        self._results = results
        self._series = job.series_instance_uid
        self._key = key
        # A received file is named by the digest of its bytes: `Spool.write`.
        self._files = {uid: path.rpartition("/")[2].partition(".")[0] for uid, path in job.paths}
        self._asked: set[str] = set()
        self.found = 0

    def has(self, sop_instance_uid: str, seed: int) -> bool:
        """Whether something was made of the instance, damaged or not."""
        return self._results.has(self._series, self._key(self._files[sop_instance_uid], seed))

    def facts(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of what the engine made of it."""
        key = self._key(self._files[sop_instance_uid], seed)
        self._asked |= {key, key + _TWICE, *(key + end for end in BESIDE)}
        octets = self._results.read(self._series, key + _TWICE)
        if octets is None:
            octets = self._results.read(self._series, key)
        self.found += octets is not None
        return octets

    def plane(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the same, its pixels."""
        return self._read(sop_instance_uid, seed, PLANE)

    def image(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of its derived image."""
        return self._read(sop_instance_uid, seed, IMAGE)

    def stored(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the same, its pixels."""
        return self._read(sop_instance_uid, seed, STORED)

    def _read(self, sop_instance_uid: str, seed: int, end: str) -> bytes | None:
        key = self._key(self._files[sop_instance_uid], seed)
        return self._results.read(self._series, key + end)

    def forget(self) -> None:
        """Remove what the job has asked for: it has ended."""
        self._results.remove(self._series, self._asked)


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
    next: _Slice | None = None
    served: int = 0
    slices: list[_Slice] = field(default_factory=list)  #: that would be restored, in order of place
    changed: float = 0.0  #: when the last of them came
    probed: set[str] = field(default_factory=set)  #: keys that were looked at twice
    #: Keys at the places of a second look, now and before the last slice came.
    looks: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

    def add(self, found: _Slice, now: float, at: Callable[[int], Sequence[int]]) -> None:
        """Take note of a slice; *at* tells the places of a second look among so many slices."""
        insort(self.slices, found, key=lambda each: each.place)
        places = at(len(self.slices))
        self.looks = frozenset(self.slices[i].key for i in places), self.looks[0]
        self.changed = now

    def second_look(self, now: float) -> _Slice | None:
        """A slice at which the gates will look twice, as far as can be known, and have not yet."""
        settled, before = self.looks
        if now - self.changed < _CALM_S:
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

    def kept(self, job: Job) -> KeptSlices | None:
        """What was made early for a job; None where nothing is."""
        key = key_of(self._engine, job.task, job.strength)
        headers = self._headers.taken(job.series_instance_uid)
        return None if key is None else KeptSlices(self.results, job, key, headers)

    def turn(self, now: float) -> bool:
        """Restore one slice; False where none is to be restored."""
        if now < self._not_before:
            return False
        self._look()
        looked = self._choose(now)
        ready = [series for series in self._series.values() if series.next is not None]
        if not ready:
            return looked or self._probe(now)
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
            if (wanted := series.second_look(now)) is None:
                continue
            series.probed.add(wanted.key)
            series.served = next(self._turns)
            with self._making(wanted, wanted.key + _TWICE, now) as claim:
                made = self.results.read(series.uid, wanted.key) if claim is not None else None
                if claim is not None and made is not None:
                    request = _request(wanted, self._volume(wanted))
                    if (probed := self._engine.probe_slice(request, made)) is not None:
                        claim.keep(probed)
            return True
        return False

    def _look(self) -> None:
        """Take note of what has come, and forget series that are not open any more."""
        arrived = open_series.arrivals(self._ledger, after=self._last, modality=MODALITY)
        for each in arrived:
            series = self._series.setdefault(each.series_instance_uid, _Series(""))
            series.uid = each.series_instance_uid
            series.waiting.append(each)
            self._last = max(self._last, each.id)
        if self._series:
            for uid in self._series.keys() - open_series.receiving(
                self._ledger, self._series.keys()
            ):
                del self._series[uid]

    def _choose(self, now: float) -> bool:
        """Find the next slice of each series; whether there is more to look at."""
        left = _HEADERS_AT_ONCE
        for series in self._series.values():
            while series.next is None and series.waiting:
                if left == 0:
                    return True
                left -= 1
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
        """Claim a result of a slice; what goes wrong within is left for the job to find."""
        arrival = wanted.arrival
        try:
            with self.results.claimed(arrival.series_instance_uid, key) as claim:
                # In single precision, with thumbnails and words beside it.
                room = claim is not None and self.results.has_room(16 * arrival.size)
                yield claim if room else None
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
