"""One connection between two ranks: a line of JSON is a message."""

import json
import os
import queue
import socket
import threading
from contextlib import suppress
from typing import Any

from lora_one.errors import PeerError
from lora_one.harness.distributed.peers.ending import CLOSING_SECONDS
from lora_one.harness.distributed.ranks import rank

Message = dict[str, Any]


class Link:
    """One connection: a line of JSON is a message."""

    def __init__(self, connection: socket.socket, rank: int, host: str) -> None:
        self.rank, self.host = rank, host
        self._socket = connection
        self._file = connection.makefile("rb")
        self._sending = threading.Lock()
        self.values: queue.Queue[Message | None] = queue.Queue()

    def keep(self) -> None:
        """Wait as long as it takes for the next message, but notice a machine that is gone."""
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):  # macOS has not all of them
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Send, if there still is somebody: the reading thread says what came of the other."""
        # The lock is not free where the main thread waits for a peer that reads no more.
        if self._sending.acquire(timeout=CLOSING_SECONDS):
            try:
                with suppress(OSError):
                    self._socket.sendall(json.dumps(message).encode() + b"\n")
            finally:
                self._sending.release()

    def receive(self, limit: int = -1) -> Message | None:
        """Return the next message, or None at the end of the connection."""
        try:
            line = self._file.readline(limit)
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def take(self, call: str) -> Any:
        """Return the value that the other rank sent in the same call as this one's."""
        message = self.values.get()
        if message is None:
            raise PeerError(f"rank {self.rank} on host {self.host} left before {call}")
        if message["call"] != call:
            raise PeerError(
                f"rank {self.rank} is at {message['call']} where rank {rank()} is at {call}"
            )
        return message["value"]

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def drop(self) -> None:
        """Let go of the connection, which stays open in the process that this one came from."""
        os.close(self._socket.detach())
