"""The series of what is kept, in the index that the janitor looks through.

Revision ID: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_KEPT = sa.text("purged_at IS NULL")


def upgrade() -> None:
    op.drop_index("ix_instances_kept", "instances")
    _create("state", "received_at", "size", "series_instance_uid")


def downgrade() -> None:
    op.drop_index("ix_instances_kept", "instances")
    _create("state", "received_at", "size")


def _create(*columns: str) -> None:
    op.create_index(
        "ix_instances_kept",
        "instances",
        [*columns],
        sqlite_where=_KEPT,
        postgresql_where=_KEPT,
    )
