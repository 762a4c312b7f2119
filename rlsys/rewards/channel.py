"""Messages over a socket between a reward pool and its worker processes."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_HEADER = struct.Struct("!Q")
_READ = 1 << 18


class Channel:
    """Python objects over a connected stream socket, several a read. For a process and its own children only."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self._buffer = bytearray()

    def send(self, message: Any) -> None:
        """Raises OSError where the other side is gone, or does not read within the socket's timeout."""
        data = pickle.dumps(message, protocol=5)
        self.sock.sendall(_HEADER.pack(len(data)) + data)

    def receive(self) -> list[Any]:
        """The messages that one read completes, perhaps none; waits until there is something to read.

        Raises:
            EOFError: the other side is gone.
        """
        try:
            data = self.sock.recv(_READ)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self._buffer += data
        messages, start = [], 0
        while len(self._buffer) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + size
            if len(self._buffer) < end:
                break
            messages.append(pickle.loads(self._buffer[start + _HEADER.size : end]))  # noqa: S301 (own child or parent)
            start = end
        del self._buffer[:start]
        return messages
