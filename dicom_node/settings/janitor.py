"""`[janitor]` and `[retention]`: what is tidied up, and what may be removed from the spool."""

from __future__ import annotations

from pydantic import Field

from dicom_node.settings.base import Seconds, Section

_DAY = 86_400.0


class JanitorSettings(Section):
    """What is tidied up, and when."""

    interval_s: Seconds = Field(
        default=10.0, description="time between two looks at expired leases and at the disk"
    )
    stale_file_s: Seconds = Field(
        default=3600.0,
        description="temporary files older than this are removed at start, and at any time slices"
        " that were restored ahead of their series",
    )
    purge_interval_s: Seconds = Field(
        default=600.0, description="time between two looks at what [retention] lets go"
    )


class RetentionSettings(Section):
    """When files leave the spool. What has not arrived at every destination never does."""

    delivered_s: Seconds | None = Field(
        default=7 * _DAY,
        description="originals and results go so long after every delivery has arrived (and is"
        " committed, where commitment is asked for); unset: never",
        examples=[604800.0],
    )
    unrestored_s: Seconds | None = Field(
        default=None,
        description="originals that nothing is made of (ignored, refused, failed) go after so long;"
        " unset: never",
        examples=[2592000.0],
    )
    quarantine_s: Seconds | None = Field(
        default=30 * _DAY,
        description="what was set aside goes after so long; unset: never",
        examples=[2592000.0],
    )
    review_s: Seconds | None = Field(
        default=30 * _DAY,
        description="the review report of a job goes so long after the job has ended; unset: never",
        examples=[2592000.0],
    )
    early: bool = Field(
        default=True,
        description="where the disk is short, what delivered_s would remove later goes at once",
    )
