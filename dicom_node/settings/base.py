"""What the tables of `node.toml` have in common: their base and the types of their values."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _trimmed(value: object) -> object:
    return value.strip(" ") if isinstance(value, str) else value


def _ae_title(value: str) -> str:
    # PS3.5 6.2, VR AE: 16 bytes of the default repertoire without backslash and control characters.
    if not 1 <= len(value) <= 16:
        raise ValueError("an AE title has 1 to 16 characters")
    if "\\" in value or not all(" " <= character <= "~" for character in value):
        raise ValueError("an AE title has neither backslash, control nor non-ASCII characters")
    return value


def _network(value: str) -> str:
    return str(ip_network(value, strict=False))


def _uid(value: str) -> str:
    # PS3.5 9.1: at most 64 characters, components of digits without leading zeros.
    if len(value) > 64 or not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+", value):
        raise ValueError(f"{value!r} is not a UID")
    return value


def _syslog(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("udp", "tls") or not parts.hostname or parts.path.strip("/"):
        raise ValueError("a syslog server is udp://HOST:PORT or tls://HOST:PORT")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*", value):
        raise ValueError("a name has letters, digits, hyphens, and single underscores within it")
    return value


def _uid_root(value: str) -> str:
    # 24 characters leave room for the derived part.
    if len(value) > 24 or not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+", value):
        raise ValueError(
            "a UID root is numbers with dots between them, no leading zeros, at most 24 characters"
        )
    return value


def _ledger(value: str) -> str:
    # The value may hold a password, and is not said.
    if not re.fullmatch(r"(sqlite:///|postgresql\+psycopg://).+", value):
        raise ValueError("a ledger is sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is auto, cpu, cuda or cuda:N")
    return value


AETitle = Annotated[str, BeforeValidator(_trimmed), AfterValidator(_ae_title)]
Network = Annotated[str, AfterValidator(_network)]
StorageUID = Annotated[str, AfterValidator(_uid)]
SyslogServer = Annotated[str, AfterValidator(_syslog)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
DestinationName = Annotated[str, AfterValidator(_name)]
UIDRoot = Annotated[str, AfterValidator(_uid_root)]  # PS3.5 9.1
LedgerURL = Annotated[str, AfterValidator(_ledger)]
Device = Annotated[str, AfterValidator(_device)]
Modality = Literal["CT", "MR", "PT"]
Task = Literal["mri_sr", "ct_denoise", "pet_synthesis"]


class Section(BaseModel):
    """A table of `node.toml`: frozen, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
