"""What a series was concluded on, and how strongly a job restores.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("series", "jobs"):
        op.add_column(
            table,
            sa.Column("evidence", sa.JSON(), nullable=False, server_default=sa.text("'[]'")),
        )
    op.add_column(
        "jobs", sa.Column("strength", sa.Double(), nullable=False, server_default=sa.text("1.0"))
    )
    op.add_column(
        "jobs",
        sa.Column("awaits_rest", sa.Boolean(), nullable=False, server_default=sa.false()),
    )


def downgrade() -> None:
    for column in ("awaits_rest", "strength", "evidence"):
        op.drop_column("jobs", column)
    op.drop_column("series", "evidence")
