"""What the gates said, and how the circuit breakers stand, as dictionaries ready for JSON."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select

from dicom_node.ledger import tables
from dicom_node.ledger.rows import Report, history, iso
from dicom_node.ledger.states import BreakerState, Verdict
from dicom_node.ledger.tables import Entity


def judgement(connection: Connection, job_id: int) -> Report:
    """What `jobs show` tells of a result: verdicts, decisions, gates, where the report lies."""
    judged = connection.execute(
        select(tables.judgements).where(tables.judgements.c.job_id == job_id)
    ).one_or_none()
    return {
        "review": None if judged is None else judged.review,
        "verdicts": _verdicts(connection, job_id),
        "gates": _gates(connection, job_id),
    }


def breakers(connection: Connection, window: int) -> list[Report]:
    """Each modality that was judged: state, and failed of the latest jobs of its last model."""
    query = select(tables.breakers).order_by(tables.breakers.c.modality)
    return [
        {
            "modality": row.modality,
            "state": row.state,
            **_rate(connection, row.modality, row.counts_from, window),
            "since": iso(row.opened_at if row.state == BreakerState.OPEN else row.counts_from),
            "reason": row.reason,
            "history": history(connection, Entity.BREAKER, [row.modality]),
        }
        for row in connection.execute(query)
    ]


def verdict_counts(connection: Connection) -> dict[str, int]:
    """How many verdicts of each kind there are, one for each job and destination."""
    table = tables.verdicts.c
    found = connection.execute(select(table.verdict, func.count()).group_by(table.verdict))
    return {str(each): 0 for each in Verdict} | {str(name): count for name, count in found}


def breaker_states(connection: Connection) -> dict[str, str]:
    """The state of each breaker, by modality."""
    table = tables.breakers.c
    found = connection.execute(select(table.modality, table.state).order_by(table.modality))
    return {str(modality): str(state) for modality, state in found}


def _rate(connection: Connection, modality: str, since: float, window: int) -> dict[str, Any]:
    table = tables.judgements.c
    newest = (
        select(table.model_sha256)
        .where(table.modality == modality)
        .order_by(table.at.desc(), table.job_id.desc())
        .limit(1)
        .scalar_subquery()
    )
    latest = (
        select(table.failed)
        .where(table.modality == modality, table.model_sha256 == newest, table.at > since)
        .order_by(table.at.desc(), table.job_id.desc())
        .limit(window)
    )
    found = list(connection.scalars(latest))
    return {"failed": sum(found), "judged": len(found)}


def _verdicts(connection: Connection, job_id: int) -> list[Report]:
    query = (
        select(tables.verdicts)
        .where(tables.verdicts.c.job_id == job_id)
        .order_by(tables.verdicts.c.destination)
    )
    return [
        {
            "destination": row.destination or None,
            "verdict": row.verdict,
            "decision": row.decision,
            "operator": row.operator,
            "decision_reason": row.decision_reason,
            "decided": iso(row.decided_at),
        }
        for row in connection.execute(query)
    ]


def _gates(connection: Connection, job_id: int) -> list[Report]:
    query = (
        select(tables.gate_readings)
        .where(tables.gate_readings.c.job_id == job_id)
        .order_by(tables.gate_readings.c.place)
    )
    return [
        {
            "gate": row.gate,
            "level": row.level,
            "unit": row.unit,
            "worst_slice": row.worst_slice,
            "reason": row.reason,
            **row.measured,
        }
        for row in connection.execute(query)
    ]
