"""When a file left the spool; the order of claims as an index.

Revision ID: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_KEPT = sa.text("purged_at IS NULL")
_PURGED = sa.text("purged_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("instances", sa.Column("purged_at", sa.Double()))
    op.add_column("outputs", sa.Column("purged_at", sa.Double()))
    op.create_index(
        "ix_instances_kept",
        "instances",
        ["state", "received_at", "size"],
        sqlite_where=_KEPT,
        postgresql_where=_KEPT,
    )
    op.create_index(
        "ix_instances_purged",
        "instances",
        ["state"],
        sqlite_where=_PURGED,
        postgresql_where=_PURGED,
    )
    op.create_index(
        "ix_outputs_kept", "outputs", ["job_id", "size"], sqlite_where=_KEPT, postgresql_where=_KEPT
    )
    op.drop_index("ix_jobs_state_priority_id", "jobs")
    op.create_index("ix_jobs_due", "jobs", ["state", sa.text("priority DESC"), "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_due", "jobs")
    op.create_index("ix_jobs_state_priority_id", "jobs", ["state", "priority", "id"])
    op.drop_index("ix_outputs_kept", "outputs")
    op.drop_index("ix_instances_purged", "instances")
    op.drop_index("ix_instances_kept", "instances")
    op.drop_column("outputs", "purged_at")
    op.drop_column("instances", "purged_at")
