"""The ranks of one command talk to each other; no torch, so that they can before it is loaded.

Rank 0 listens, the others connect, and the connections stay open while the command runs. They
carry lines of JSON: values that all ranks agree on, and how each rank ends. A connection that
closes without a goodbye is a rank that died. Whatever ends one rank ends all of them within
seconds, also those whose main thread waits in a collective for what will not come: a thread of
its own reads each connection, closes what is open (``on_end``) and ends the process.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_one.errors import InputError
from lora_one.harness.distributed.peers.channel import Channel, Main, Other
from lora_one.harness.distributed.peers.ending import Ending, on_end
from lora_one.harness.distributed.peers.meeting import is_free, ports
from lora_one.harness.distributed.ranks import is_main, world_size

__all__ = ["Ending", "agree", "attend", "gather", "on_end", "settle_port", "share", "together"]


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
def together() -> Iterator[None]:
    """Connect the ranks of this command, and let them end together.

    Raises:
        PeerError: ranks did not come in time.
    """
    if world_size() == 1:
        yield
        return
    channel = Main() if is_main() else Other()
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
    if is_main() and not is_free(port):
        port = next(filter(is_free, ports("store", 64)), port)
    os.environ["MASTER_PORT"] = str(share(port))


class _State:
    """What there is one of in a process."""

    channel: Channel | None = None

    def forget(self) -> None:
        """Let a forked child not keep the connections open: their closing says that we died."""
        if self.channel is not None:
            for link in self.channel.links():
                link.drop()
            self.channel = None


_state = _State()
os.register_at_fork(after_in_child=_state.forget)


def _channel() -> Channel:
    if _state.channel is None:
        raise RuntimeError("the ranks are not connected: call this inside peers.together()")
    return _state.channel


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
