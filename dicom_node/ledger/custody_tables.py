"""Tables of Storage Commitment as SCP: what peers have asked us to answer for (PS3.4 J.3.2).

Times are seconds since 1970 UTC.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    UniqueConstraint,
)

from dicom_node.ledger.schema import metadata

__all__ = ["archived_originals", "custody_inquiries", "custody_items", "custody_requests"]

custody_requests = Table(
    "custody_requests",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transaction_uid", String(64), nullable=False),
    Column("requestor", String(64), nullable=False),  # its AE title
    Column("received_at", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("asks", Integer, nullable=False),  # of the archives
    Column("concluded_at", Double),  # the verdict on each instance is final
    Column("report_attempts", Integer, nullable=False),
    Column("reported_at", Double),  # the requestor has taken the report
    Column("given_up_at", Double),  # … or never did
    UniqueConstraint("transaction_uid", "requestor"),
    Index(None, "reported_at", "given_up_at", "not_before"),
)

custody_items = Table(
    "custody_items",
    metadata,
    Column("request_id", Integer, ForeignKey("custody_requests.id"), primary_key=True),
    Column("sop_instance_uid", String(64), primary_key=True),
    Column("sop_class_uid", String(64), nullable=False),
    Column("committed", Boolean, nullable=False),
    Column("failure", Integer),  # Failure Reason (PS3.3 C.14.1.1), once it is final
    Index(None, "sop_instance_uid"),
)

# The originals that an archive has committed to keep.
archived_originals = Table(
    "archived_originals",
    metadata,
    Column("sop_instance_uid", String(64), primary_key=True),
    Column("archive", String, primary_key=True),
    Column("committed_at", Double, nullable=False),
)

# Our requests to archives about originals.
custody_inquiries = Table(
    "custody_inquiries",
    metadata,
    Column("transaction_uid", String(64), primary_key=True),
    Column("request_id", Integer, ForeignKey("custody_requests.id"), nullable=False),
    Column("archive", String, nullable=False),
    Column("asked_at", Double, nullable=False),
    Column("reported_at", Double),
    Index(None, "request_id"),
)
