"""Telling people of what needs them, by webhook and e-mail: never with patient data.

A notice names numbers of the ledger, a destination and a reason in the node's own words; who may
see more looks it up with ``dicom-node deliveries show``.  It is written in the transaction that it
is about and sent from here, each channel until it has taken it.  A destination that does not know
us, or was away for days, kills hundreds of deliveries: the first is told at once, and what follows
within ``notify.bundle_s`` together.
"""

from __future__ import annotations

import json
import smtplib
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any

import requests
from sqlalchemy import Engine

from dicom_node import __version__
from dicom_node.errors import DestinationError, NodeError
from dicom_node.ledger import notices
from dicom_node.ledger.notices import Notice
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings

Clock = Callable[[], float]
Event = Mapping[str, Any]

_log = get_logger(__name__)


class Notifier:
    """Takes what is due about one destination at a time and brings it to each channel."""

    def __init__(self, settings: NodeSettings, engine: Engine, clock: Clock = time.time) -> None:
        self._settings = settings
        self._notify = settings.notify
        self._engine = engine
        self._clock = clock
        self._ways: Mapping[str, Callable[[str, Event], None]] = {
            "webhook": self._post,
            "mail": self._mail,
        }

    def run_once(self) -> bool:
        """Tell of one destination; False when there is nothing to tell."""
        channels = self._notify.channels
        due = notices.claim(
            self._engine,
            lease_s=2 * self._notify.timeout_s * max(1, len(channels)),
            now=self._clock(),
            apart_s=self._notify.bundle_s,
        )
        if not due:
            return False
        why = self._tell(due)
        now = self._clock()
        if not why:
            outcome = notices.TOLD if channels else "nobody is configured to be told"
            notices.finish(self._engine, due, outcome, now)
            return True
        lost = [one for one in due if now - one.created_at >= self._notify.give_up_after_s]
        if lost:
            ids = [one.id for one in lost]
            _log.error("notices given up", action="notify", notices=ids, error=why)
            notices.finish(self._engine, lost, f"given up: {why}", now)
        left = [one for one in due if one not in lost]
        notices.postpone(self._engine, left, now + self._notify.retry_s, why)
        return True

    def _tell(self, due: Sequence[Notice]) -> str:
        """Bring them to the channels that have not taken them; what went wrong, or nothing."""
        told, troubles = {one.id: [*one.told] for one in due}, []
        for channel in self._notify.channels:
            news = [one for one in due if channel not in told[one.id]]
            if not news:
                continue
            # Of the same notices it is the same: who has taken it and could not say so knows it.
            name = str(news[0].id) if len(news) == 1 else f"{news[0].id}x{len(news)}"
            try:
                self._ways[channel](name, self.described([one.event for one in news]))
            except NodeError as error:
                _log.warning("notices not taken", action="notify", error=error.message)
                troubles.append(error.message)
                continue
            for one in news:
                told[one.id].append(channel)
            notices.told(self._engine, news, told)
        return "; ".join(troubles)

    def described(self, events: Sequence[Event]) -> Event:
        """The events as they are sent: of which node, and when in ISO 8601."""
        event = events[0] if len(events) == 1 else bundled(events)
        node = {"node": self._settings.node.ae_title, "version": __version__}
        return {**event, "at": _iso(event["at"]), **node}

    def _post(self, name: str, event: Event) -> None:
        address, token = self._notify.webhook, self._notify.webhook_token
        assert address is not None
        # A receiver that has taken it and could not say so can tell the second from the first.
        headers = {"Idempotency-Key": f"{self._settings.node.ae_title}-{name}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        with requests.Session() as session:
            session.trust_env = False
            session.verify = str(self._settings.tls.ca) if self._settings.tls.ca else True
            try:
                answer = session.post(
                    address,
                    json=event,
                    headers=headers,
                    timeout=self._notify.timeout_s,
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                # The library quotes the address, which may hold a secret.
                raise DestinationError(f"webhook: {type(error).__name__}") from error
        if not 200 <= answer.status_code < 300:
            raise DestinationError(f"webhook: HTTP {answer.status_code}")

    def _mail(self, name: str, event: Event) -> None:
        given = self._notify
        assert given.smtp_host is not None
        try:
            with self._mail_server(given.smtp_host) as server:
                if given.smtp_username is not None and given.smtp_password is not None:
                    server.login(given.smtp_username, given.smtp_password.get_secret_value())
                server.send_message(self._letter(name, event))
        except (smtplib.SMTPException, OSError) as error:
            code = getattr(error, "smtp_code", "")
            raise DestinationError(f"mail: {type(error).__name__} {code}".rstrip()) from error

    def _mail_server(self, host: str) -> smtplib.SMTP:
        given, limit = self._notify, self._notify.timeout_s
        if given.smtp_security == "tls":
            return smtplib.SMTP_SSL(
                host, given.smtp_port, timeout=limit, context=self._secure_context()
            )
        server = smtplib.SMTP(host, given.smtp_port, timeout=limit)
        if given.smtp_security == "starttls":
            try:
                server.starttls(context=self._secure_context())
            except BaseException:
                server.close()
                raise
        return server

    def _secure_context(self) -> ssl.SSLContext:
        ca = self._settings.tls.ca
        return ssl.create_default_context(cafile=str(ca) if ca else None)

    def _letter(self, name: str, event: Event) -> EmailMessage:
        letter = EmailMessage()
        node = self._settings.node.ae_title
        letter["Subject"] = f"{node}: {_title(event)}"
        letter["From"] = self._notify.mail_from
        letter["To"] = ", ".join(self._notify.mail_to)
        host = str(self._notify.mail_from).rpartition("@")[2]
        letter["Message-ID"] = f"<notice-{name}-{int(event_second(event))}@{host}>"
        letter["Auto-Submitted"] = "auto-generated"
        letter.set_content(f"{_title(event)}.\n\n{json.dumps(event, indent=2)}\n{_ADVICE}")
        return letter


_ADVICE = """
See dicom-node deliveries show ID and dicom-node destinations list; what is mended is sent by
dicom-node deliveries retry ID.
"""


def event_second(event: Event) -> float:
    """When it happened, in seconds since 1970 UTC."""
    return datetime.fromisoformat(event["at"]).timestamp()


def bundled(events: Sequence[Event]) -> Event:
    """Several deaths at one destination as one event: numbers, and how often each reason."""
    return {
        "event": "deliveries_dead",
        "destination": events[0]["destination"],
        "deliveries": [event["delivery"] for event in events],
        "reasons": dict(Counter(event["reason"] for event in events)),
        "stored": sum(event["stored"] for event in events),
        "instances": sum(event["instances"] for event in events),
        "at": max(event["at"] for event in events),
    }


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _title(event: Event) -> str:
    counts = f"({event['stored']} of {event['instances']} stored)"
    to = event["destination"]
    if "deliveries" in event:
        return f"{len(event['deliveries'])} deliveries to {to} are dead {counts}"
    return f"delivery {event['delivery']} to {to} is dead {counts}"
