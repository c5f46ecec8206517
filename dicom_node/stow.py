"""STOW-RS as a client: files to one DICOMweb server, with an answer for each (PS3.18 10.5).

The same words as C-STORE: a Failure Reason is a C-STORE status (PS3.18 I.2.2), so that one table
says what passes and what stays.  Nothing here knows the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import requests
from dicomweb_client.web import DICOMwebClient
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicom_node.dicom.header import quiet_pydicom, text
from dicom_node.errors import DestinationError, DestinationRefusedError, NodeError
from dicom_node.settings import NodeSettings, WebDestination
from dicom_node.storage_scu import EchoResult, Sendable, Sent, classify_status

_DICOM_JSON = "application/dicom+json"
# The socket's time-out holds for one piece; see WebDestination.connect_timeout_s.
_PIECE = 256 * 1024
_STORED, _CANNOT_UNDERSTAND = 0x0000, 0xC000
# What is wrong with a request as a whole may be due to one instance of it.
_OF_ONE = frozenset({400, 413, 415, 422})
_PASSING = frozenset({408, 425, 429})
_REFUSED = {
    401: "it does not accept our credentials",
    403: "we may not store there",
    404: "there is no such service at that address",
    405: "the service at that address does not store",
    501: "it does not implement STOW-RS",
}


@dataclass(frozen=True)
class WebPeer:
    """A DICOMweb server that we store on; time limits in seconds."""

    url: str
    connect_timeout: float = 10.0
    timeout: float = 120.0
    instances_per_request: int = 20
    bytes_per_request: int = 67_108_864
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    credentials: tuple[str, str] | None = field(default=None, repr=False)
    #: PEM files: the authorities that sign the server's certificate, our certificate and its key.
    ca: str | None = None
    certificate: tuple[str, str] | None = None

    @classmethod
    def of(cls, server: WebDestination, settings: NodeSettings) -> WebPeer:
        """The server that a ``[stow.NAME]`` table describes."""
        tls = settings.tls
        shown = server.client_certificate and tls.certificate and tls.key
        token, password = server.token, server.password
        return cls(
            url=server.url,
            connect_timeout=server.connect_timeout_s,
            timeout=server.timeout_s,
            instances_per_request=server.instances_per_request,
            bytes_per_request=server.bytes_per_request,
            headers=(("Authorization", f"Bearer {token.get_secret_value()}"),) if token else (),
            credentials=(
                (server.username, password.get_secret_value())
                if server.username and password
                else None
            ),
            ca=str(tls.ca) if tls.ca else None,
            certificate=(str(tls.certificate), str(tls.key)) if shown else None,
        )

    @property
    def where(self) -> str:
        """The server as an administrator writes it."""
        return self.url


class WebLink:
    """One HTTP session with one server; requests go one after the other.  One thread."""

    def __init__(self, peer: WebPeer) -> None:
        self._peer = peer
        self._session = _session(peer)
        self._answers: list[requests.Response] = []
        self._client = DICOMwebClient(
            peer.url,
            session=self._session,
            headers={"Accept": _DICOM_JSON, **dict(peer.headers)},
            callback=self._keep,
            chunk_size=_PIECE,
            timeout=(peer.connect_timeout, peer.timeout),
        )
        # When to try again is the ledger's business.
        self._client.set_http_retry_params(retry=False)

    def send(self, items: Sequence[Sendable]) -> Generator[Sent]:
        """Store instances in order; an answer for each.

        Raises DestinationError where the server does not take them for now, and
        DestinationRefusedError where it takes nothing from us.
        """
        for batch in _batches(items, self._peer):
            yield from self._store(batch)

    def enough(self) -> None:
        """Nothing: who stops asking for answers ends it, and no request is under way then."""

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    def _store(self, batch: Sequence[Sendable]) -> Iterator[Sent]:
        readable = []
        for item in batch:
            try:
                with quiet_pydicom():
                    readable.append((item, dcmread(item.path)))
            except Exception as error:
                why = f"the file does not parse ({type(error).__name__})"
                yield Sent(item.sop_instance_uid, _CANNOT_UNDERSTAND, "dead", why)
        if not readable:
            return
        answer = self._post([dataset for _, dataset in readable])
        code = answer.status_code
        if code in _OF_ONE and len(readable) > 1:
            for item, _ in readable:
                yield from self._store([item])
            return
        yield from self._judged(answer, [item for item, _ in readable])

    def _judged(self, answer: requests.Response, items: Sequence[Sendable]) -> Iterator[Sent]:
        code, where = answer.status_code, self._peer.where
        told = _statuses(answer)
        if not told:
            if why := _REFUSED.get(code):
                raise DestinationRefusedError(f"{where}: HTTP {code}: {why}")
            if code in _PASSING or code >= 500 or code < 200:
                raise DestinationError(f"{where}: HTTP {code}")
            if 300 <= code < 400:
                raise DestinationRefusedError(f"{where}: HTTP {code}: it is at another address")
            if code == requests.codes.ok:
                # PS3.18 Table 10.5.3-1: all are stored. Some servers say no more than that.
                told = {item.sop_instance_uid: _STORED for item in items}
        for item in items:
            one = _answer(item.sop_instance_uid, told.get(item.sop_instance_uid), code)
            yield replace(one, more_follow=item is not items[-1])

    def _post(self, datasets: Sequence[Dataset]) -> requests.Response:
        """Post one request; its answer, whatever the status."""
        self._answers.clear()
        with _network_errors(self._peer), quiet_pydicom():
            try:
                self._client.store_instances(datasets)
            except (requests.HTTPError, ValueError, KeyError):
                # The status, and a body that is no store response, are judged by us.
                if not self._answers:
                    raise
        if not self._answers:
            raise DestinationError(f"{self._peer.where}: no answer")
        return self._answers[-1]

    def _keep(self, answer: requests.Response, **_: object) -> requests.Response:
        self._answers.append(answer)
        return answer


def _answer(uid: str, status: int | None, code: int) -> Sent:
    if status is not None:
        return Sent(uid, status, classify_status(status), f"answered 0x{status:04X}")
    if code in _OF_ONE:
        return Sent(uid, _CANNOT_UNDERSTAND, "dead", f"HTTP {code}")
    return Sent(uid, None, "retry", f"HTTP {code} does not name the instance")


def check(peer: WebPeer) -> EchoResult:
    """Ask a server for a study that does not exist: whether it is there and lets us in."""
    started = time.monotonic()
    session = _session(peer)
    try:
        with _network_errors(peer):
            answer = session.get(
                f"{peer.url}/studies",
                params={"StudyInstanceUID": "2.25.0", "limit": "1"},
                headers={"Accept": _DICOM_JSON, **dict(peer.headers)},
                timeout=(peer.connect_timeout, peer.timeout),
            )
        code = answer.status_code
        ok = code in (200, 204)
        why = _REFUSED.get(code, "")
        words = "answers" if ok else f"HTTP {code}" + (f": {why}" if why else "")
    except NodeError as error:
        return EchoResult(False, error.message, time.monotonic() - started)
    finally:
        session.close()
    return EchoResult(ok, f"{peer.where}: {words}", time.monotonic() - started)


def _session(peer: WebPeer) -> requests.Session:
    session = requests.Session()
    # Neither proxies nor credentials of the environment: node.toml says all there is.
    session.trust_env = False
    # A redirected POST would come as a GET.
    session.max_redirects = 0
    session.verify = peer.ca or True
    session.cert = peer.certificate
    session.auth = peer.credentials
    return session


@contextmanager
def _network_errors(peer: WebPeer) -> Iterator[None]:
    """Say in words what went wrong below HTTP; the library quotes addresses and queries."""
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise DestinationError(f"{peer.where}: TLS failed ({type(error).__name__})") from error
    except requests.exceptions.ConnectTimeout as error:
        limit = peer.connect_timeout
        raise DestinationError(f"{peer.where}: no connection within {limit:g} s") from error
    except requests.exceptions.Timeout as error:
        raise DestinationError(f"{peer.where}: no answer within {peer.timeout:g} s") from error
    except requests.exceptions.TooManyRedirects as error:
        raise DestinationRefusedError(f"{peer.where}: it is at another address") from error
    except requests.exceptions.ConnectionError as error:
        raise DestinationError(f"{peer.where}: the connection failed or was closed") from error
    except (requests.RequestException, OSError) as error:
        raise DestinationError(f"{peer.where}: {type(error).__name__}") from error


def _batches(items: Sequence[Sendable], peer: WebPeer) -> Iterator[list[Sendable]]:
    batch: list[Sendable] = []
    size = 0
    for item in items:
        more = item.path.stat().st_size if item.path.is_file() else 0
        is_full = len(batch) == peer.instances_per_request or size + more > peer.bytes_per_request
        if batch and is_full:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
    if batch:
        yield batch


def _statuses(answer: requests.Response) -> dict[str, int]:
    """What a store response (PS3.18 I.2) says of each instance; empty where it is none."""
    try:
        with quiet_pydicom():
            response = Dataset.from_json(answer.json())
            stored = {
                text(item, "ReferencedSOPInstanceUID"): int(item.get("WarningReason") or _STORED)
                for item in response.get("ReferencedSOPSequence") or ()
            }
            failed = {
                text(item, "ReferencedSOPInstanceUID"): int(
                    item.get("FailureReason") or _CANNOT_UNDERSTAND
                )
                for item in response.get("FailedSOPSequence") or ()
            }
    except Exception:
        # Whatever a server can answer must not end the worker; its status is judged without it.
        return {}
    return stored | failed
