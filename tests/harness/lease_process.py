"""A process that wants leases, for test_lease.py.

race FOLDER WHEN COUNT   claim every lease 0..COUNT-1 below FOLDER at once with others, keep them
                         until a line comes, and print which were won
hold FOLDER FILE         acquire one lease and append to FILE while it is held
"""

import errno
import os
import sys
import time
from pathlib import Path

from lora_one.errors import RunHeldError
from lora_one.harness.records.lease import Watch, acquire, claim


def race(folder: Path, when: float, count: int) -> None:
    won = []
    for number in range(count):
        while time.time() < when + 0.02 * number:
            pass
        try:
            claim(Watch(folder / str(number)))
            won.append(number)
        except RunHeldError:
            pass
    print(*won, flush=True)
    sys.stdin.readline()


def hold(folder: Path, file: Path) -> None:
    lease = acquire(folder)
    print("held", flush=True)
    while True:
        lease.verify()
        with file.open("a") as stream:
            stream.write("x")
        time.sleep(0.005)


def refuse_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


if __name__ == "__main__":
    if os.environ.get("NO_LINKS"):
        Path.hardlink_to = refuse_links
    command, folder, *rest = sys.argv[1:]
    if command == "race":
        race(Path(folder), float(rest[0]), int(rest[1]))
    else:
        hold(Path(folder), Path(rest[0]))
