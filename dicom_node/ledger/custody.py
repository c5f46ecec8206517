"""Storage Commitment as SCP: what peers asked us to answer for, and what that keeps in the spool.

We answer for an original only once an archive has committed to keep it.  Until then its file is
ours to keep: :func:`may_purge` is the one condition that whoever deletes files has to ask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    and_,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from dicom_node.ledger.tables import (
    DeliveryState,
    InstanceState,
    archived_originals,
    custody_inquiries,
    custody_items,
    custody_requests,
    deliveries,
    insert_or_nothing,
    instances,
    job_instances,
    reading,
    writing,
)

#: PS3.3 C.14.1.1, Failure Reason.
NO_SUCH_INSTANCE = 0x0112
CLASS_INSTANCE_CONFLICT = 0x0119
PROCESSING_FAILURE = 0x0110

_VALID = (InstanceState.RECEIVED, InstanceState.IGNORED)


def may_purge() -> ColumnElement[bool]:
    """Condition on a row of `instances`: its file may go, as far as peers are concerned.

    No peer waits for our word on it, and each series that was made of it has arrived: delivered,
    or committed where the destination is asked for Storage Commitment.  How old it must be, and
    what becomes of jobs that have not ended, is for the caller to say.
    """
    return and_(~_promised(), ~_on_its_way())


def purgeable(engine: Engine, sop_instance_uids: Iterable[str]) -> frozenset[str]:
    """Those of the received SOP Instances for which :func:`may_purge` holds."""
    wanted = select(instances.c.sop_instance_uid).where(
        instances.c.sop_instance_uid.in_(list(sop_instance_uids)),
        instances.c.state.in_(_VALID),
        may_purge(),
    )
    with reading(engine) as connection:
        return frozenset(connection.scalars(wanted))


def arrived() -> ColumnElement[bool]:
    """Condition on a row of `deliveries`: its series is where it should be, for good."""
    return or_(
        deliveries.c.state == DeliveryState.COMMITTED,
        and_(deliveries.c.state == DeliveryState.DELIVERED, deliveries.c.commitment_due.is_(None)),
    )


def _promised() -> ColumnElement[bool]:
    """Somebody has asked whether the instance is kept, and has no answer yet."""
    return exists().where(
        custody_items.c.sop_instance_uid == instances.c.sop_instance_uid,
        custody_items.c.committed.is_(False),
        custody_items.c.failure.is_(None),
    )


def _on_its_way() -> ColumnElement[bool]:
    return exists().where(
        job_instances.c.instance_id == instances.c.id,
        deliveries.c.job_id == job_instances.c.job_id,
        ~arrived(),
    )


@dataclass(frozen=True)
class Original:
    """One SOP Instance that a peer asks us to answer for."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True)
class OpenOriginal(Original):
    """One whose verdict is open, and what the ledger knows of it; None: it never came."""

    received_class_uid: str | None
    path: str | None
    transfer_syntax_uid: str | None


@dataclass(frozen=True)
class Request:
    """One N-ACTION that we have taken and not yet answered with an N-EVENT-REPORT."""

    id: int
    transaction_uid: str
    requestor: str
    received_at: float
    #: How often archives were asked about it, and the requestor was called with the report.
    asks: int
    report_attempts: int
    #: Since when its verdict is final; None: it is not.
    concluded_at: float | None
    open: tuple[OpenOriginal, ...]


@dataclass(frozen=True)
class Verdict:
    """What is reported: the committed, and the failed with their Failure Reason."""

    committed: tuple[Original, ...]
    failed: tuple[tuple[Original, int], ...]


def record_request(
    engine: Engine,
    *,
    transaction_uid: str,
    requestor: str,
    originals: Sequence[Original],
    archives: Collection[str],
    now: float,
) -> bool:
    """Record an N-ACTION; False where the same was recorded before (a peer that asks again).

    What one of *archives* has committed to keep is committed at once.
    """
    row = {
        "transaction_uid": transaction_uid,
        "requestor": requestor,
        "received_at": now,
        "not_before": now,
        "asks": 0,
        "report_attempts": 0,
    }
    unique = {one.sop_instance_uid: one for one in originals}
    with writing(engine) as connection:
        if not insert_or_nothing(connection, custody_requests, row):
            return False
        request_id = connection.scalar(
            select(custody_requests.c.id).where(
                custody_requests.c.transaction_uid == transaction_uid,
                custody_requests.c.requestor == requestor,
            )
        )
        kept = _archived(connection, list(unique), archives)
        for uid, one in unique.items():
            connection.execute(
                insert(custody_items).values(
                    request_id=request_id,
                    sop_instance_uid=uid,
                    sop_class_uid=one.sop_class_uid,
                    committed=uid in kept,
                )
            )
    return True


def claim_request(engine: Engine, *, lease_s: float, now: float) -> Request | None:
    """Take the request that has been due longest, for *lease_s* seconds; None: there is none."""
    due = (
        select(custody_requests.c.id)
        .where(
            custody_requests.c.reported_at.is_(None),
            custody_requests.c.given_up_at.is_(None),
            custody_requests.c.not_before <= now,
        )
        .order_by(custody_requests.c.not_before, custody_requests.c.id)
        .limit(1)
    )
    with reading(engine) as connection:
        if connection.execute(due).first() is None:
            return None
    with writing(engine) as connection:
        request_id = connection.scalar(due.with_for_update(skip_locked=True))
        if request_id is None:
            return None
        _set_request(connection, request_id, not_before=now + lease_s)
        return _request(connection, request_id)


def record_inquiry(
    engine: Engine, request_id: int, *, archive: str, transaction_uid: str, now: float
) -> None:
    """Note that *archive* is asked about what is open of a request; write it before asking."""
    with writing(engine) as connection:
        connection.execute(
            insert(custody_inquiries).values(
                transaction_uid=transaction_uid,
                request_id=request_id,
                archive=archive,
                asked_at=now,
            )
        )


def report_inquiry(
    engine: Engine, transaction_uid: str, *, committed: Collection[str], now: float
) -> bool:
    """Record an archive's report on originals; False where the transaction is not one of these.

    What it has committed answers every open request for it.  What it has not stays open: it may
    come to the archive later, and the requestor keeps its copy until then.
    """
    with writing(engine) as connection:
        inquiry = connection.execute(
            update(custody_inquiries)
            .where(custody_inquiries.c.transaction_uid == transaction_uid)
            .values(reported_at=now)
            .returning(custody_inquiries.c.request_id, custody_inquiries.c.archive)
        ).first()
        if inquiry is None:
            return False
        of_request = select(custody_items.c.sop_instance_uid).where(
            custody_items.c.request_id == inquiry.request_id,
            custody_items.c.sop_instance_uid.in_(list(committed)),
        )
        # Only what was asked for counts, whatever else a report may name.
        for uid in connection.scalars(of_request).all():
            row = {"sop_instance_uid": uid, "archive": inquiry.archive, "committed_at": now}
            insert_or_nothing(connection, archived_originals, row)
            connection.execute(
                update(custody_items)
                .where(custody_items.c.sop_instance_uid == uid, custody_items.c.failure.is_(None))
                .values(committed=True)
            )
        if connection.execute(_open_items(inquiry.request_id)).first() is None:
            _set_request(connection, inquiry.request_id, not_before=now)
        return True


def fail_items(engine: Engine, request_id: int, reasons: Mapping[str, int]) -> None:
    """Make the verdict on open instances final: not committed, with the Failure Reason of each."""
    with writing(engine) as connection:
        for uid, reason in reasons.items():
            connection.execute(
                update(custody_items)
                .where(
                    custody_items.c.request_id == request_id,
                    custody_items.c.sop_instance_uid == uid,
                    custody_items.c.committed.is_(False),
                )
                .values(failure=reason)
            )


def conclude_request(engine: Engine, request_id: int, now: float) -> Verdict | None:
    """The verdict on a request of which nothing is open, made final; None while something is."""
    with writing(engine) as connection:
        if connection.execute(_open_items(request_id)).first() is not None:
            return None
        first = func.coalesce(custody_requests.c.concluded_at, now)
        _set_request(connection, request_id, concluded_at=first)
        rows = connection.execute(
            select(custody_items)
            .where(custody_items.c.request_id == request_id)
            .order_by(custody_items.c.sop_instance_uid)
        ).all()
    named = [(Original(row.sop_class_uid, row.sop_instance_uid), row) for row in rows]
    return Verdict(
        tuple(original for original, row in named if row.committed),
        tuple((original, row.failure) for original, row in named if not row.committed),
    )


def ask_again(engine: Engine, request_id: int, *, asks: int, not_before: float) -> None:
    """Look at a request again at *not_before*; archives have been asked *asks* times about it."""
    with writing(engine) as connection:
        # A report that has come meanwhile has made it due already.
        settled = connection.execute(_open_items(request_id)).first() is None
        values = {"asks": asks} if settled else {"asks": asks, "not_before": not_before}
        _set_request(connection, request_id, **values)


def reported(engine: Engine, request_id: int, now: float) -> None:
    """The requestor has taken the report."""
    with writing(engine) as connection:
        _set_request(connection, request_id, reported_at=now)


def report_again(
    engine: Engine, request_id: int, *, attempts: int, not_before: float | None, now: float
) -> None:
    """The requestor has not taken the report: try at *not_before*, or (None) never again."""
    with writing(engine) as connection:
        if not_before is None:
            _set_request(connection, request_id, report_attempts=attempts, given_up_at=now)
        else:
            _set_request(connection, request_id, report_attempts=attempts, not_before=not_before)


def _set_request(connection: Connection, request_id: int, **values: object) -> None:
    connection.execute(
        update(custody_requests).where(custody_requests.c.id == request_id).values(**values)
    )


def _open_items(request_id: int) -> Select[tuple[str]]:
    return select(custody_items.c.sop_instance_uid).where(
        custody_items.c.request_id == request_id,
        custody_items.c.committed.is_(False),
        custody_items.c.failure.is_(None),
    )


def _archived(
    connection: Connection, sop_instance_uids: list[str], archives: Collection[str]
) -> frozenset[str]:
    kept = select(archived_originals.c.sop_instance_uid).where(
        archived_originals.c.sop_instance_uid.in_(sop_instance_uids),
        archived_originals.c.archive.in_(list(archives)),
    )
    return frozenset(connection.scalars(kept))


def _request(connection: Connection, request_id: int) -> Request:
    row = connection.execute(
        select(custody_requests).where(custody_requests.c.id == request_id)
    ).one()
    items = connection.execute(
        select(
            custody_items.c.sop_class_uid,
            custody_items.c.sop_instance_uid,
            instances.c.sop_class_uid.label("received_class_uid"),
            instances.c.path,
            instances.c.transfer_syntax_uid,
        )
        .outerjoin(
            instances,
            and_(
                instances.c.sop_instance_uid == custody_items.c.sop_instance_uid,
                instances.c.state.in_(_VALID),
            ),
        )
        .where(
            custody_items.c.request_id == request_id,
            custody_items.c.committed.is_(False),
            custody_items.c.failure.is_(None),
        )
        .order_by(instances.c.id, custody_items.c.sop_instance_uid)
    )
    return Request(
        id=row.id,
        transaction_uid=row.transaction_uid,
        requestor=row.requestor,
        received_at=row.received_at,
        asks=row.asks,
        report_attempts=row.report_attempts,
        concluded_at=row.concluded_at,
        open=tuple(OpenOriginal(*item) for item in items),
    )
