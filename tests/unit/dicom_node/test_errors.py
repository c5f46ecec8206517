from __future__ import annotations

import re

import pytest

from dicom_node import errors
from dicom_node.errors import NodeError, PermanentError, TransientError


def _classes() -> set[type[NodeError]]:
    return {
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, NodeError)
    }


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = re.findall(r"^([ │├└─]*)(\w+Error)\b", errors.__doc__ or "", flags=re.MULTILINE)
    above: list[str] = []
    for branch, name in drawn:
        depth = len(branch) // 4
        above[depth:] = [name]
        if depth:
            assert getattr(errors, name).__bases__ == (getattr(errors, above[depth - 1]),)
    assert {name for _, name in drawn} == {each.__name__ for each in _classes()}


def test_every_error_is_either_permanent_or_transient() -> None:
    for each in _classes() - {NodeError, PermanentError, TransientError}:
        assert issubclass(each, PermanentError) != issubclass(each, TransientError)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.SpoolFullError("full"), 0xA700),
        (errors.LedgerError("locked"), 0xA700),
        (errors.MismatchError("SOP Class"), 0xA900),
        (errors.UnreadableInstanceError("ends early"), 0xC000),
        (errors.RefusedError("reformatted"), 0xC000),
        (NodeError("other"), 0x0110),
    ],
)
def test_each_error_has_its_dimse_status(error: NodeError, status: int) -> None:
    assert error.dimse_status == status


def test_a_configuration_error_tells_all_its_problems() -> None:
    error = errors.ConfigurationError(["node.port: too large", "node.host: empty"])
    assert error.problems == ("node.port: too large", "node.host: empty")
    assert str(error) == "node.port: too large\nnode.host: empty"


def test_an_unreadable_instance_is_named_where_it_is_known() -> None:
    assert errors.UnreadableInstanceError("x").sop_instance_uid is None
    assert errors.UnreadableInstanceError("x", sop_instance_uid="1.2").sop_instance_uid == "1.2"
