"""Writing a `node.toml` from the schema, every key with its line of why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dicom_node.settings.assembly import Source
from dicom_node.settings.delivery import Destination, WebDestination
from dicom_node.settings.models import NodeSettings, submodel


def default_toml() -> str:
    """Return `config/node.toml`: every key with its default and one line of why."""
    return render_toml({})


def render_toml(changes: Mapping[str, Any]) -> str:
    """Return a `node.toml` with every key, where `changes` (nested by table) replace defaults."""
    head = "# Settings of the node. What is commented out is unset.\n"
    body = _render(NodeSettings, changes, prefix="")
    tables = [text for name, example in _NAMED.items() for text in _named(name, example, changes)]
    return "\n".join([head, body, *tables])


def _render(model: type[BaseModel], changes: Mapping[str, Any], prefix: str) -> str:
    """Render a table: its own keys first, since TOML ends a table where the next one begins."""
    plain, tables = [], []
    for name, field in model.model_fields.items():
        inner = submodel(model, name)
        changed = changes.get(name)
        if inner is not None:
            tables.append(_render(inner, changed or {}, f"{prefix}.{name}".lstrip(".")))
        elif name not in _NAMED:
            plain += [f"# {field.description}", _key_line(name, field, changed)]
    title = [f"# {_first_line(model)}", f"[{prefix}]"] if prefix else []
    return "\n".join([*title, *plain, "", *tables])


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _key_line(name: str, field: FieldInfo, changed: object) -> str:
    value = changed if changed is not None else field.default
    if value is not None and value is not PydanticUndefined:
        return f"{name} = {_toml(value)}"
    return f"#{name} = {_toml((field.examples or [''])[0])}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        items = ", ".join(f"{key} = {_toml(each)}" for key, each in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(each) for each in value)}]"
    return json.dumps(str(value), ensure_ascii=False)


def _named(name: str, example: _Example, changes: Mapping[str, Any]) -> list[str]:
    """The tables `[name.X]` that are given; without any, one as a comment."""
    given = changes.get(name, {})
    if given:
        return [_render(example.model, each, f"{name}.{key}") for key, each in given.items()]
    rendered = _render(example.model, example.values, f"{name}.{example.name}")
    lines = rendered.rstrip().splitlines()
    return ["\n".join(line if line.startswith("#") else f"#{line}" for line in lines) + "\n"]


@dataclass(frozen=True)
class _Example:
    """A table that a node may have several of, by names that the site gives."""

    model: type[BaseModel]
    name: str
    values: Mapping[str, Any]


_NAMED: Mapping[str, _Example] = {
    "destinations": _Example(
        Destination, "pacs", {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": 4242}
    ),
    "stow": _Example(WebDestination, "web", {"url": "https://pacs.hospital.example/dicom-web"}),
    "sources": _Example(Source, "ct1", {"calling_ae": "CT1", "quiet_s": 30.0}),
}
