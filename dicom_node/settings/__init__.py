"""Settings of the node: one schema for validation, `config/node.toml` and the documentation.

Sources, weakest first: the defaults, `node.toml`, the environment (`DICOM_NODE__SECTION__KEY`),
files of the same names in the systemd credentials directory. All problems are reported at once,
each with its source and key path.
"""

from __future__ import annotations

from dicom_node.settings.assembly import AssemblySettings, Source, SourceQuery
from dicom_node.settings.base import AETitle, Section
from dicom_node.settings.delivery import (
    CommitmentRequestor,
    CommitmentSCPSettings,
    DeliverySettings,
    Destination,
    NotifySettings,
    WebDestination,
)
from dicom_node.settings.engine import EngineSettings
from dicom_node.settings.gates import BreakerSettings, GateSettings, ReviewSettings
from dicom_node.settings.janitor import JanitorSettings, RetentionSettings
from dicom_node.settings.models import (
    AccessRule,
    AssociationSettings,
    AuditSettings,
    Equipment,
    IdentitySettings,
    LedgerSettings,
    LimitSettings,
    LogSettings,
    NodeSection,
    NodeSettings,
    PolicySettings,
    ReportSettings,
    SpoolSettings,
    TLSSettings,
)
from dicom_node.settings.sample import default_toml, render_toml
from dicom_node.settings.sources import load

__all__ = [
    "AETitle",
    "AccessRule",
    "AssemblySettings",
    "AssociationSettings",
    "AuditSettings",
    "BreakerSettings",
    "CommitmentRequestor",
    "CommitmentSCPSettings",
    "DeliverySettings",
    "Destination",
    "EngineSettings",
    "Equipment",
    "GateSettings",
    "IdentitySettings",
    "JanitorSettings",
    "LedgerSettings",
    "LimitSettings",
    "LogSettings",
    "NodeSection",
    "NodeSettings",
    "NotifySettings",
    "PolicySettings",
    "ReportSettings",
    "ReviewSettings",
    "RetentionSettings",
    "Section",
    "Source",
    "SourceQuery",
    "SpoolSettings",
    "TLSSettings",
    "WebDestination",
    "default_toml",
    "load",
    "render_toml",
]
