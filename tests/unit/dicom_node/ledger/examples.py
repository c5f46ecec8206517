"""What the tests of the ledger write into it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine

from dicom_node.breaker import Rule
from dicom_node.ledger import intake, queue
from dicom_node.ledger.states import SeriesState, Verdict
from dicom_node.ledger.verdicts import NOWHERE

SERIES = "1.2.3"
STUDY = "1.2"
NOW = 1_700_000_000.0


def instance(number: int, **changes: object) -> intake.ReceivedInstance:
    """The received CT slice of that number."""
    values: dict[str, object] = {
        "sop_instance_uid": f"{SERIES}.{number}",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "study_instance_uid": STUDY,
        "series_instance_uid": SERIES,
        "modality": "CT",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "path": f"incoming/00/{number}.dcm",
        "sha256": f"{number:064x}",
        "size": 1000,
        **changes,
    }
    return intake.ReceivedInstance(**values)  # type: ignore[arg-type]


def new_job(instances: Sequence[int] = (1, 2), **changes: object) -> queue.NewJob:
    """A job over slices of those numbers."""
    values: dict[str, object] = {
        "series_instance_uid": SERIES,
        "volume_key": "",
        "task": "ct_denoise",
        "destinations": ("pacs",),
        "instance_uids": tuple(f"{SERIES}.{number}" for number in instances),
        "route": "ct",
        **changes,
    }
    return queue.NewJob(**values)  # type: ignore[arg-type]


def output(number: int) -> queue.Output:
    """The restored slice of that number."""
    return queue.Output(
        sop_instance_uid=f"2.25.{number}",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        source_sop_instance_uid=f"{SERIES}.{number}",
        path=f"outgoing/2.25/2.25.{number}.dcm",
        sha256=f"{number:064x}",
        size=1000,
    )


def judged(*destinations: str, verdict: Verdict = Verdict.PASS, **changes: object) -> queue.Judged:
    """The same verdict for each destination, of no reading."""
    values: dict[str, object] = {
        "modality": "CT",
        "model_sha256": "a" * 64,
        "failed": verdict in (Verdict.HOLD, Verdict.REFUSE),
        "verdicts": dict.fromkeys(destinations or (NOWHERE,), verdict),
        "reason": None if verdict is Verdict.PASS else f"a gate says {verdict}",
        "readings": (),
        "breaker": Rule(window=50, lowest=0.0, highest=0.05, significance=0.001),
        **changes,
    }
    return queue.Judged(**values)  # type: ignore[arg-type]


def close_series(engine: Engine, *jobs: queue.NewJob, now: float = NOW) -> list[int]:
    """Close the series over the instances that it has, with the given jobs; their numbers."""
    made = queue.enqueue(
        engine,
        SERIES,
        series_state=SeriesState.COMPLETE,
        reason=None,
        jobs=jobs or (new_job(),),
        instances_seen=len(intake.series_instances(engine, SERIES)),
        now=now,
    )
    assert made is not None
    return made


def claim_job(engine: Engine, now: float = NOW) -> queue.Job:
    """Claim the job that is due as `worker`."""
    job = queue.claim(engine, "worker", lease_s=60, now=now)
    assert job is not None
    return job


def finish_job(
    engine: Engine,
    job_id: int,
    verdict: queue.Judged | None = None,
    outputs: Sequence[queue.Output] = (),
    now: float = NOW,
) -> None:
    """Finish a job that `worker` holds, with two results unless others are given."""
    assert queue.finish(
        engine,
        job_id,
        "worker",
        judged=verdict or judged("pacs"),
        outputs=outputs or (output(1), output(2)),
        derived_series_instance_uid="2.25",
        model_sha256="a" * 64,
        seconds={"load": 0.5, "restore": 2.0, "derive": 0.25},
        note=None,
        now=now,
    )
