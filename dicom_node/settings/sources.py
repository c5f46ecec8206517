"""Reading the settings from file, environment and credentials, and saying what is wrong."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from operator import eq
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dicom_node.errors import ConfigurationError
from dicom_node.settings.models import NodeSettings

ENVIRONMENT_PREFIX = "DICOM_NODE__"
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> NodeSettings:
    """Load and check the settings; relative paths resolve against the folder of `path`.

    Args:
        path: The `node.toml`; None takes the defaults and resolves against the working folder.
        environ: The environment.

    Raises:
        ConfigurationError: With every problem of every source, each as `source: key.path: why`.
    """
    values = _read_toml(path) if path is not None else {}
    origins: dict[tuple[str, ...], str] = {}
    for source, keys, value in (*_environment(environ), *_credentials(environ)):
        origins[_overlay(values, keys, value)] = source
    base = (path.parent if path is not None else Path.cwd()).resolve()
    try:
        return _resolved(NodeSettings.model_validate(values), base)
    except ValidationError as error:
        default = str(path) if path is not None else "defaults"
        problems = [_problem(each, origins, default) for each in error.errors()]
        raise ConfigurationError(problems) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError([f"{path}: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"{path}: {error}"]) from error


_Override = tuple[str, tuple[str, ...], str]


def _environment(environ: Mapping[str, str]) -> Iterator[_Override]:
    for name in sorted(environ):
        if name.upper().startswith(ENVIRONMENT_PREFIX):
            yield f"environment {name}", _keys(name), environ[name]


def _credentials(environ: Mapping[str, str]) -> Iterator[_Override]:
    folder = environ.get(CREDENTIALS_VARIABLE)
    for file in sorted(Path(folder).iterdir()) if folder else ():
        if file.name.upper().startswith(ENVIRONMENT_PREFIX):
            text = file.read_text(encoding="utf-8").rstrip("\r\n")
            yield f"credential {file.name}", _keys(file.name), text


def _keys(name: str) -> tuple[str, ...]:
    return tuple(name[len(ENVIRONMENT_PREFIX) :].lower().split("__"))


def _overlay(values: dict[str, Any], keys: tuple[str, ...], value: str) -> tuple[str, ...]:
    """Set one nested value in place and return its key path as the tables spell it."""
    spelled: list[str] = []
    table = values
    for position, key in enumerate(keys):
        name = next((each for each in table if each.lower() == key), key)
        spelled.append(name)
        if position == len(keys) - 1 or not isinstance(table.setdefault(name, {}), dict):
            table[name] = _parsed(value)
            break
        table = table[name]
    return tuple(spelled)


def _parsed(value: str) -> object:
    """Read a list or table as TOML; pydantic reads numbers and booleans from their text."""
    if not value.startswith(("[", "{")):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _problem(error: ErrorDetails, origins: Mapping[tuple[str, ...], str], default: str) -> str:
    location = tuple(str(part) for part in error["loc"] if part != "[key]")
    matching = [keys for keys in origins if all(map(eq, keys, location))] if location else []
    source = origins[max(matching, key=len)] if matching else default
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown key" + _suggestion(location)
    return ": ".join(part for part in (source, ".".join(location), message) if part)


def _suggestion(location: tuple[str, ...]) -> str:
    model: type[BaseModel] = NodeSettings
    for part in location[:-1]:
        model = _model_of(model, part)
    close = difflib.get_close_matches(location[-1], model.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _model_of(model: type[BaseModel], part: str) -> type[BaseModel]:
    """The model of a table, or of each row of it; a row's own name or number changes nothing."""
    field = model.model_fields.get(part)
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    inner = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(inner, model)


def _resolved(settings: NodeSettings, base: Path) -> NodeSettings:
    data = base / settings.node.data_dir
    return settings.model_copy(
        update={
            "routes": base / settings.routes,
            "node": settings.node.model_copy(update={"data_dir": data}),
            "spool": settings.spool.model_copy(update={"path": data / settings.spool.path}),
            "ledger": settings.ledger.model_copy(
                update={"url": _resolved_url(settings.ledger.url, data)}
            ),
            "tls": settings.tls.model_copy(
                update={
                    name: base / path
                    for name in ("certificate", "key", "ca")
                    if (path := getattr(settings.tls, name)) is not None
                }
            ),
            "audit": settings.audit.model_copy(update={"journal": data / settings.audit.journal}),
            "engine": settings.engine.model_copy(
                update={"bundle": _resolved_bundle(settings.engine.bundle, base)}
            ),
        }
    )


def _resolved_url(url: str, data: Path) -> str:
    scheme = "sqlite:///"
    return f"{scheme}{data / url.removeprefix(scheme)}" if url.startswith(scheme) else url


def _resolved_bundle(bundle: str, base: Path) -> str:
    return str(base / bundle) if "/" in bundle else bundle
