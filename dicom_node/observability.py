"""Logs without patient data, and the node's metrics."""

from __future__ import annotations

from typing import Literal, TextIO

import structlog


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
