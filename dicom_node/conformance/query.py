"""Query as SCU: how sources are asked for the number of instances of a series."""

from __future__ import annotations

from collections.abc import Iterator

from dicom_node.conformance.markdown import table
from dicom_node.query_scu import FIND, MODEL, TRANSFER_SYNTAXES
from dicom_node.settings import NodeSettings


def asks(settings: NodeSettings) -> bool:
    """Whether any source is asked."""
    return any(source.find is not None for source in settings.sources.values())


def as_scu(settings: NodeSettings) -> Iterator[str]:
    """What sources are asked, with which keys, and what becomes of their answers."""
    yield "### 3.8 Query as SCU"
    if not asks(settings):
        yield "No source is asked (sources.NAME.find)."
        return
    yield """Before a series of a source is concluded, the source is asked by C-FIND how many
instances it has: at SERIES level by Study and Series Instance UID for Number of Series Related
Instances, and where it does not return that, at IMAGE level for the SOP Instance UIDs. Answers are
pending (FF00, FF01) until 0000; any other status, and a time-out, leave the count unknown, and the
series is concluded without it."""
    yield table(
        ["Abstract syntax", "UID", "Transfer syntax", "Role"],
        [[MODEL, FIND, syntax, "SCU"] for syntax in TRANSFER_SYNTAXES],
    )
    yield table(
        ["Source", "AE title", "Address", "Calling AE title"],
        [
            [name, find.ae_title, f"{find.host}:{find.port}",
             find.calling_ae_title or settings.node.ae_title]
            for name, source in settings.sources.items()
            if (find := source.find) is not None
        ],
    )  # fmt: skip
