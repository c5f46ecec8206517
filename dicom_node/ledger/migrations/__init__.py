"""Alembic environment of the ledger; `tables.open_ledger` runs it."""
