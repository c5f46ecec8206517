"""Deliveries that end: commitment asked again, destinations held, notices, commitment as SCP.

Revision ID: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("commitment_due", sa.Double()))
    op.add_column(
        "deliveries",
        sa.Column("commitment_asks", sa.Integer(), nullable=False, server_default=sa.text("0")),
    )
    op.create_index("ix_deliveries_commitment_due", "deliveries", ["commitment_due"])
    op.create_table(
        "destination_states",
        sa.Column("destination", sa.String(), nullable=False),
        sa.Column("paused_at", sa.Double()),
        sa.Column("paused_reason", sa.String()),
        sa.Column("held_until", sa.Double()),
        sa.Column("held_reason", sa.String()),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("destination", name="pk_destination_states"),
    )
    op.create_table(
        "notices",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("event", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("told", sa.JSON(), nullable=False),
        sa.Column("finished_at", sa.Double()),
        sa.Column("outcome", sa.String()),
        sa.PrimaryKeyConstraint("id", name="pk_notices"),
    )
    op.create_index("ix_notices_finished_at_not_before", "notices", ["finished_at", "not_before"])
    _custody()


def _custody() -> None:
    op.create_table(
        "custody_requests",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("transaction_uid", sa.String(64), nullable=False),
        sa.Column("requestor", sa.String(64), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("asks", sa.Integer(), nullable=False),
        sa.Column("concluded_at", sa.Double()),
        sa.Column("report_attempts", sa.Integer(), nullable=False),
        sa.Column("reported_at", sa.Double()),
        sa.Column("given_up_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_custody_requests"),
        sa.UniqueConstraint(
            "transaction_uid", "requestor", name="uq_custody_requests_transaction_uid_requestor"
        ),
    )
    op.create_index(
        "ix_custody_requests_reported_at_given_up_at_not_before",
        "custody_requests",
        ["reported_at", "given_up_at", "not_before"],
    )
    op.create_table(
        "custody_items",
        sa.Column("request_id", sa.Integer(), nullable=False),
        sa.Column("sop_instance_uid", sa.String(64), nullable=False),
        sa.Column("sop_class_uid", sa.String(64), nullable=False),
        sa.Column("committed", sa.Boolean(), nullable=False),
        sa.Column("failure", sa.Integer()),
        sa.PrimaryKeyConstraint("request_id", "sop_instance_uid", name="pk_custody_items"),
        sa.ForeignKeyConstraint(
            ["request_id"], ["custody_requests.id"], name="fk_custody_items_request_id"
        ),
    )
    op.create_index("ix_custody_items_sop_instance_uid", "custody_items", ["sop_instance_uid"])
    op.create_table(
        "archived_originals",
        sa.Column("sop_instance_uid", sa.String(64), nullable=False),
        sa.Column("archive", sa.String(), nullable=False),
        sa.Column("committed_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sop_instance_uid", "archive", name="pk_archived_originals"),
    )
    op.create_table(
        "custody_inquiries",
        sa.Column("transaction_uid", sa.String(64), nullable=False),
        sa.Column("request_id", sa.Integer(), nullable=False),
        sa.Column("archive", sa.String(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.Column("reported_at", sa.Double()),
        sa.PrimaryKeyConstraint("transaction_uid", name="pk_custody_inquiries"),
        sa.ForeignKeyConstraint(
            ["request_id"], ["custody_requests.id"], name="fk_custody_inquiries_request_id"
        ),
    )
    op.create_index("ix_custody_inquiries_request_id", "custody_inquiries", ["request_id"])


def downgrade() -> None:
    for table in (
        "custody_inquiries",
        "archived_originals",
        "custody_items",
        "custody_requests",
        "notices",
        "destination_states",
    ):
        op.drop_table(table)
    op.drop_index("ix_deliveries_commitment_due", "deliveries")
    op.drop_column("deliveries", "commitment_asks")
    op.drop_column("deliveries", "commitment_due")
