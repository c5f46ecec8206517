"""Run the revisions on the connection, and in the transaction, of `tables.open_ledger`."""

from __future__ import annotations

from alembic import context

from dicom_node.ledger.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
