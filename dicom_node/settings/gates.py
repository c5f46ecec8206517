"""What happens to a result by what the safety gates say, and what a reviewer is shown."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dicom_node.settings.base import DestinationName, Modality, Section

#: The gates of `restoration.fidelity`, `guard` for the guards of the engine itself.
GATES = (
    "finite", "range", "low_frequency", "gain", "hu_bias_air", "hu_bias_lung", "hu_bias_fat",
    "hu_bias_soft", "hu_bias_bone", "whiteness", "edge_correlation", "structure",
    "residual_energy", "network_drift", "network_energy", "activity", "local_activity", "hot_suv",
    "hot_suv_small", "hot_peak", "data_consistency", "noise_level", "intensity", "units", "echo",
    "empty_band", "ghosting", "texture", "restored_before", "likeness", "sharpness", "cleanness",
    "domain", "routing", "latent", "reference", "continuity", "slice_order", "idempotence",
    "perturbation", "weights", "guard",
)  # fmt: skip

Action = Literal["pass", "warn", "hold", "refuse"]


def _gate(name: str) -> str:
    if name not in GATES:
        raise ValueError(f"{name!r} is not a gate (known: {', '.join(GATES)})")
    return name


GateName = Annotated[str, AfterValidator(_gate)]
Actions = dict[GateName, Action]
#: Keywords of what a report may show of the source beside UIDs; PS3.15 Table E.1-1 has them all.
Identifier = Literal[
    "PatientID", "AccessionNumber", "StudyDate", "StudyDescription", "SeriesDescription",
]  # fmt: skip
# What says that the input needs no restoration. A full k-space may also be an interpolation by
# something else than zeros: a person looks at it, whatever follows from other gates.
_NEEDLESS: Actions = {"noise_level": "refuse", "empty_band": "hold"}


class GateSettings(Section):
    """What happens to a result that is past a gate's limit: pass, warn, hold or refuse."""

    on_fail: Action = Field(
        default="hold", description="a gate past its limit: pass, warn, hold for review, or refuse"
    )
    on_warn: Literal["pass", "warn"] = Field(
        default="warn", description="a gate past its warning level: pass or warn"
    )
    uncalibrated: Action = Field(
        default="warn",
        description="the bundle's limits were never learnt: pass, warn, hold or refuse",
    )
    actions: Actions = Field(
        default=_NEEDLESS,
        description="instead of on_fail, by gate; `domain` follows policy.domain unless named here",
    )
    by_modality: dict[Modality, Actions] = Field(
        default={}, description='… by modality and gate, as { CT = { hu_bias_soft = "refuse" } }'
    )
    by_destination: dict[DestinationName, Actions] = Field(
        default={}, description='… by destination and gate, as { research = { gain = "warn" } }'
    )
    warning_suffix: str = Field(
        default=" [QC]",
        max_length=16,
        description="appended to the Series Description of what passed with a warning or was held",
    )


class BreakerSettings(Section):
    """When so many results of a modality fail a gate that all of them wait for a person."""

    window: int = Field(
        default=50, ge=5, le=1000, description="jobs that are looked back at, by modality and model"
    )
    lowest: float = Field(
        default=0.0, ge=0, lt=1, description="lowest expected rate of failed jobs; 0: none"
    )
    highest: float = Field(
        default=0.05, gt=0, lt=1, description="highest expected rate of failed jobs"
    )
    significance: float = Field(
        default=0.001,
        gt=0,
        le=0.05,
        description="the breaker opens when an exact binomial test finds the rate outside the band",
    )

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError("breaker.lowest is not below breaker.highest")
        return self


class ReviewSettings(Section):
    """The report on each result for the person who reviews it; it stays in the spool."""

    write: Literal["always", "warned", "held", "never"] = Field(
        default="always", description="always; warned or worse; held or refused; never"
    )
    slices: int = Field(
        default=4, ge=0, le=16, description="slices in the report beside the worst one"
    )
    identifiers: tuple[Identifier, ...] = Field(
        default=(),
        description="attributes of the source that the report may show beside job and UIDs, as"
        ' ["AccessionNumber"]',
    )
