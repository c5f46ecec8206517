"""The DICOM Conformance Statement (PS3.2), made from the tables and settings that the node runs by.

    from dicom_node.conformance import statement
    print(statement(settings))

Nothing in it is written twice: presentation contexts come from `association`, statuses from the
errors that cause them, created attributes from the header policy. What no table holds, as the flow
of data, is said in words here, and the tests hold the words to real associations and real objects.
"""

from __future__ import annotations

from dicom_node import __version__
from dicom_node.conformance import created, network, security
from dicom_node.conformance.markdown import paragraphs
from dicom_node.settings import NodeSettings

__all__ = ["statement"]

_HEAD = f"""# DICOM Conformance Statement

Product: DiffCode DICOM node, version {__version__}. Made by `dicom-node conformance` from the
program's own tables and one configuration, in the order of the template of PS3.2.

A conformance statement says what can be exchanged; it does not say that two products work
together, nor that an image is fit for a purpose. The node is for research and no medical device."""


def statement(settings: NodeSettings) -> str:
    """The statement of a node with these settings, as Markdown."""
    return paragraphs(
        _HEAD,
        *network.overview(settings),
        *network.implementation_model(settings),
        *network.application_entity(settings),
        *network.communication_profiles(settings),
        *created.character_sets(),
        *security.sections(settings),
        *created.annex(settings),
    )
