"""A STOW-RS server for tests that takes nothing which PS3.18 10.5 and RFC 2387 do not allow."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

_IS_DICOM = re.compile(rb"(?i)content-type: *application/dicom\s*(\r\n|$)")

# What a server says of the posted instances: HTTP status and, by SOP Instance UID, their status.
Verdict = tuple[int, dict[str, int]]
Script = Callable[[int, list[str]], "Verdict | tuple[int, bytes]"]


def take_all(number: int, uids: list[str]) -> Verdict:
    """Every instance is stored."""
    return 200, dict.fromkeys(uids, 0x0000)


@dataclass
class StowServer:
    """What came, by request; *script* is asked with the running number of a request (from 1)."""

    script: Script = take_all
    authorization: str | None = None
    stored: dict[str, bytes] = field(default_factory=dict)
    stores: list[str] = field(default_factory=list)
    requests: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        """The address of the service."""
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def answer(self, headers: Message, path: str, body: bytes) -> tuple[int, bytes]:
        """Check a request to the letter, keep what the script stores, and answer."""
        if self.authorization is not None and headers["Authorization"] != self.authorization:
            return 401, b""
        try:
            parts = _parts(headers, path, body)
        except ValueError as error:
            self.problems.append(str(error))
            return 400, b""
        uids = [str(dcmread(BytesIO(part)).SOPInstanceUID) for part in parts]
        self.requests.append(uids)
        code, said = self.script(len(self.requests), uids)
        if isinstance(said, bytes):
            return code, said
        for uid, part in zip(uids, parts, strict=True):
            status = said.get(uid, 0xA700)
            if status == 0 or status & 0xF000 == 0xB000:
                self.stored[uid] = part
                self.stores.append(uid)
        return code, _store_response(said)


def _parts(headers: Message, path: str, body: bytes) -> list[bytes]:
    if path != "/dicom-web/studies":
        raise ValueError(f"path {path}")
    if "application/dicom+json" not in (headers["Accept"] or ""):
        raise ValueError("Accept")
    if headers.get_content_type() != "multipart/related":
        raise ValueError("not multipart/related")
    if headers.get_param("type") != "application/dicom":
        raise ValueError("the type parameter names no application/dicom")
    boundary = str(headers.get_param("boundary")).encode()
    if not re.fullmatch(rb"[0-9a-zA-Z'()+_,\-./:=?]{1,70}", boundary):
        raise ValueError("boundary")
    # RFC 2046 5.1.1: CRLF before each delimiter but the first belongs to it.
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if pieces[0] not in (b"", b"\r\n") or pieces[-1].rstrip() != b"--":
        raise ValueError("a preamble, or no closing delimiter")
    found = []
    for piece in pieces[1:-1]:
        head, separator, content = piece.partition(b"\r\n\r\n")
        if not separator or not re.search(
            rb"(?i)content-type: *application/dicom\s*(\r\n|$)", head
        ):
            raise ValueError("a part that is no application/dicom")
        if content[128:132] != b"DICM":
            raise ValueError("a part that is no PS3.10 file")
        found.append(content)
    if not found:
        raise ValueError("no parts")
    return found


def _store_response(said: dict[str, int]) -> bytes:
    response, stored, failed = Dataset(), [], []
    for uid, status in said.items():
        item = Dataset()
        item.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        item.ReferencedSOPInstanceUID = uid
        if status == 0 or status & 0xF000 == 0xB000:
            if status:
                item.WarningReason = status
            stored.append(item)
        else:
            item.FailureReason = status
            failed.append(item)
    response.ReferencedSOPSequence = Sequence(stored)
    response.FailedSOPSequence = Sequence(failed)
    return json.dumps(response.to_json_dict()).encode()


@contextmanager
def stowing(server: StowServer, *, port: int = 0) -> Generator[StowServer]:
    """Run the server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            code, answer = server.answer(self.headers, self.path, self._body())
            self._send(code, answer)

        def do_GET(self) -> None:
            given = self.headers["Authorization"]
            wanted = server.authorization
            self._send(200 if wanted in (None, given) else 401, b"[]")

        def _body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            body = bytearray()
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(body)

        def _send(self, code: int, answer: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/dicom+json; charset=utf-8")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.port = int(httpd.server_address[1])
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join(10)
        httpd.server_close()
