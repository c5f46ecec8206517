"""A receiving side without a socket, and an engine without a network, on real files and rows."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node.assembler import Assembler
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.dicom.geometry import Resampling
from dicom_node.dicom.header import instance_summary, why_ignored
from dicom_node.inference import (
    DomainVerdict,
    MadeSlice,
    ModelIdentity,
    Progress,
    RestorationRequest,
    RestorationResult,
    SliceRequest,
)
from dicom_node.ledger import intake, reports
from dicom_node.readings import GateReading, Level
from dicom_node.restore_worker import RestoreWorker
from dicom_node.routing import parse_routes
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from tests.conftest import ManualClock
from tests.factories import write_series

ROUTES = parse_routes(tomllib.loads(DEFAULT_ROUTES), ["pacs"])
QUIET = 10.0


@dataclass
class Bench:
    """A receiving side without a socket: instances go into spool and ledger as C-STORE does it."""

    folder: Path
    ledger: Engine
    settings: NodeSettings
    spool: Spool
    assembler: Assembler
    clock: ManualClock
    association: int | None = None

    def receive(self, datasets: Sequence[Dataset]) -> None:
        for path in write_series(datasets, self.folder / "sent"):
            stored = self.spool.write(path.read_bytes())
            header = datasets[int(path.stem) - 1]
            summary = instance_summary(header)
            intake.record_instance(
                self.ledger,
                intake.ReceivedInstance(
                    sop_instance_uid=summary.sop_instance_uid,
                    sop_class_uid=summary.sop_class_uid,
                    study_instance_uid=summary.study_instance_uid,
                    series_instance_uid=summary.series_instance_uid,
                    modality=summary.modality,
                    transfer_syntax_uid=summary.transfer_syntax_uid,
                    path=stored.path,
                    sha256=stored.sha256,
                    size=stored.size,
                    association_id=self.association,
                    ignored_reason=why_ignored(header),
                ),
                self.clock(),
            )

    def tick(self, after: float = QUIET) -> int:
        return self.assembler.tick(self.clock.advance(after))

    def jobs(self) -> list[dict[str, Any]]:
        return list(reversed(reports.jobs(self.ledger)))

    def series(self) -> dict[str, Any]:
        (only,) = reports.series(self.ledger)
        return only

    def sources(self, job: dict[str, Any]) -> set[str]:
        return set(reports.job(self.ledger, job["id"])["sources"])

    def job(self) -> dict[str, Any]:
        (only,) = self.jobs()
        return reports.job(self.ledger, only["id"])

    def worker(self, engine: Any, name: str = "restore-0@here", **options: Any) -> RestoreWorker:
        return RestoreWorker(
            self.settings,
            self.spool,
            self.ledger,
            engine,
            name=name,
            clock=self.clock,
            **options,
        )


def bench(folder: Path, ledger: Engine, clock: ManualClock, **sections: Any) -> Bench:
    """A bench in *folder*; *sections* are tables of node.toml."""
    destinations = {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}}
    settings = NodeSettings.model_validate(
        {"assembly": {"quiet_s": QUIET}, "destinations": destinations, **sections}
    )
    spool = Spool(folder / "spool")
    assembler = Assembler(settings, spool, ledger, ROUTES)
    return Bench(folder, ledger, settings, spool, assembler, clock)


def outgoing(node: Bench) -> dict[str, bytes]:
    """The restored files of a node, by their paths in the folder of these."""
    folder = node.spool.root / "outgoing"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.dcm")}


def uids(datasets: Sequence[Dataset]) -> set[str]:
    """The SOP Instance UIDs of some datasets."""
    return {str(dataset.SOPInstanceUID) for dataset in datasets}


def reading(gate: str, level: Level = Level.PASS, value: float = 0.0) -> GateReading:
    """What a gate of the whole volume says."""
    return GateReading(gate, "1", (value,), (), (level,), (None, 1.0), (None, 2.0))


@dataclass
class Gain:
    """An engine that adds a number to each pixel, and does what a test says before each slice."""

    gain: float = 5.0
    before: Callable[[int], None] = lambda number: None
    verdict: DomainVerdict = field(default_factory=DomainVerdict)
    tasks: tuple[str, ...] = ("mri_sr", "ct_denoise", "pet_synthesis")
    model: ModelIdentity = field(default_factory=lambda: ModelIdentity("gain", "1", "ab" * 32))
    facts: list[Mapping[str, Any]] = field(default_factory=list)
    requests: list[RestorationRequest] = field(default_factory=list)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    readings: tuple[GateReading, ...] = (reading("finite"),)
    calibrated: bool = True
    ahead: list[SliceRequest] = field(default_factory=list)
    before_ahead: Callable[[int], None] = lambda number: None
    passes: int = 0  # of slices within a volume
    looks_at: Callable[[int], Sequence[int]] = lambda slices: ()
    probes: list[SliceRequest] = field(default_factory=list)

    def judge(self, task: str, facts: Mapping[str, Any]) -> DomainVerdict:
        self.facts.append(facts)
        return self.verdict

    def parameters(self, task: str) -> Mapping[str, Any]:
        return {"gain": self.gain}

    def basis(self, task: str) -> str | None:
        return "as ever" if task == "ct_denoise" else None

    def restore_slice(self, request: SliceRequest) -> MadeSlice | None:
        self.ahead.append(request)
        self.before_ahead(len(self.ahead))
        return MadeSlice(b"gain", (request.array + np.float32(self.gain)).tobytes())

    def plane(self, made: MadeSlice, shape: tuple[int, int]) -> Any:
        return np.frombuffer(made.plane, np.float32).reshape(shape)

    def probed(self, task: str, slices: int) -> Sequence[int]:
        return self.looks_at(slices)

    def probe_slice(self, request: SliceRequest, facts: bytes) -> bytes | None:
        self.probes.append(request)
        return facts

    def restore(
        self, request: RestorationRequest, progress: Progress | None = None
    ) -> RestorationResult:
        self.requests.append(request)
        finer = np.ones((request.upsample, request.upsample), dtype=np.float32)
        restored = np.stack([np.kron(slice_, finer) for slice_ in request.array])
        for number, slice_ in enumerate(restored):
            known = None
            if request.kept is not None and request.kept.facts(number) is not None:
                known = request.kept.plane(number)
            if known is not None:
                restored[number] = np.frombuffer(known, np.float32).reshape(slice_.shape)
                continue
            self.before(number)
            self.passes += 1
            restored[number] = slice_ + self.gain
            if progress is not None:
                progress(number + 1, len(restored))
        return RestorationResult(
            restored,
            self.model,
            (),
            0.1,
            self.diagnostics,
            Resampling(request.upsample),
            self.readings,
            self.calibrated,
        )
