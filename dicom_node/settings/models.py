"""The schema of `node.toml`: tables, keys, defaults, and one line of why for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from dicom_node.settings.assembly import AssemblySettings, Source
from dicom_node.settings.base import (
    AETitle,
    DestinationName,
    LedgerURL,
    Modality,
    Network,
    Port,
    Seconds,
    Section,
    StorageUID,
    SyslogServer,
    Task,
    UIDRoot,
)
from dicom_node.settings.delivery import (
    CommitmentSCPSettings,
    DeliverySettings,
    Destination,
    NotifySettings,
    WebDestination,
)
from dicom_node.settings.engine import EngineSettings
from dicom_node.settings.gates import BreakerSettings, GateSettings, ReviewSettings
from dicom_node.settings.janitor import JanitorSettings, RetentionSettings


class NodeSection(Section):
    """Who the node is and where it listens."""

    ae_title: AETitle = Field(
        default="DIFFCODE", description="AE title the node answers to and calls with"
    )
    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; 0.0.0.0 listens on all",
        min_length=1,
    )
    port: Port = Field(default=11112, description="TCP port to listen on")
    data_dir: Path = Field(
        default=Path("."), description="folder of the spool and the ledger, relative to this file"
    )


class SpoolSettings(Section):
    """Where received and restored instances lie on disk, and when to stop accepting."""

    path: Path = Field(
        default=Path("spool"), description="folder of the files, relative to data_dir"
    )
    min_free_bytes: int = Field(
        default=1_000_000_000, ge=0, description="answer 0xA700 when fewer bytes than this are free"
    )
    min_free_percent: float = Field(
        default=5.0, ge=0, le=100, description="… or when less than this share of the disk is free"
    )
    resume_factor: float = Field(
        default=1.25,
        ge=1,
        description="once closed, accept again when so many times that is free; below that the"
        " janitor makes room",
    )


class LedgerSettings(Section):
    """The database of what happened to each instance."""

    url: LedgerURL = Field(
        default="sqlite:///ledger.sqlite",
        repr=False,
        description="sqlite:///FILE (relative to data_dir) or postgresql+psycopg://USER@HOST/NAME",
    )


class AccessRule(Section):
    """One row of the rule table: whom it lets in; all that is given must match."""

    calling_ae: AETitle | None = Field(default=None, description="calling AE title")
    address: Network | None = Field(default=None, description="address or network, as 10.1.0.0/16")
    certificate: str | None = Field(
        default=None,
        min_length=1,
        description="a DNS name, or else the common name, of the peer's certificate",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.calling_ae is None and self.address is None and self.certificate is None:
            raise ValueError("a rule gives calling_ae, address or certificate")
        return self


class AssociationSettings(Section):
    """Who may associate, how many at once, and how long they may take."""

    max_associations: int = Field(
        default=50, ge=1, description="associations served at the same time"
    )
    max_associations_per_address: int = Field(
        default=25, ge=1, description="… of them from one address"
    )
    max_pending: int = Field(
        default=256,
        ge=2,
        description="connections that have not asked for an association yet; the oldest of the"
        " address with the most gives way",
    )
    max_pending_per_address: int = Field(
        default=128, ge=1, description="… of them from one address; its oldest gives way"
    )
    max_pdu: int = Field(
        default=131072,
        ge=4096,
        le=4_294_967_294,
        description="largest PDU the node accepts, in bytes",
    )
    acse_timeout_s: Seconds = Field(
        default=15.0,
        description="longest wait for the association request or release (ARTIM, ACSE)",
    )
    dimse_timeout_s: Seconds = Field(
        default=60.0, description="longest wait within a DIMSE message"
    )
    network_timeout_s: Seconds = Field(
        default=120.0, description="an association without traffic for so long is aborted"
    )
    require_called_ae_title: bool = Field(
        default=False,
        description="reject peers that call an AE title other than ae_title and those below",
    )
    called_ae_titles: tuple[AETitle, ...] = Field(
        default=(), description="further AE titles the node answers to; routes may test them"
    )
    allow: tuple[AccessRule, ...] = Field(
        default=(),
        description="who may associate, as { calling_ae, address, certificate }: any rule of which"
        " all given matches; empty: everyone",
    )
    storage_loop: bool = Field(
        default=True,
        description="serve C-STORE by the node's own loop; false: by pynetdicom alone, slower",
    )
    extra_storage_classes: tuple[StorageUID, ...] = Field(
        default=(), description="private or newer storage SOP Class UIDs to accept as well"
    )


class TLSSettings(Section):
    """DICOM over TLS, as PS3.15 B.12 asks: TLS 1.2 and 1.3; files are PEM, relative to this file.

    A file that changes, and SIGHUP, have the node read all of them again.
    """

    port: Port | None = Field(
        default=None, description="TCP port for TLS; unset: none", examples=[2762]
    )
    only: bool = Field(default=False, description="listen there alone, not on node.port")
    certificate: Path | None = Field(
        default=None,
        description="the node's certificate and its chain, as server and as client",
        examples=["tls/node.pem"],
    )
    key: Path | None = Field(
        default=None,
        description="the key of it, not encrypted, mode 0600",
        examples=["tls/node.key"],
    )
    ca: Path | None = Field(
        default=None,
        description="the authorities that sign the certificates of peers",
        examples=["tls/ca.pem"],
    )
    verify_peers: bool = Field(
        default=True, description="ask each calling peer for a certificate and check it"
    )
    handshake_timeout_s: Seconds = Field(default=5.0, description="longest TLS handshake")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.port is not None and (self.certificate is None or self.key is None):
            raise ValueError("tls.port needs tls.certificate and tls.key")
        if self.port is not None and self.verify_peers and self.ca is None:
            raise ValueError("tls.verify_peers needs tls.ca")
        if self.only and self.port is None:
            raise ValueError("tls.only needs tls.port")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls.certificate and tls.key belong together")
        return self


class LimitSettings(Section):
    """How much a peer may make the node hold; what is larger is refused or aborted."""

    max_data_set_bytes: int = Field(
        default=4_294_967_294, ge=1, description="largest data set of one instance"
    )
    max_elements: int = Field(
        default=5_000_000, ge=1, description="most data elements of one instance, items included"
    )
    max_inflated_bytes: int = Field(
        default=1_073_741_824, ge=1, description="a deflated data set may inflate to so much"
    )


class AuditSettings(Section):
    """The audit trail (PS3.15 A.5): the one place, besides the spool, that names patients."""

    journal: Path = Field(
        default=Path("audit.log"), description="local journal, mode 0600, relative to data_dir"
    )
    syslog: SyslogServer | None = Field(
        default=None,
        description="audit repository: udp://HOST:PORT (RFC 5426) or tls://HOST:PORT (RFC 5425)",
        examples=["tls://audit.hospital.example:6514"],
    )
    source_id: str | None = Field(
        default=None,
        min_length=1,
        description="Audit Source ID; unset: the AE title",
        examples=["diffcode-1"],
    )
    enterprise_site_id: str | None = Field(
        default=None, min_length=1, description="Audit Enterprise Site ID", examples=["hospital"]
    )
    queue: int = Field(
        default=1000, ge=1, description="messages that wait for a slow syslog server; more drop"
    )


class Equipment(Section):
    """How the node names itself in what it writes (PS3.3 C.7.5.1, C.12.1)."""

    manufacturer: str = Field(
        default="DiffCode", min_length=1, max_length=64, description="Manufacturer"
    )
    model_name: str = Field(
        default="DiffCode DICOM node",
        min_length=1,
        max_length=64,
        description="Manufacturer's Model Name",
    )
    institution_name: str | None = Field(
        default=None, max_length=64, description="Institution Name", examples=["Hospital"]
    )
    station_name: str | None = Field(
        default=None, max_length=16, description="Station Name", examples=["NODE1"]
    )


class IdentitySettings(Section):
    """How restored series are labelled."""

    uid_root: UIDRoot | None = Field(
        default=None,
        description="root of derived UIDs; unset: 2.25 (PS3.5 B.2)",
        examples=["1.2.3.4"],
    )
    series_number_offset: int = Field(
        default=9000, ge=0, le=2_000_000_000, description="added to the Series Number of the source"
    )
    description_suffixes: dict[Task, str] = Field(
        default={"mri_sr": " [AI-SR]", "ct_denoise": " [AI-DN]", "pet_synthesis": " [AI-PET]"},
        description="appended to the Series Description, by task",
    )
    content_qualification: Literal["PRODUCT", "RESEARCH", "SERVICE"] = Field(
        default="RESEARCH", description="Content Qualification: PRODUCT, RESEARCH or SERVICE"
    )
    equipment: Equipment = Field(default=Equipment(), description="the Contributing Equipment item")


class ReportSettings(Section):
    """Objects that go with each restored series, each a series of its own in the study."""

    sr: bool = Field(
        default=False,
        description="an Enhanced SR: model, digests, what each slice measured, source and result",
    )
    gsps: bool = Field(
        default=False, description="a presentation state that writes the text below on the images"
    )
    text: str = Field(
        default="AI restored, see original",
        min_length=1,
        max_length=64,
        description="what the presentation state writes",
    )
    series_number_offset: int = Field(
        default=500,
        ge=0,
        le=100_000_000,
        description="added to the Series Number of the restored series; the GSPS adds one more",
    )


class PolicySettings(Section):
    """What is restored, held or refused."""

    accept_derived: bool = Field(
        default=True, description="CT and PET with ImageType DERIVED, when otherwise an acquisition"
    )
    accept_lossy: bool = Field(default=False, description="sources that were compressed with loss")
    planes: dict[Modality, Literal["axial", "any"]] = Field(
        default={"CT": "axial", "MR": "any", "PT": "any"},
        description="orientation that is restored, by modality: axial or any",
    )
    missing_metadata: Literal["warn", "refuse"] = Field(
        default="warn",
        description="kernel, thickness, spacing or field strength absent: warn or refuse",
    )
    domain: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="present, but outside the domain of the bundle: refuse or warn",
    )
    incomplete: Literal["restore", "hold", "refuse"] = Field(
        default="restore",
        description="fewer instances than announced, or a gap: restore, hold or refuse",
    )
    split_by: tuple[Literal["echo_time", "b_value", "image_type", "temporal_position"], ...] = (
        Field(
            default=("echo_time", "b_value", "image_type", "temporal_position"),
            description="attributes that make several volumes, hence several jobs, of one series",
        )
    )
    low_matrix: Literal["upsample", "refuse"] = Field(
        default="upsample",
        description="MR stored at its acquired matrix, too coarse for the bundle: upsample, refuse",
    )
    from_destinations: Literal["originals", "restore", "ignore"] = Field(
        default="originals",
        description="what a destination sends: restore what is not DERIVED, restore all, or ignore",
    )
    pet_units: Literal["scale", "refuse"] = Field(
        default="scale", description="PET that has no SUV: restore by a stored scale, or refuse"
    )


class LogSettings(Section):
    """What is logged; patient data never are."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: for people on a terminal, JSON elsewhere"
    )


class NodeSettings(Section):
    """All settings of a node; paths are absolute once loaded."""

    routes: Path = Field(
        default=Path("routes.toml"), description="routing table, relative to this file"
    )
    node: NodeSection = Field(default=NodeSection())
    spool: SpoolSettings = Field(default=SpoolSettings())
    ledger: LedgerSettings = Field(default=LedgerSettings())
    destinations: dict[DestinationName, Destination] = Field(
        default={}, description="peers that restored series are sent to, each a table of its own"
    )
    stow: dict[DestinationName, WebDestination] = Field(
        default={}, description="DICOMweb servers that restored series are stored on, likewise"
    )
    association: AssociationSettings = Field(default=AssociationSettings())
    tls: TLSSettings = Field(default=TLSSettings())
    limits: LimitSettings = Field(default=LimitSettings())
    audit: AuditSettings = Field(default=AuditSettings())
    assembly: AssemblySettings = Field(default=AssemblySettings())
    sources: dict[DestinationName, Source] = Field(
        default={}, description="senders whose habits are known, each a table of its own"
    )
    engine: EngineSettings = Field(default=EngineSettings())
    delivery: DeliverySettings = Field(default=DeliverySettings())
    commitment_scp: CommitmentSCPSettings = Field(default=CommitmentSCPSettings())
    notify: NotifySettings = Field(default=NotifySettings())
    identity: IdentitySettings = Field(default=IdentitySettings())
    report: ReportSettings = Field(default=ReportSettings())
    policy: PolicySettings = Field(default=PolicySettings())
    gates: GateSettings = Field(default=GateSettings())
    breaker: BreakerSettings = Field(default=BreakerSettings())
    review: ReviewSettings = Field(default=ReviewSettings())
    janitor: JanitorSettings = Field(default=JanitorSettings())
    retention: RetentionSettings = Field(default=RetentionSettings())
    log: LogSettings = Field(default=LogSettings())

    @property
    def destination_names(self) -> tuple[str, ...]:
        """What a route may name: DICOM and DICOMweb destinations."""
        return (*self.destinations, *self.stow)

    @model_validator(mode="after")
    def _destinations_are_known(self) -> Self:
        if twice := set(self.destinations) & set(self.stow):
            raise ValueError(f"destinations.{min(twice)} and stow.{min(twice)} have the same name")
        if unknown := set(self.commitment_scp.archives) - set(self.destinations):
            raise ValueError(f"commitment_scp.archives: {min(unknown)!r} is not in [destinations]")
        return self

    @model_validator(mode="after")
    def _gates_name_destinations(self) -> Self:
        unknown = set(self.gates.by_destination) - set(self.destinations) - set(self.stow)
        if unknown:
            raise ValueError(f"gates.by_destination names no destination: {min(unknown)}")
        return self

    @model_validator(mode="after")
    def _can_check_peers(self) -> Self:
        secure = [name for name, peer in self.destinations.items() if peer.tls]
        if secure and self.tls.ca is None:
            raise ValueError(f"destinations.{secure[0]}.tls needs tls.ca")
        shown = [name for name, server in self.stow.items() if server.client_certificate]
        if shown and self.tls.certificate is None:
            raise ValueError(f"stow.{shown[0]}.client_certificate needs tls.certificate")
        called = self.commitment_scp.requestors
        if any(each.tls for each in called) and self.tls.ca is None:
            raise ValueError("commitment_scp.requestors over TLS needs tls.ca")
        if (self.audit.syslog or "").startswith("tls:") and self.tls.ca is None:
            raise ValueError("audit.syslog over TLS needs tls.ca")
        needs = [rule.certificate for rule in self.association.allow if rule.certificate]
        if needs and not (self.tls.port is not None and self.tls.verify_peers):
            raise ValueError(
                "association.allow asks for a certificate: set tls.port and tls.verify_peers"
            )
        return self


def submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    kind = field.annotation if field is not None else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
