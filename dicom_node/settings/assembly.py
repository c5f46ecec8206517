"""`[assembly]` and `[sources.NAME]`: when a series counts as complete, and who can tell."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Self

from pydantic import Field, model_validator

from dicom_node.settings.base import AETitle, Modality, Network, Port, Seconds, Section


class SourceQuery(Section):
    """Where a source answers C-FIND (Study Root)."""

    ae_title: AETitle = Field(description="AE title that answers queries")
    host: str = Field(min_length=1, description="host name or address")
    port: Port = Field(description="TCP port")
    calling_ae_title: AETitle | None = Field(
        default=None, description="call with this AE title instead of the node's"
    )
    timeout_s: Seconds = Field(default=5.0, description="longest wait for each answer")


class Source(Section):
    """A sender whose habits are known: all that is given of title and address must match."""

    calling_ae: AETitle | None = Field(
        default=None, description="calling AE title of the sender", examples=["CT1"]
    )
    address: Network | None = Field(
        default=None, description="its address or network", examples=["10.1.2.0/24"]
    )
    quiet_s: Seconds | None = Field(
        default=None, description="quiet time of its series; unset: as in [assembly]"
    )
    quiet_by_modality_s: dict[Modality, Seconds] = Field(
        default={}, description="… by modality, as { PT = 120.0 }"
    )
    find: SourceQuery | None = Field(
        default=None,
        description="ask it by C-FIND how many instances a series has, before it is concluded",
        examples=[{"ae_title": "CT1", "host": "10.1.2.3", "port": 104}],
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.calling_ae is None and self.address is None:
            raise ValueError("a source gives calling_ae or address")
        return self

    def matches(self, calling_ae: str, address: str) -> bool:
        """Whether a sender is this source."""
        titled = self.calling_ae in (None, calling_ae.strip())
        return titled and (self.address is None or _lies_in(address, self.address))

    def quiet_for(self, modality: str) -> float | None:
        """The quiet time of a modality in seconds; None: the source has none of its own."""
        return _by_name(self.quiet_by_modality_s).get(modality, self.quiet_s)


def _lies_in(address: str, network: str) -> bool:
    try:
        return ip_address(address) in ip_network(network)
    except ValueError:
        return False


def _by_name(special: dict[Modality, Seconds]) -> dict[str, float]:
    return {str(known): seconds for known, seconds in special.items()}


class AssemblySettings(Section):
    """When a series counts as complete."""

    quiet_s: Seconds = Field(
        default=10.0,
        description="complete after so long without an instance or an open association",
    )
    quiet_by_modality_s: dict[Modality, Seconds] = Field(
        default={}, description="other quiet times by modality, as { PT = 60.0 }"
    )
    complete_when_counted: bool = Field(
        default=True,
        description="do not wait out the quiet time once the association is released and every"
        " instance that the headers announce is there",
    )
    trust_images_in_acquisition: bool = Field(
        default=False,
        description="fewer instances than Images in Acquisition are incomplete; many scanners"
        " reconstruct one acquisition into several series",
    )
    longest_s: Seconds = Field(
        default=3600.0,
        description="a series that is still being sent after so long is concluded with what came",
    )
    tick_s: Seconds = Field(default=1.0, description="time between two looks at the open series")

    def quiet_for(self, modality: str) -> float:
        """Return the quiet time of a modality in seconds."""
        return _by_name(self.quiet_by_modality_s).get(modality, self.quiet_s)
