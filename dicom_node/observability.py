"""Logs without patient data, and the node's metrics."""

from __future__ import annotations

from typing import Literal, TextIO

import structlog
from prometheus_client import Counter, Histogram

STATES = Counter(
    "dicom_node_states",
    "States that instances, series, jobs and deliveries have entered in this process.",
    ["entity", "state"],
)
RECEIVED_BYTES = Counter("dicom_node_received_bytes", "Bytes of received SOP Instances.")
JOB_SECONDS = Histogram(
    "dicom_node_job_seconds",
    "Duration of the steps of finished jobs.",
    ["task", "step"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
)


def configure(
    *,
    level: str = "INFO",
    format: Literal["auto", "json", "console"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Set up logging of the whole process."""
    raise NotImplementedError


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger that takes an event text and structured fields."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
