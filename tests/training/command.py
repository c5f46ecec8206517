"""``diffcode`` as one types it."""

from __future__ import annotations

from click.testing import CliRunner, Result

from training.cli.main import main


def call(*words: object) -> Result:
    """Run it in this process; what is no text is typed as it prints."""
    return CliRunner().invoke(main, [str(word) for word in words])
