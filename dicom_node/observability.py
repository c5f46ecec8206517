"""Logs without patient data, and the node's metrics.

A log line is a short text and structured fields: `log.info("instance received", series=…)`.
Fields that could carry patient data are withheld whatever their caller meant, and so is what a
library says in an exception or warning, since it may quote the value that displeased it.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, TextIO

import structlog
from prometheus_client import Counter, Gauge, Histogram
from structlog.typing import EventDict, Processor, WrappedLogger

from dicom_node.errors import NodeError

STATES = Counter(
    "dicom_node_states",
    "States that instances, series, jobs and deliveries have entered in this process.",
    ["entity", "state"],
)
RECEIVED_BYTES = Counter("dicom_node_received_bytes", "Bytes of received SOP Instances.")
FREE_BYTES = Gauge("dicom_node_free_bytes", "Free bytes on the disk of the spool.")
JOB_SECONDS = Histogram(
    "dicom_node_job_seconds",
    "Duration of the steps of finished jobs.",
    ["task", "step"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
)

WITHHELD = "[withheld]"
# Keywords of PS3.15 Table E.1-1 that a field could be named after; all of `patient…` besides.
_IDENTIFYING = frozenset(
    {
        "accessionnumber",
        "birthdate",
        "birthname",
        "issuerofpatientid",
        "medicalrecordlocator",
        "mothersbirthname",
        "mrn",
        "nameofphysiciansreadingstudy",
        "operatorsname",
        "otherpatientids",
        "otherpatientnames",
        "performingphysicianname",
        "personname",
        "referringphysicianname",
        "requestingphysician",
        "responsibleperson",
    }
)
_DICOM_LIBRARIES = ("pydicom", "pynetdicom", "highdicom")
_LIBRARY_LEVELS = {
    # At INFO and below pynetdicom prints PDUs and data sets.
    "pynetdicom": logging.WARNING,
    # pydicom's warnings quote the value that displeased it.
    "pydicom": logging.ERROR,
    "alembic": logging.WARNING,
    "sqlalchemy": logging.WARNING,
}


def configure(
    *,
    level: str = "INFO",
    format: Literal["auto", "json", "console"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Set up logging of the whole process, of libraries that use the standard module too.

    Args:
        level: Least level that is written.
        format: `json`, one object per line; `console`, for people; `auto`, by the stream.
        stream: Where to, standard error by default.
    """
    target = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        describe_exception,
        withhold,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    for_people = format == "console" or (format == "auto" and target.isatty())
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=target.isatty())
        if for_people
        else structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    _capture_standard_logging(handler, level)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger that takes an event text and structured fields."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def withhold(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Replace the value of every field that could carry patient data."""
    return {key: _safe(key, value) for key, value in event.items()}


def describe_exception(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Replace an exception by its type and places; only the node's own errors keep their words."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["exception"] = _described(error)
    return event


def _capture_standard_logging(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name, least in _LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, root.level))
    logging.captureWarnings(True)
    warned = logging.getLogger("py.warnings")
    if _is_harmless not in warned.filters:
        warned.addFilter(_is_harmless)


def _is_harmless(record: logging.LogRecord) -> bool:
    """Drop the warnings of DICOM libraries, which quote values of the data set."""
    return not any(f"/{library}/" in record.getMessage() for library in _DICOM_LIBRARIES)


def _safe(key: str, value: object) -> object:
    if key.startswith("_"):
        return value  # structlog's own
    plain = re.sub(r"[^a-z]", "", key.lower())
    if plain.startswith("patient") or plain in _IDENTIFYING:
        return WITHHELD
    if isinstance(value, bytes | bytearray | memoryview):
        return WITHHELD
    if type(value).__module__.partition(".")[0] in _DICOM_LIBRARIES and not _is_uid(value):
        return WITHHELD
    if isinstance(value, Mapping):
        return {str(each): _safe(str(each), inner) for each, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_safe("", inner) for inner in value]
    return value


def _is_uid(value: object) -> bool:
    return type(value).__name__ == "UID" and isinstance(value, str)


def _described(error: BaseException) -> str:
    lines = []
    seen: BaseException | None = error
    while seen is not None:
        words = f": {seen}" if isinstance(seen, NodeError) else ""
        lines.append(f"{type(seen).__name__}{words}{_places(seen.__traceback__)}")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\n caused by ".join(lines)


def _places(frames: TracebackType | None) -> str:
    return "".join(
        f"\n  {frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(frames)
    )
