"""People are told of a dead delivery, over real SMTP and HTTP, and of no patient."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from dicom_node.ledger import notices
from dicom_node.ledger.tables import writing
from dicom_node.notify import Notifier
from dicom_node.settings import NodeSettings
from tests.conftest import ManualClock
from tests.integration.conftest import node_settings
from tests.integration.peers import Archive, Node, outgoing_series, reserve_port, serving
from tests.integration.test_destinations import run_to_the_end, worker


@dataclass
class Mailbox:
    """An SMTP server's letters; *answers* are its next replies to a letter."""

    letters: list[bytes] = field(default_factory=list)
    to: list[list[str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        answer = self.answers.pop(0) if self.answers else "250 OK"
        if answer.startswith("2"):
            self.letters.append(envelope.content)
            self.to.append(envelope.rcpt_tos)
        return answer


@contextmanager
def mail_server(mailbox: Mailbox) -> Generator[int]:
    port = reserve_port()
    controller = Controller(mailbox, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        yield port
    finally:
        controller.stop()


@dataclass
class Hook:
    """A webhook's calls: headers and JSON; *codes* are its next answers."""

    calls: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    asked: int = 0


@contextmanager
def web_server(hook: Hook) -> Generator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.asked += 1
            code = hook.codes.pop(0) if hook.codes else 204
            if code < 300:
                hook.calls.append((dict(self.headers), json.loads(body)))
            self.send_response(code)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/alarm"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def settings(node: Node, **notify: Any) -> NodeSettings:
    values = {"retry_s": 60, "give_up_after_s": 3600, "timeout_s": 5, **notify}
    return node_settings(node.spool.root.parent, notify=values)


def mail(port: int) -> dict[str, Any]:
    return {
        "mail_to": ["pacs-team@hospital.example", "night@hospital.example"],
        "mail_from": "node@hospital.example",
        "smtp_host": "127.0.0.1",
        "smtp_port": port,
    }


def dead_delivery(node: Node, clock: ManualClock) -> None:
    """A delivery whose destination refuses an instance and says a patient's name with it."""
    outgoing_series(node, ["pacs"], slices=3)

    def refuse_by_name(number: int, event: Any) -> Any:
        from pydicom.dataset import Dataset

        answer = Dataset()
        answer.Status = 0xC000 if number == 2 else 0x0000
        if number == 2:
            answer.ErrorComment = "Phantom^Test PHANTOM unknown"
        return answer

    class Talkative(Archive):
        def on_store(self, event: Any) -> Any:
            self.asked += 1
            return refuse_by_name(self.asked, event)

    with serving(Talkative()) as archive:
        run_to_the_end(worker(node, archive.port, clock), clock, node)


def test_a_dead_delivery_is_told_by_mail_and_webhook_without_patient_data(
    node_scp: Node, clock: ManualClock
) -> None:
    from dicom_node.ledger import reports

    dead_delivery(node_scp, clock)
    (row,) = reports.deliveries(node_scp.ledger)
    assert "Phantom^Test" in row["reason"], "the ledger has the words of the peer"
    mailbox, hook = Mailbox(), Hook()
    with mail_server(mailbox) as port, web_server(hook) as url:
        notifier = Notifier(
            settings(node_scp, webhook=url, webhook_token="secret", **mail(port)),
            node_scp.ledger,
            clock,
        )
        assert notifier.run_once()
        assert not notifier.run_once(), "it is told once"
    ((headers, event),) = hook.calls
    assert headers["Authorization"] == "Bearer secret"
    assert event == {
        "event": "delivery_dead",
        "node": "DIFFCODE",
        "version": event["version"],
        "delivery": row["id"],
        "job": row["job"],
        "destination": "pacs",
        "reason": "1 refused: answered 0xC000",
        "stored": 2,
        "committed": 0,
        "instances": 3,
        "at": "2023-11-14T22:13:20+00:00",
    }
    (letter,) = mailbox.letters
    assert mailbox.to == [["pacs-team@hospital.example", "night@hospital.example"]]
    parsed = message_from_bytes(letter, policy=default)
    expected = f"DIFFCODE: delivery {row['id']} to pacs is dead (2 of 3 stored)"
    assert parsed["Subject"] == expected
    for told in (letter, json.dumps(event).encode()):
        for secret in (b"Phantom", b"PHANTOM", b"1.2.826.0.1"):
            assert secret not in told


def event_of(delivery: int, at: float, reason: str = "given up: no answer") -> dict[str, Any]:
    """What the ledger writes of a dead delivery."""
    return {
        "event": "delivery_dead",
        "delivery": delivery,
        "job": delivery,
        "destination": "pacs",
        "reason": reason,
        "stored": 1,
        "committed": 0,
        "instances": 4,
        "at": at,
    }


def test_a_destination_that_kills_hundreds_of_deliveries_is_told_of_twice(
    node_scp: Node, clock: ManualClock
) -> None:
    mailbox, hook = Mailbox(), Hook()

    def die(*deliveries: int) -> None:
        with writing(node_scp.ledger) as connection:
            for each in deliveries:
                reason = "1 refused: answered 0xC000" if each % 100 == 0 else "given up: no answer"
                notices.write(connection, event_of(each, clock(), reason), clock())

    with mail_server(mailbox) as port, web_server(hook) as url:
        given = settings(node_scp, webhook=url, bundle_s=600, **mail(port))
        notifier = Notifier(given, node_scp.ledger, clock)
        die(1)
        assert notifier.run_once()
        clock.advance(10)
        die(*range(2, 401))
        assert not notifier.run_once(), "it has just been told of"
        clock.advance(600)
        hook.codes = [500]
        assert notifier.run_once()
        clock.advance(60)
        assert notifier.run_once()
        clock.advance(9e9)
        assert not notifier.run_once()
    assert (len(mailbox.letters), len(hook.calls), hook.asked) == (2, 2, 3)
    (_, first), (headers, event) = hook.calls
    assert first["event"] == "delivery_dead"
    assert headers["Idempotency-Key"] == "DIFFCODE-2x399"
    assert event == {
        "event": "deliveries_dead",
        "node": "DIFFCODE",
        "version": event["version"],
        "destination": "pacs",
        "deliveries": [*range(2, 401)],
        "reasons": {"given up: no answer": 395, "1 refused: answered 0xC000": 4},
        "stored": 399,
        "instances": 4 * 399,
        "at": "2023-11-14T22:13:30+00:00",
    }
    parsed = message_from_bytes(mailbox.letters[1], policy=default)
    assert parsed["Subject"] == "DIFFCODE: 399 deliveries to pacs are dead (399 of 1596 stored)"


def test_a_channel_that_fails_is_tried_again_and_the_other_is_not_told_twice(
    node_scp: Node, clock: ManualClock
) -> None:
    dead_delivery(node_scp, clock)
    mailbox, hook = Mailbox(answers=["451 try later"]), Hook(codes=[500])
    with mail_server(mailbox) as port, web_server(hook) as url:
        notifier = Notifier(settings(node_scp, webhook=url, **mail(port)), node_scp.ledger, clock)
        assert notifier.run_once()
        assert (len(hook.calls), len(mailbox.letters)) == (0, 0)
        hook.codes = [503]
        clock.advance(60)
        assert notifier.run_once()
        assert (len(hook.calls), len(mailbox.letters)) == (0, 1)
        clock.advance(60)
        assert notifier.run_once()
        assert (len(hook.calls), len(mailbox.letters)) == (1, 1)
        clock.advance(9e9)
        assert not notifier.run_once()
    assert hook.asked == 3


def test_servers_that_are_down_are_given_up_in_the_end(node_scp: Node, clock: ManualClock) -> None:
    dead_delivery(node_scp, clock)
    given = settings(
        node_scp, webhook=f"http://127.0.0.1:{reserve_port()}/", **mail(reserve_port())
    )
    notifier = Notifier(given, node_scp.ledger, clock)
    attempts = 0
    for _ in range(200):
        attempts += notifier.run_once()
        clock.advance(60)
    assert attempts == 61, "once a minute for an hour"


def test_without_a_channel_a_notice_is_put_away(node_scp: Node, clock: ManualClock) -> None:
    dead_delivery(node_scp, clock)
    notifier = Notifier(settings(node_scp), node_scp.ledger, clock)
    assert notifier.run_once()
    assert not notifier.run_once()


def test_a_mail_server_that_wants_a_secure_line_and_has_none_is_an_error_not_a_letter(
    node_scp: Node, clock: ManualClock
) -> None:
    with writing(node_scp.ledger) as connection:
        notices.write(connection, event_of(1, clock()), clock())
    mailbox = Mailbox()
    with mail_server(mailbox) as port:
        given = settings(node_scp, smtp_security="starttls", **mail(port))
        assert Notifier(given, node_scp.ledger, clock).run_once()
    assert mailbox.letters == []
    assert notices.claim(node_scp.ledger, lease_s=1, now=clock() + 60)


@pytest.mark.parametrize(
    ("notify", "words"),
    [
        ({"mail_to": ["a@b.example"]}, "needs notify.mail_from"),
        ({"webhook": "ftp://host/"}, "https://HOST"),
        ({"webhook": "https://user:secret@host/"}, "credentials"),
        ({"mail_to": ["a@b\r\nBcc: c@d"]}, "e-mail address"),
    ],
)
def test_settings_that_could_not_work_are_refused(
    node_scp: Node, notify: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        settings(node_scp, **notify)
