"""Which destination is of which kind, and how many deliveries it takes at once."""

from __future__ import annotations

from typing import Any

import pytest

from dicom_node.delivery import limits, target_of
from dicom_node.errors import NotFoundError
from dicom_node.settings import NodeSettings
from dicom_node.storage_scu import StoreLink
from dicom_node.stow import WebLink

PACS: dict[str, Any] = {"ae_title": "ARCHIVE", "host": "pacs.example", "port": 104}
WEB: dict[str, Any] = {"url": "https://web.example/dicom-web"}


def settings(**changes: Any) -> NodeSettings:
    return NodeSettings.model_validate(
        {"destinations": {"pacs": PACS}, "stow": {"web": WEB}, **changes}
    )


def test_a_destination_is_called_in_the_way_of_its_kind() -> None:
    pacs, web = target_of(settings(), "pacs"), target_of(settings(), "web")
    assert isinstance(pacs.connect(), StoreLink)
    link = web.connect()
    assert isinstance(link, WebLink)
    link.close()
    assert (pacs.remote.ae_title, pacs.remote.address) == ("ARCHIVE", "pacs.example")
    assert (web.remote.ae_title, web.remote.address) == ("web", "web.example")


def test_a_name_that_is_no_longer_configured_is_said() -> None:
    with pytest.raises(NotFoundError, match="'old' is no longer configured"):
        target_of(settings(), "old")


@pytest.mark.parametrize(
    ("node", "destination", "wanted"),
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_a_destination_may_differ_from_the_node_in_commitment(
    node: bool, destination: bool | None, wanted: bool
) -> None:
    given = settings(
        delivery={"commitment": node}, destinations={"pacs": {**PACS, "commitment": destination}}
    )
    assert target_of(given, "pacs").wants_commitment is wanted
    assert not target_of(given, "web").wants_commitment, "STOW-RS has none"


def test_limits_are_those_of_each_destination() -> None:
    given = settings(
        destinations={"pacs": {**PACS, "max_associations": 3}},
        stow={"web": {**WEB, "max_requests": 5}},
    )
    assert limits(given) == {"pacs": 3, "web": 5}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stow": {"pacs": WEB}}, "have the same name"),
        ({"stow": {"web": {**WEB, "username": "node"}}}, "username and password belong together"),
        ({"stow": {"web": {**WEB, "client_certificate": True}}}, "needs tls.certificate"),
        ({"stow": {"web": {"url": "dicomweb://host"}}}, "https://HOST"),
        (
            {"commitment_scp": {"archives": ["web"]}},
            r"commitment_scp.archives: 'web' is not in \[destinations\]",
        ),
        ({"delivery": {"first_s": 10, "max_s": 5}}, "max_s is smaller than"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_secrets_do_not_show_where_settings_are_printed() -> None:
    web = {**WEB, "token": "secret"}
    notify = {"webhook": "https://hooks.example/secret", "webhook_token": "secret"}
    assert "secret" not in repr(settings(stow={"web": web}, notify=notify))
