"""Reading the ledger: lists with filters, one row's whole story, counters."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine

Report = dict[str, Any]


def jobs(
    engine: Engine,
    *,
    state: str | None = None,
    since: float | None = None,
    task: str | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return jobs, newest first."""
    raise NotImplementedError


def job(engine: Engine, job_id: int) -> Report:
    """Return one job with `instances_list`, `outputs` and `history`; NotFoundError if none."""
    raise NotImplementedError


def series(
    engine: Engine,
    *,
    state: str | None = None,
    since: float | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return series, newest first."""
    raise NotImplementedError


def one_series(engine: Engine, series_uid: str) -> Report:
    """Return one series with its `jobs` and `history`; NotFoundError if none."""
    raise NotImplementedError


def deliveries(
    engine: Engine,
    *,
    state: str | None = None,
    since: float | None = None,
    destination: str | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return deliveries, newest first."""
    raise NotImplementedError


def delivery(engine: Engine, delivery_id: int) -> Report:
    """Return one delivery with its `items` and `history`; NotFoundError if none."""
    raise NotImplementedError


def instances(
    engine: Engine,
    *,
    state: str | None = None,
    since: float | None = None,
    series_uid: str | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return received instances, newest first."""
    raise NotImplementedError


def instance(engine: Engine, sop_instance_uid: str) -> Report:
    """Return one instance's story from association to commitment; NotFoundError if none."""
    raise NotImplementedError


def stats(engine: Engine) -> Report:
    """Return counts by state of instances, series, jobs and deliveries."""
    raise NotImplementedError
