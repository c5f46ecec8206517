"""`[destinations.NAME]`, `[stow.NAME]`, `[delivery]`, `[commitment_scp]`, `[notify]`: sending."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from dicom_node.settings.base import AETitle, DestinationName, Port, Seconds, Section


def _http(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an address of the form https://HOST[:PORT]/PATH")
    if parts.username or parts.password:
        raise ValueError("credentials do not belong in the address; they have keys of their own")
    return value.rstrip("/")


def _mailbox(value: str) -> str:
    name, at, host = value.partition("@")
    if not (name and at and host) or any(character in value for character in " \r\n<>,"):
        raise ValueError("not an e-mail address of the form NAME@HOST")
    return value


HTTPAddress = Annotated[str, AfterValidator(_http)]
Mailbox = Annotated[str, AfterValidator(_mailbox)]


class Destination(Section):
    """A peer that restored series are sent to."""

    ae_title: AETitle = Field(description="AE title of the peer")
    host: str = Field(min_length=1, description="host name or address of the peer")
    port: Port = Field(description="TCP port of the peer")
    calling_ae_title: AETitle | None = Field(
        default=None,
        description="call with this AE title instead of the node's",
        examples=["DIFFCODE"],
    )
    connect_timeout_s: Seconds = Field(
        default=10.0, description="longest wait for the TCP connection"
    )
    timeout_s: Seconds = Field(default=60.0, description="longest wait for an answer of the peer")
    max_associations: int = Field(
        default=1, ge=1, description="associations to it at the same time, of all deliver processes"
    )
    instances_per_association: int | None = Field(
        default=None,
        ge=1,
        description="release an association after so many instances; unset: when nothing is due",
        examples=[500],
    )
    commitment: bool | None = Field(
        default=None,
        description="ask it for Storage Commitment; unset: as delivery.commitment",
        examples=[True],
    )
    tls: bool = Field(default=False, description="call over TLS, with the files of [tls]")
    server_name: str | None = Field(
        default=None,
        description="name that the peer's certificate must bear; unset: host",
        examples=["pacs.hospital.example"],
    )


class WebDestination(Section):
    """A DICOMweb server that restored series are stored on by STOW-RS (PS3.18 10.5)."""

    url: HTTPAddress = Field(description="address of the service; /studies is appended")
    username: str | None = Field(
        default=None, min_length=1, description="HTTP Basic authentication", examples=["node"]
    )
    password: SecretStr | None = Field(
        default=None, description="… and its password", examples=["secret"]
    )
    token: SecretStr | None = Field(
        default=None, description="or a bearer token", examples=["secret"]
    )
    client_certificate: bool = Field(
        default=False, description="show tls.certificate to the server"
    )
    connect_timeout_s: Seconds = Field(
        default=10.0, description="longest wait for the connection, and for 256 KiB to be taken"
    )
    timeout_s: Seconds = Field(default=120.0, description="longest wait for an answer")
    max_requests: int = Field(
        default=1, ge=1, description="requests to it at the same time, of all deliver processes"
    )
    instances_per_request: int = Field(
        default=20, ge=1, description="most instances of one request"
    )
    bytes_per_request: int = Field(
        default=67_108_864, ge=1, description="… and bytes, where there is more than one instance"
    )

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password belong together")
        if self.username is not None and self.token is not None:
            raise ValueError("give username and password, or token, not both")
        return self


class DeliverySettings(Section):
    """How restored series are sent, and how long the node keeps trying."""

    workers: int = Field(
        default=4, ge=1, le=64, description="deliveries at the same time, of one deliver process"
    )
    first_s: Seconds = Field(default=10.0, description="wait after the first failed attempt")
    factor: float = Field(default=2.0, ge=1, description="each further wait is so much longer")
    max_s: Seconds = Field(default=3600.0, description="longest wait between two attempts")
    give_up_after_s: Seconds = Field(
        default=259_200.0, description="a delivery that fails for so long is dead"
    )
    lease_s: Seconds = Field(
        default=120.0,
        description="a delivery whose worker is silent for so long goes to another worker",
    )
    commitment: bool = Field(default=False, description="ask destinations for Storage Commitment")
    commitment_wait_s: float = Field(
        default=1.0,
        ge=0,
        description="keep the association of a request for a report on it; others come later",
    )
    commitment_timeout_s: Seconds = Field(
        default=14_400.0, description="ask again when no report has come for so long"
    )
    commitment_asks: int = Field(
        default=18, ge=1, description="a delivery not committed after so many requests is dead"
    )
    idle_poll_s: Seconds = Field(
        default=0.5,
        description="wait before the worker asks for work again; a commit to SQLite ends it",
    )

    @model_validator(mode="after")
    def _retries_grow(self) -> Self:
        if self.max_s < self.first_s:
            raise ValueError("max_s is smaller than first_s")
        return self


class CommitmentRequestor(Section):
    """A sender that may ask us for Storage Commitment, and where it takes the reports."""

    ae_title: AETitle = Field(description="its AE title")
    host: str = Field(min_length=1, description="host name or address")
    port: Port = Field(description="TCP port")
    tls: bool = Field(default=False, description="report over TLS")


class CommitmentSCPSettings(Section):
    """Storage Commitment for those who send to us: a scanner may delete its copy on our word."""

    enabled: bool = Field(
        default=False, description="answer for originals that an archive has committed to keep"
    )
    archives: tuple[DestinationName, ...] = Field(
        default=(), description="destinations, any of which must have committed the original"
    )
    requestors: tuple[CommitmentRequestor, ...] = Field(
        default=(), description="who may ask, as { ae_title, host, port, tls }"
    )
    forward: bool = Field(
        default=False, description="send an archive the original that it says it does not have"
    )
    ask_every_s: Seconds = Field(
        default=600.0, description="ask the archives again about what they have not committed"
    )
    answer_within_s: Seconds = Field(
        default=86_400.0, description="what is not committed by then is reported as failed"
    )

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        if self.enabled and not (self.archives and self.requestors):
            raise ValueError("commitment_scp.enabled needs archives and requestors")
        return self


class NotifySettings(Section):
    """Who is told of a delivery that is dead; no patient data, UIDs or names are in it."""

    webhook: HTTPAddress | None = Field(
        default=None,
        repr=False,
        description="POST a JSON object there",
        examples=["https://alarms.hospital.example/dicom"],
    )
    webhook_token: SecretStr | None = Field(
        default=None, description="… with this bearer token", examples=["secret"]
    )
    mail_to: tuple[Mailbox, ...] = Field(default=(), description="send an e-mail to these")
    mail_from: Mailbox | None = Field(
        default=None, description="… from this address", examples=["node@hospital.example"]
    )
    smtp_host: str | None = Field(
        default=None, min_length=1, description="mail server", examples=["mail.hospital.example"]
    )
    smtp_port: Port = Field(default=25, description="its TCP port")
    smtp_security: Literal["none", "starttls", "tls"] = Field(
        default="none", description="none, starttls or tls"
    )
    smtp_username: str | None = Field(
        default=None, min_length=1, description="log in there", examples=["node"]
    )
    smtp_password: SecretStr | None = Field(
        default=None, description="… with this password", examples=["secret"]
    )
    bundle_s: Seconds = Field(
        default=600.0,
        description="people are told of one destination no oftener; what dies there meanwhile is"
        " told together",
    )
    timeout_s: Seconds = Field(default=20.0, description="longest wait for either server")
    retry_s: Seconds = Field(default=60.0, description="try again after so long")
    give_up_after_s: Seconds = Field(default=259_200.0, description="… until so long has gone by")

    @property
    def channels(self) -> tuple[str, ...]:
        """The ways to tell people that are configured."""
        given = {"webhook": self.webhook, "mail": self.mail_to}
        return tuple(name for name, value in given.items() if value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.mail_to and (self.mail_from is None or self.smtp_host is None):
            raise ValueError("notify.mail_to needs notify.mail_from and notify.smtp_host")
        if (self.smtp_username is None) != (self.smtp_password is None):
            raise ValueError("notify.smtp_username and notify.smtp_password belong together")
        return self
