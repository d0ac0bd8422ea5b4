"""Where the ranks of one command find each other, and how they know each other."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator

from lora_one.errors import InputError
from lora_one.harness.distributed.ranks import POINT

JOIN_SECONDS = "LORA_ONE_JOIN_SECONDS"
"""How long ranks wait for each other at the start; large jobs on slow file systems need more."""
DEFAULT_JOIN_SECONDS = 300.0
FIRST_PORT, PORTS = 21504, 11264  # beside those of ranks.port_of
CANDIDATES = 8


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


def identity() -> str:
    """What the ranks of one command have in common and no other command has."""
    names = (
        *("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", POINT),
    )
    return json.dumps([os.environ.get(name, "") for name in names])


def token(purpose: str) -> str:
    """Return what only a rank of this command can say."""
    return hashlib.sha256(f"{purpose} {identity()}".encode()).hexdigest()


def ports(purpose: str, count: int = CANDIDATES) -> Iterator[int]:
    """Return ports that all ranks find by themselves, and that other commands hardly do."""
    start = int(token(purpose)[:12], 16)
    # A stride that is prime to the range, so that commands that share one port share no second.
    stride = 1 + 2 * (start // PORTS % 1000)
    taken = int(os.environ["MASTER_PORT"])
    ports = (FIRST_PORT + (start + index * stride) % PORTS for index in range(count))
    return (port for port in ports if port != taken)


def server_at(port: int) -> socket.socket:
    """Listen where the other ranks look for rank 0: on this machine alone if all are here."""
    address = os.environ["MASTER_ADDR"]
    if address in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def is_free(port: int) -> bool:
    """Tell whether torch's store, which listens on all interfaces, can have the port."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError:
        return False
    return True
