"""`[engine]`: the restoration model, where it runs, and when."""

from __future__ import annotations

from pydantic import Field

from dicom_node.settings.base import Device, Seconds, Section


class EngineSettings(Section):
    """The restoration model and where it runs."""

    bundle: str = Field(
        default="compact", min_length=1, description="name or folder of the model bundle"
    )
    device: Device = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the model; unset: all cores", examples=[4]
    )
    lease_s: Seconds = Field(
        default=120.0, description="a job whose worker is silent for so long goes to another worker"
    )
    max_attempts: int = Field(
        default=10, ge=1, description="a job that was tried so often and never ended is failed"
    )
    retry_s: Seconds = Field(default=30.0, description="wait before a job is tried again")
    idle_poll_s: Seconds = Field(
        default=0.5,
        description="wait before the worker asks for a job again; a commit to SQLite ends it",
    )
    early: bool = Field(
        default=True,
        description="restore slices of CT while their series still comes, when no job is due",
    )
