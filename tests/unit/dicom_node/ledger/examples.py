"""What the tests of the ledger write into it."""

from __future__ import annotations

from collections.abc import Sequence

from dicom_node.breaker import Rule
from dicom_node.ledger import intake, queue
from dicom_node.ledger.states import Verdict
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
