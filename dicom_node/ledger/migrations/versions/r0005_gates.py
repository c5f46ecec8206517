"""What the gates said of each result, who decided what was held, and the circuit breakers.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "judgements",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("modality", sa.String(length=16), nullable=False),
        sa.Column("model_sha256", sa.String(length=64), nullable=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        sa.Column("review", sa.String(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_judgements_job_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_judgements")),
    )
    op.create_index(op.f("ix_judgements_modality_at"), "judgements", ["modality", "at"])
    op.create_table(
        "verdicts",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("destination", sa.String(), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("decision", sa.String(length=16), nullable=True),
        sa.Column("operator", sa.String(), nullable=True),
        sa.Column("decision_reason", sa.String(), nullable=True),
        sa.Column("decided_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_verdicts_job_id")),
        sa.PrimaryKeyConstraint("job_id", "destination", name=op.f("pk_verdicts")),
    )
    op.create_table(
        "gate_readings",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("gate", sa.String(length=64), nullable=False),
        sa.Column("level", sa.String(length=16), nullable=False),
        sa.Column("unit", sa.String(length=16), nullable=False),
        sa.Column("worst_slice", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("measured", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_gate_readings_job_id")),
        sa.PrimaryKeyConstraint("job_id", "place", name=op.f("pk_gate_readings")),
    )
    op.create_table(
        "breakers",
        sa.Column("modality", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("counts_from", sa.Double(), nullable=False),
        sa.Column("opened_at", sa.Double(), nullable=True),
        sa.Column("operator", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("modality", name=op.f("pk_breakers")),
    )


def downgrade() -> None:
    op.drop_table("breakers")
    op.drop_table("gate_readings")
    op.drop_table("verdicts")
    op.drop_index(op.f("ix_judgements_modality_at"), table_name="judgements")
    op.drop_table("judgements")
