"""The ends of the connections: rank 0's, which decides, and that of every other rank."""

import hmac
import json
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lora_one.errors import PeerError
from lora_one.harness.distributed.peers.ending import (
    CLOSING_SECONDS,
    OWN,
    Ending,
    close_all,
    deaf,
    ending_by,
    exit_later,
    exit_now,
    wait_for_the_end,
)
from lora_one.harness.distributed.peers.link import Link
from lora_one.harness.distributed.peers.meeting import (
    JOIN_SECONDS,
    join_seconds,
    ports,
    server_at,
    token,
)
from lora_one.harness.distributed.ranks import local_rank, rank, world_size
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, TRY_AGAIN, outcome

HELLO_SECONDS, LONGEST_HELLO = 5.0, 4096
# An error that another rank's end causes here is seen about when that end is.
ECHO_SECONDS = 1.0
# A preempted rank is not hurried: the others may still be writing their checkpoints.
PREEMPTION_SECONDS = 300.0
# How long the main thread of rank 0 has to come to the same end as another rank.
PATIENCE = {TRY_AGAIN: PREEMPTION_SECONDS, BAD_INPUT: 5.0}
GOODBYE_SECONDS = 60.0


class Channel(ABC):
    """What rank 0's end of the connections and the others' have in common."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self._calls = 0
        self._attended: BaseException | None = None

    @abstractmethod
    def open(self) -> None:
        """Connect."""

    @abstractmethod
    def share(self, value: Any) -> Any:
        """Return rank 0's value."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order."""

    @abstractmethod
    def attend(self, error: BaseException) -> None:
        """Return if this rank is to end by the error; else another rank's end came first."""

    @abstractmethod
    def leave(self, error: BaseException | None) -> None:
        """Say how this rank ends."""

    @abstractmethod
    def links(self) -> list[Link]:
        """Return the connections that are open."""

    def close(self) -> None:
        """Hang up."""
        for link in self.links():
            link.close()

    def _call(self, name: str) -> str:
        self._calls += 1
        return f"{name} {self._calls}"


class Main(Channel):
    """Rank 0: listens, passes values on, and decides what ended the command."""

    def __init__(self) -> None:
        super().__init__()
        self._links: dict[int, Link] = {}
        self._joined = threading.Condition()
        self._left: set[int] = set()
        self._lock = threading.Lock()
        self._first: Ending | None = None
        self._heard = threading.Event()  # another rank has ended otherwise than well
        self._decided = threading.Event()  # the main thread has come to its own end
        self._goes_on = False  # and the main thread is to end the command

    def open(self) -> None:
        """Wait for the others."""
        server = self._listen()
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        seconds = join_seconds()
        with server, self._joined:
            self._joined.wait_for(lambda: len(self._links) == world_size() - 1, seconds)
            missing = sorted(set(range(1, world_size())) - self._links.keys())
            with suppress(OSError):  # on some systems only a connected socket can be
                server.shutdown(socket.SHUT_RDWR)
        if missing:
            raise PeerError(
                f"{_ranks(missing)} of {world_size()} did not come to rank 0 on {self.host} within "
                f"{seconds:g} s. See what they say, and whether their machines reach MASTER_ADDR="
                f"{os.environ['MASTER_ADDR']}; {JOIN_SECONDS} sets how long to wait."
            )

    def share(self, value: Any) -> Any:
        """Send a value to all."""
        return self._send_all(self._call("share"), value)

    def gather(self, value: Any) -> list[Any]:
        """Collect the values, and send all of them to all."""
        call = self._call("gather")
        others = [self._links[other].take(call) for other in range(1, world_size())]
        return self._send_all(call, [value, *others])

    def attend(self, error: BaseException) -> None:
        """Decide whether the main thread's error or another rank's end came first."""
        if self._attended is error:
            return
        with deaf():
            if not isinstance(error, OWN):
                self._heard.wait(ECHO_SECONDS)
            with self._lock:
                first = self._first
                self._goes_on = first is None or first.type == type(error).__name__
                self._first = first or ending_by(error, self.host)
                self._decided.set()
            if not self._goes_on:
                wait_for_the_end()
        self._attended = error

    def leave(self, error: BaseException | None) -> None:
        """End all ranks with this one's status, or wait until they have ended well."""
        if error is not None:
            self.attend(error)
            status = outcome(error)[0]
            self._say_all("end", status)
            exit_later(status)
            return
        deadline = time.monotonic() + GOODBYE_SECONDS
        with self._joined:
            while len(self._left) < len(self._links) and time.monotonic() < deadline:
                self._joined.wait(1.0)
        with self._lock:
            self._goes_on = self._first is None
            self._decided.set()
        if not self._goes_on:
            wait_for_the_end()
        self._say_all("goodbye", DONE)

    def links(self) -> list[Link]:
        """Return the connections to all others."""
        return list(self._links.values())

    def _send_all(self, call: str, value: Any) -> Any:
        for link in self._links.values():
            link.send(kind="value", call=call, value=value)
        return json.loads(json.dumps(value))

    def _say_all(self, kind: str, status: int) -> None:
        for link in self._links.values():
            link.send(kind=kind, status=status)

    def _listen(self) -> socket.socket:
        errors = []
        for port in ports("peers"):
            try:
                return server_at(port)
            except OSError as error:
                errors.append(f"{port}: {error.strerror}")
        raise PeerError(
            f"rank 0 on {self.host} cannot listen on any port of its own: {'; '.join(errors)}"
        )

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed: all have come, or the time is up
                return
            # Whoever connects and says nothing must not keep the others out.
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        """Take in a rank of this command; hang up on anybody else."""
        connection.settimeout(HELLO_SECONDS)
        link = Link(connection, -1, "")
        try:
            hello = link.receive(LONGEST_HELLO) or {}
            link.rank, link.host = int(hello["rank"]), str(hello["host"])
            known = hmac.compare_digest(str(hello["token"]), token("hello"))
        except (ValueError, TypeError, LookupError, RecursionError):
            known = False
        with self._joined:
            if not known or link.rank not in range(1, world_size()) or link.rank in self._links:
                link.close()
                return
            link.keep()
            link.send(token=token("welcome"), host=self.host)
            self._links[link.rank] = link
            self._joined.notify_all()
        self._read(link)

    def _read(self, link: Link) -> None:
        """Take what one rank sends, until it leaves or dies."""
        while (message := link.receive()) is not None:
            if message["kind"] == "value":
                link.values.put(message)
                continue
            ending = message["ending"]
            with self._joined:
                self._left.add(link.rank)
                self._joined.notify_all()
            if ending is not None:
                self._hear(Ending(**ending))
            else:
                link.values.put(None)
            return
        death = "ended without a word (killed, or out of memory?)"
        self._hear(Ending(link.rank, link.host, FAILED, "failed", None, death, ""))

    def _hear(self, ending: Ending) -> None:
        """End the command by another rank's end, if nothing else came before.

        What is wrong is often wrong on all ranks: then the main thread says it itself. It is
        given the time to.
        """
        with self._lock:
            if self._first is not None:
                return
            self._first = ending
            self._heard.set()
        self._decided.wait(PATIENCE.get(ending.status, ECHO_SECONDS))
        with self._lock:
            if self._goes_on:
                return
        close_all(ending, show=True)
        self._say_all("end", ending.status)
        exit_now(ending.status)


class Other(Channel):
    """Any rank but 0."""

    def __init__(self) -> None:
        super().__init__()
        self._link: Link | None = None
        self._released = threading.Event()  # rank 0 needs this rank no more
        self._told = threading.Event()  # rank 0 has ended the command
        self._over = threading.Event()  # the main thread has come to its own end

    def open(self) -> None:
        """Find rank 0, which listens on one of a few ports."""
        seconds = join_seconds()
        deadline, pause = time.monotonic() + seconds, 0.02
        address, reason = os.environ["MASTER_ADDR"], "no answer"
        while self._link is None:
            for port in ports("peers"):
                try:
                    self._link = self._greet(address, port)
                    break
                except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
                    # Nobody there yet, or somebody else's program.
                    reason = str(error)
            else:
                if time.monotonic() > deadline:
                    raise PeerError(
                        f"rank {rank()} on {self.host} did not find rank 0 at MASTER_ADDR={address}"
                        f" within {seconds:g} s ({reason}). See what rank 0 says; {JOIN_SECONDS} "
                        "sets how long to wait."
                    )
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)
        self._link.keep()
        threading.Thread(target=self._read, args=(self._link,), daemon=True).start()

    def share(self, value: Any) -> Any:
        """Wait for rank 0's value."""
        return self._link.take(self._call("share"))

    def gather(self, value: Any) -> list[Any]:
        """Send the value, wait for all of them."""
        call = self._call("gather")
        self._link.send(kind="value", call=call, value=value)
        return self._link.take(call)

    def attend(self, error: BaseException) -> None:
        """Report the error to rank 0, which ends all ranks by the first that it hears of."""
        if self._attended is error or self._link is None:
            return
        self._attended = error
        with deaf():
            if not isinstance(error, OWN):
                # If it is the echo of another rank's end, rank 0 says so now.
                self._told.wait(ECHO_SECONDS)
                if self._told.is_set():
                    self._over.set()
                    wait_for_the_end()
            ending = ending_by(error, self.host)
            self._link.send(kind="leave", ending=asdict(ending))
            if ending.status != TRY_AGAIN:
                self._released.wait(3 * CLOSING_SECONDS)

    def leave(self, error: BaseException | None) -> None:
        """Report how this rank ended; after a good end wait for the others."""
        if error is not None:
            if self._link is None and isinstance(error, PeerError) and _speaks():
                print(f"failed: {error}", file=sys.stderr, flush=True)
            self.attend(error)
            self._over.set()
            exit_later(outcome(error)[0])
            return
        self._link.send(kind="leave", ending=None)
        self._released.wait()

    def links(self) -> list[Link]:
        """Return the connection to rank 0."""
        return [] if self._link is None else [self._link]

    def _greet(self, address: str, port: int) -> Link:
        connection = socket.create_connection((address, port), timeout=HELLO_SECONDS)
        link = Link(connection, 0, "")
        link.send(token=token("hello"), rank=rank(), host=self.host)
        try:
            welcome = link.receive(LONGEST_HELLO)
            if welcome is None or not hmac.compare_digest(welcome["token"], token("welcome")):
                raise ValueError(f"port {port} belongs to another program")
            link.host = str(welcome["host"])
        except BaseException:
            link.close()
            raise
        return link

    def _read(self, link: Link) -> None:
        """Take what rank 0 sends, until it ends this rank or dies."""
        while (message := link.receive()) is not None:
            if message["kind"] == "value":
                link.values.put(message)
                continue
            if message["kind"] == "goodbye":
                link.values.put(None)
                self._released.set()
                return
            status = message["status"]
            self._told.set()
            if status == TRY_AGAIN:
                self._over.wait(PREEMPTION_SECONDS)
            close_all(self._of_rank_0(link, status, "ended the command"), show=False)
            exit_now(status)
        if self._over.is_set():
            return
        death = self._of_rank_0(link, FAILED, "ended without a word (killed, or out of memory?)")
        close_all(death, show=_speaks())
        exit_now(FAILED)

    def _of_rank_0(self, link: Link, status: int, message: str) -> Ending:
        return Ending(0, link.host, status, "failed", None, message, "")


def _speaks() -> bool:
    """One rank of each node says it where rank 0 cannot; on rank 0's own node that is rank 1."""
    return rank() == 1 or (local_rank() == 0 and rank() != 0)


def _ranks(numbers: Sequence[int]) -> str:
    word = "rank" if len(numbers) == 1 else "ranks"
    return f"{word} {', '.join(str(number) for number in numbers)}"
