"""Write the pages that are made from the program itself: `python docs/reference.py`.

`docs/cli.md` from the commands, `docs/configuration.md` and `config/node.toml` from the settings,
`docs/conformance-statement.md` from the tables of SOP Classes, attributes and statuses,
`docs/states.md` from the table of states and transitions. A test
fails when a page on disk differs from what this would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dicom_node.settings import NodeSettings, default_toml

ROOT = Path(__file__).resolve().parent.parent

_CLI_HEAD = """# Command lines

Made from the programs' own help by `make reference`.

Node commands find their configuration by `-c/--config` or `DICOM_NODE_CONFIG`. With `--json`, a
`list` prints an array, `show`, `stats` and `evaluate` print one object, and nothing else is on
standard output. Exit codes: 0 done; 1 refused or failed, with the reason on standard error; 2 wrong
usage.
"""

_CONFIGURATION_HEAD = """# Configuration

Made from the settings by `make reference`.

`dicom-node init DIR` writes `DIR/node.toml` and `DIR/routes.toml`. Sources, weakest first: the
defaults below, `node.toml`, the environment (`DICOM_NODE__SECTION__KEY`, as
`DICOM_NODE__NODE__PORT=104`), and files of the same names in the systemd credentials directory,
which is the place for a database password. Unknown keys are errors. `dicom-node check-config`
reports every problem at once with its place.

What `routes.toml` holds is explained in the file itself: see `config/routes.toml`.
"""


_STATES_HEAD = """# States

Made from the table of the ledger (`dicom_node/ledger/states.py`) by `make reference`.

A state changes by compare-and-set in one place, which takes no step that is not in these tables and
writes each step with time and reason to the history: `dicom-node jobs show`, `series show`,
`deliveries show` and `instances show` print it.
"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of both programs with its full name, depth first."""
    from dicom_node.cli.main import cli as node
    from training.cli.main import main as diffcode

    yield from _walk("dicom-node", node)
    yield from _walk("diffcode", diffcode)


def _walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for word, inner in sorted(command.commands.items()):
            if not inner.hidden:
                yield from _walk(f"{name} {word}", inner)


def cli_page() -> str:
    """The text of docs/cli.md."""
    return "\n".join([_CLI_HEAD, *(_command(name, command) for name, command in commands())])


def _command(name: str, command: click.Command) -> str:
    level = "##" if " " not in name else "###"
    info: dict[str, Any] = {"info_name": name, "terminal_width": 88, "max_content_width": 88}
    # Both programs hand this down to their commands; click keeps the option it made first.
    info["help_option_names"] = ["-h", "--help"]
    text = command.get_help(click.Context(command, **info))
    return f"{level} {name}\n\n```text\n{text}\n```\n"


def configuration_page() -> str:
    """The text of docs/configuration.md: a heading per section, the keys below it."""
    parts = [_CONFIGURATION_HEAD, "## The file\n"]
    for block in default_toml().strip().split("\n\n"):
        if section := re.search(r"(?m)^#?\[(.+)\]$", block):
            parts.append(f"### {section[1]}\n")
        parts.append(f"```toml\n{block}\n```\n")
    return "\n".join(parts)


def conformance_page() -> str:
    """The text of docs/conformance-statement.md: the statement of the default configuration."""
    from dicom_node.conformance import statement

    return statement(NodeSettings())


def states_page() -> str:
    """The text of docs/states.md: for each entity its states, and the steps between them."""
    from dicom_node.ledger.states import STATES, STEPS

    parts = [_STATES_HEAD]
    for entity, states in STATES.items():
        doc = (states.__doc__ or "").strip()
        parts.append(f"## {entity.capitalize()}\n\n{doc}\n")
        meanings = [(f"`{state}`", state.meaning) for state in states]
        parts.append(_rows(("state", "meaning"), meanings))
        steps = [(f"`{a}`", f"`{b}`", when) for (a, b), when in STEPS[entity].items()]
        parts.append(_rows(("from", "to", "when"), steps))
    return "\n".join(parts)


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def pages() -> dict[Path, str]:
    """Every page that is made, with its text."""
    return {
        ROOT / "docs/cli.md": cli_page(),
        ROOT / "docs/configuration.md": configuration_page(),
        ROOT / "config/node.toml": default_toml(),
        ROOT / "docs/conformance-statement.md": conformance_page(),
        ROOT / "docs/states.md": states_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
