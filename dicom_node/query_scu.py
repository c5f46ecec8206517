"""How many instances of a series its source has, asked by C-FIND (PS3.4 C, Study Root)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
)

from dicom_node.association import Peer
from dicom_node.dicom.header import number, quiet_pydicom, text
from dicom_node.errors import DestinationError, NodeError
from dicom_node.requestor import associate
from dicom_node.settings import SourceQuery

__all__ = ["FIND", "MODEL", "TRANSFER_SYNTAXES", "SourceCount", "count_instances", "source_peer"]

FIND = str(StudyRootQueryRetrieveInformationModelFind)
MODEL = "Study Root Query/Retrieve Information Model - FIND"
_SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
TRANSFER_SYNTAXES = tuple(UID(syntax).name for syntax in _SYNTAXES)

_PENDING = (0xFF00, 0xFF01)  # PS3.4 C.4.1.1.4
# More than any series has; a peer that never ends its answers must not fill the memory.
_MOST_ANSWERS = 100_000


@dataclass(frozen=True)
class SourceCount:
    """What a source answered: a number, the instances where it listed them, or why neither."""

    where: str
    expected: int | None
    sop_instance_uids: frozenset[str] | None = None
    trouble: str | None = None


def source_peer(find: SourceQuery, calling_ae: str) -> Peer:
    """The peer that a source's ``find`` table describes; *calling_ae* is the node's own title."""
    return Peer(
        ae_title=find.ae_title,
        host=find.host,
        port=find.port,
        calling_ae=find.calling_ae_title or calling_ae,
        connection_timeout=find.timeout_s,
        acse_timeout=find.timeout_s,
        dimse_timeout=find.timeout_s,
        network_timeout=find.timeout_s,
    )


def count_instances(peer: Peer, study_uid: str, series_uid: str) -> SourceCount:
    """Ask *peer* how many instances it has of a series; never raises for what the peer does.

    Number of Series Related Instances is an optional key (PS3.4 C.6.1.1.4): where a peer does not
    return it, its instances are listed, and the list is what counts.
    """
    context = build_context(FIND, list(_SYNTAXES))
    try:
        with associate(peer, [context]) as association:
            answers = _find(association, _series_key(study_uid, series_uid))
            own = [each for each in answers if text(each, "SeriesInstanceUID") == series_uid]
            if not own:
                return SourceCount(peer.where, None, trouble="does not know the series")
            related = number(own[0], "NumberOfSeriesRelatedInstances")
            if related is not None and related > 0:
                return SourceCount(peer.where, int(related))
            listed = _find(association, _instances_key(study_uid, series_uid))
            uids = frozenset(text(each, "SOPInstanceUID") for each in listed) - {""}
            return SourceCount(peer.where, len(uids) or None, uids or None)
    except (NodeError, ValueError) as error:
        return SourceCount(peer.where, None, trouble=str(error))


def _series_key(study_uid: str, series_uid: str) -> Dataset:
    key = _key("SERIES", study_uid, series_uid)
    key.Modality = ""
    key.NumberOfSeriesRelatedInstances = None
    return key


def _instances_key(study_uid: str, series_uid: str) -> Dataset:
    key = _key("IMAGE", study_uid, series_uid)
    key.SOPInstanceUID = ""
    return key


def _key(level: str, study_uid: str, series_uid: str) -> Dataset:
    key = Dataset()
    key.QueryRetrieveLevel = level
    key.StudyInstanceUID, key.SeriesInstanceUID = study_uid, series_uid
    return key


def _find(association: Association, key: Dataset) -> list[Dataset]:
    with quiet_pydicom():
        return list(_answers(association, key))


def _answers(association: Association, key: Dataset) -> Iterator[Dataset]:
    try:
        responses = association.send_c_find(key, FIND)
        for count, (status, identifier) in enumerate(responses):
            code = int(status.Status) if "Status" in status else None
            if code not in _PENDING:
                if code != 0x0000:
                    answer = (
                        "no answer, aborted or timed out"
                        if code is None
                        else f"answered 0x{code:04X}"
                    )
                    raise DestinationError(f"C-FIND: {answer}")
                return
            if count >= _MOST_ANSWERS:
                raise DestinationError("C-FIND: too many answers")
            if identifier is not None:
                yield identifier
    except RuntimeError as error:
        raise DestinationError("C-FIND: the association was aborted") from error
