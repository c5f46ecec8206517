"""The limit: a socket to a file with the flushes that a durable receiver cannot do without.

    python -m benchmarks.limit PORT FOLDER

For each instance: a length and the file on a raw socket; a temporary file, rename, fsync of file
and folder at once, then one record appended to a journal, as a row is, which nobody waits for; one
octet back.  No DICOM, no digest, no check, one process for each connection.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

from dicom_node.flushing import flush_together


def main() -> None:
    """Serve until killed."""
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    for name in ("temporary", "kept"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    server = socket.create_server(("127.0.0.1", port), backlog=64)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            _serve(connection, folder)
            os._exit(0)
        connection.close()
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _serve(connection: socket.socket, folder: Path) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(1 << 20))
    entries = os.open(folder / "kept", os.O_RDONLY)
    journal = os.open(folder / f"journal-{os.getpid()}", os.O_CREAT | os.O_WRONLY, 0o600)
    number = 0
    while header := connection.recv(4, socket.MSG_WAITALL):
        (left,) = struct.unpack(">L", header)
        name = f"{os.getpid()}-{number}"
        number += 1
        file = os.open(folder / "temporary" / name, os.O_CREAT | os.O_WRONLY, 0o600)
        while left:
            count = connection.recv_into(buffer, min(left, len(buffer)))
            os.write(file, buffer[:count])
            left -= count
        os.rename(folder / "temporary" / name, folder / "kept" / name)
        if any(flush_together((file, entries))):
            raise SystemExit("the disk does not flush")
        os.close(file)
        os.write(journal, bytes(4096))
        connection.sendall(b"\0")


if __name__ == "__main__":
    main()
