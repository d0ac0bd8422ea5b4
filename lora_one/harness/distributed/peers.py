"""The ranks of one command talk to each other; no torch, so that they can before it is loaded.

Rank 0 listens, the others connect, and the connections stay open while the command runs. They
carry lines of JSON: values that all ranks agree on, and how each rank ends. A connection that
closes without a goodbye is a rank that died. Whatever ends one rank ends all of them within
seconds, also those whose main thread waits in a collective for what will not come: a thread of
its own reads each connection, closes what is open (``on_end``) and ends the process.
"""

import hashlib
import hmac
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn

from lora_one.errors import InputError, NonFiniteError, PeerError, PreemptedError
from lora_one.harness.distributed.ranks import POINT, is_main, local_rank, rank, world_size
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, TRY_AGAIN, outcome

JOIN_SECONDS = "LORA_ONE_JOIN_SECONDS"
"""How long ranks wait for each other at the start; large jobs on slow file systems need more."""
DEFAULT_JOIN_SECONDS = 300.0
FIRST_PORT, PORTS = 21504, 11264  # beside those of ranks.port_of
CANDIDATES = 8
HELLO_SECONDS, LONGEST_HELLO = 5.0, 4096
# An error that another rank's end causes here is seen about when that end is.
ECHO_SECONDS = 1.0
# A preempted rank is not hurried: the others may still be writing their checkpoints.
PREEMPTION_SECONDS = 300.0
CLOSING_SECONDS = 5.0  # for records and children, before a rank is ended from outside
# How long the main thread of rank 0 has to come to the same end as another rank.
PATIENCE = {TRY_AGAIN: PREEMPTION_SECONDS, BAD_INPUT: 5.0}
GOODBYE_SECONDS = 60.0
# Errors that come from the rank that raises them, never from the end of another one.
OWN = (InputError, NonFiniteError, PreemptedError, PeerError)
EXPECTED = (*OWN, KeyboardInterrupt)

Message = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        rank: Which.
        host: On which machine.
        status: Its exit status.
        word: Introduces the message, such as ``failed``.
        type: Name of the exception; None for a rank that died.
        message: Why.
        traceback: Where.
    """

    rank: int
    host: str
    status: int
    word: str
    type: str | None
    message: str
    traceback: str

    def __str__(self) -> str:
        told = self.message if self.status == BAD_INPUT else f"{self.type}: {self.message}"
        who = f"rank {self.rank} on host {self.host}"
        return f"{who} {self.message}" if self.type is None else f"{who}: {told}"


OnEnd = Callable[[Ending], Any]


def share(value: Any) -> Any:
    """Return rank 0's value, which JSON can hold, on every rank."""
    return value if world_size() == 1 else _channel().share(value)


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order, on every rank."""
    return [value] if world_size() == 1 else _channel().gather(value)


def agree(what: str, value: Any) -> None:
    """Require that all ranks hold equal values, and wait until they have said so.

    Raises:
        InputError: on all ranks; it names the first rank and key that differ.
    """
    text = json.dumps(value, sort_keys=True)
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    expected = share(value)
    for other, difference in enumerate(gather(_first_difference(expected, json.loads(text)))):
        if difference is not None:
            key, here, there = difference
            raise InputError(
                f"the ranks disagree on the {what}: {key} is {here} on rank 0 and {there} on rank "
                f"{other}. Start all ranks with the same command, files and environment."
            )


def attend(error: BaseException) -> None:
    """Call where an error arrives, before it is written down.

    Returns if this rank is to end by it. If it is only the echo of another rank's end, this does
    not return: that end is what is recorded and shown, and then the process goes.
    """
    if _state.channel is not None:
        _state.channel.attend(error)


@contextmanager
def on_end(close: OnEnd) -> Iterator[None]:
    """Have ``close`` called, in another thread, when another rank's end ends this process."""
    _state.closers.append(close)
    try:
        yield
    finally:
        _state.closers.remove(close)


@contextmanager
def together() -> Iterator[None]:
    """Connect the ranks of this command, and let them end together.

    Raises:
        PeerError: ranks did not come in time.
    """
    if world_size() == 1:
        yield
        return
    channel = _Main() if is_main() else _Other()
    _state.channel = channel
    try:
        channel.open()
        yield
    except BaseException as error:
        channel.leave(error)
        raise
    else:
        channel.leave(None)
    finally:
        _state.channel = None
        channel.close()


def settle_port() -> None:
    """Let MASTER_PORT be one that is free where rank 0 runs, unless the launcher holds it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = int(os.environ["MASTER_PORT"])
    if is_main() and not _is_free(port):
        port = next(filter(_is_free, _ports("store", 64)), port)
    os.environ["MASTER_PORT"] = str(share(port))


class _State:
    """What there is one of in a process."""

    channel: "_Channel | None" = None
    closers: list[OnEnd]

    def __init__(self) -> None:
        self.closers = []

    def forget(self) -> None:
        """Let a forked child not keep the connections open: their closing says that we died."""
        if self.channel is not None:
            for link in self.channel.links():
                link.drop()
            self.channel = None


_state = _State()
os.register_at_fork(after_in_child=_state.forget)


def _channel() -> "_Channel":
    if _state.channel is None:
        raise RuntimeError("the ranks are not connected: call this inside peers.together()")
    return _state.channel


class _Link:
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


class _Channel(ABC):
    """What rank 0's end of the connections and the others' have in common."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self._calls = 0
        self._attended: BaseException | None = None

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def share(self, value: Any) -> Any: ...

    @abstractmethod
    def gather(self, value: Any) -> list[Any]: ...

    @abstractmethod
    def attend(self, error: BaseException) -> None: ...

    @abstractmethod
    def leave(self, error: BaseException | None) -> None: ...

    @abstractmethod
    def links(self) -> list[_Link]: ...

    def close(self) -> None:
        for link in self.links():
            link.close()

    def _call(self, name: str) -> str:
        self._calls += 1
        return f"{name} {self._calls}"

    def _ending(self, error: BaseException) -> Ending:
        status, word = outcome(error)
        lines = "".join(traceback.format_exception(error))
        return Ending(
            rank(), self.host, status, word, type(error).__name__, _one_line(error), lines
        )

    def _end(self, ending: Ending, *, show: bool) -> None:
        """Close what is open, say why, and leave nothing that could hang."""
        for close in list(_state.closers):
            # In a thread of its own: a file system that hangs must not keep the others waiting.
            closer = threading.Thread(target=close, args=(ending,), daemon=True)
            closer.start()
            closer.join(CLOSING_SECONDS)
        if show:
            if ending.type not in {None, *(kind.__name__ for kind in EXPECTED)}:
                print(ending.traceback, end="", file=sys.stderr)
            print(f"{ending.word}: {ending}", file=sys.stderr, flush=True)


class _Main(_Channel):
    """Rank 0: listens, passes values on, and decides what ended the command."""

    def __init__(self) -> None:
        super().__init__()
        self._links: dict[int, _Link] = {}
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
        with _deaf():
            if not isinstance(error, OWN):
                self._heard.wait(ECHO_SECONDS)
            with self._lock:
                first = self._first
                self._goes_on = first is None or first.type == type(error).__name__
                self._first = first or self._ending(error)
                self._decided.set()
            if not self._goes_on:
                _wait_for_the_end()
        self._attended = error

    def leave(self, error: BaseException | None) -> None:
        """End all ranks with this one's status, or wait until they have ended well."""
        if error is not None:
            self.attend(error)
            status = outcome(error)[0]
            self._say_all("end", status)
            _exit_later(status)
            return
        deadline = time.monotonic() + GOODBYE_SECONDS
        with self._joined:
            while len(self._left) < len(self._links) and time.monotonic() < deadline:
                self._joined.wait(1.0)
        with self._lock:
            self._goes_on = self._first is None
            self._decided.set()
        if not self._goes_on:
            _wait_for_the_end()
        self._say_all("goodbye", DONE)

    def links(self) -> list[_Link]:
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
        for port in _ports("peers"):
            try:
                return _server(port)
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
        link = _Link(connection, -1, "")
        try:
            hello = link.receive(LONGEST_HELLO) or {}
            link.rank, link.host = int(hello["rank"]), str(hello["host"])
            known = hmac.compare_digest(str(hello["token"]), _token("hello"))
        except (ValueError, TypeError, LookupError, RecursionError):
            known = False
        with self._joined:
            if not known or link.rank not in range(1, world_size()) or link.rank in self._links:
                link.close()
                return
            link.keep()
            link.send(token=_token("welcome"), host=self.host)
            self._links[link.rank] = link
            self._joined.notify_all()
        self._read(link)

    def _read(self, link: _Link) -> None:
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
        self._end(ending, show=True)
        self._say_all("end", ending.status)
        _exit_now(ending.status)


class _Other(_Channel):
    """Any rank but 0."""

    def __init__(self) -> None:
        super().__init__()
        self._link: _Link | None = None
        self._released = threading.Event()  # rank 0 needs this rank no more
        self._told = threading.Event()  # rank 0 has ended the command
        self._over = threading.Event()  # the main thread has come to its own end

    def open(self) -> None:
        """Find rank 0, which listens on one of a few ports."""
        seconds = join_seconds()
        deadline, pause = time.monotonic() + seconds, 0.02
        address, reason = os.environ["MASTER_ADDR"], "no answer"
        while self._link is None:
            for port in _ports("peers"):
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
        with _deaf():
            if not isinstance(error, OWN):
                # If it is the echo of another rank's end, rank 0 says so now.
                self._told.wait(ECHO_SECONDS)
                if self._told.is_set():
                    self._over.set()
                    _wait_for_the_end()
            ending = self._ending(error)
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
            _exit_later(outcome(error)[0])
            return
        self._link.send(kind="leave", ending=None)
        self._released.wait()

    def links(self) -> list[_Link]:
        """Return the connection to rank 0."""
        return [] if self._link is None else [self._link]

    def _greet(self, address: str, port: int) -> _Link:
        connection = socket.create_connection((address, port), timeout=HELLO_SECONDS)
        link = _Link(connection, 0, "")
        link.send(token=_token("hello"), rank=rank(), host=self.host)
        try:
            welcome = link.receive(LONGEST_HELLO)
            if welcome is None or not hmac.compare_digest(welcome["token"], _token("welcome")):
                raise ValueError(f"port {port} belongs to another program")
            link.host = str(welcome["host"])
        except BaseException:
            link.close()
            raise
        return link

    def _read(self, link: _Link) -> None:
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
            self._end(self._of_rank_0(link, status, "ended the command"), show=False)
            _exit_now(status)
        if self._over.is_set():
            return
        death = self._of_rank_0(link, FAILED, "ended without a word (killed, or out of memory?)")
        self._end(death, show=_speaks())
        _exit_now(FAILED)

    def _of_rank_0(self, link: _Link, status: int, message: str) -> Ending:
        return Ending(0, link.host, status, "failed", None, message, "")


def join_seconds() -> float:
    """Return how long ranks wait for each other at the start.

    Raises:
        InputError: the environment says something that is no number of seconds.
    """
    text = os.environ.get(JOIN_SECONDS, str(DEFAULT_JOIN_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"{JOIN_SECONDS}={text}: expected a number of seconds.")
    return seconds


def _first_difference(expected: Any, found: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return the first key (``model.learning_rate``) that differs, and both values."""
    if isinstance(expected, list) and isinstance(found, list):
        expected, found = dict(enumerate(expected)), dict(enumerate(found))
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        if expected == found:
            return None
        return key or "it", json.dumps(expected), json.dumps(found)
    missing = object()
    for name in dict.fromkeys([*expected, *found]):
        path = f"{key}.{name}" if key else str(name)
        here, there = expected.get(name, missing), found.get(name, missing)
        if here is missing or there is missing:
            return path, *("missing" if side is missing else "given" for side in (here, there))
        if (difference := _first_difference(here, there, path)) is not None:
            return difference
    return None


def _identity() -> str:
    """What the ranks of one command have in common and no other command has."""
    names = (
        *("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", POINT),
    )
    return json.dumps([os.environ.get(name, "") for name in names])


def _token(purpose: str) -> str:
    return hashlib.sha256(f"{purpose} {_identity()}".encode()).hexdigest()


def _ports(purpose: str, count: int = CANDIDATES) -> Iterator[int]:
    """Return ports that all ranks find by themselves, and that other commands hardly do."""
    start = int(_token(purpose)[:12], 16)
    # A stride that is prime to the range, so that commands that share one port share no second.
    stride = 1 + 2 * (start // PORTS % 1000)
    taken = int(os.environ["MASTER_PORT"])
    ports = (FIRST_PORT + (start + index * stride) % PORTS for index in range(count))
    return (port for port in ports if port != taken)


def _server(port: int) -> socket.socket:
    address = os.environ["MASTER_ADDR"]
    if address in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _is_free(port: int) -> bool:
    """Tell whether torch's store, which listens on all interfaces, can have the port."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError:
        return False
    return True


def _speaks() -> bool:
    """One rank of each node says it where rank 0 cannot; on rank 0's own node that is rank 1."""
    return rank() == 1 or (local_rank() == 0 and rank() != 0)


def _ranks(numbers: Sequence[int]) -> str:
    word = "rank" if len(numbers) == 1 else "ranks"
    return f"{word} {', '.join(str(number) for number in numbers)}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""


@contextmanager
def _deaf() -> Iterator[None]:
    """Take no signals for the moments in which it is decided how the command ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _wait_for_the_end() -> NoReturn:
    """Another thread is closing the record and will end the process."""
    while True:
        time.sleep(60)


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # The main thread may be in a collective that never ends; nothing else would end it.
    os._exit(status)


def _exit_later(status: int) -> None:
    """Make sure that a failed rank ends, also if its communicator does not let it go."""
    timer = threading.Timer(4 * CLOSING_SECONDS, partial(os._exit, status))
    timer.daemon = True
    timer.start()
