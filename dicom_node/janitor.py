"""Tidying up: expired leases, files without a row, temporary files."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from dicom_node.spool import Spool


@dataclass(frozen=True)
class Recovered:
    """What `recover` found after a stop that was not clean."""

    associations: int
    adopted: int
    quarantined: int
    temporary: int


def recover(engine: Engine, spool: Spool, *, stale_file_s: float, now: float) -> Recovered:
    """Repair what a killed receive process left; call once, before listening."""
    raise NotImplementedError


def sweep(engine: Engine, *, max_attempts: int, now: float) -> int:
    """Give jobs and deliveries with an expired lease back to the queue."""
    raise NotImplementedError
