"""Who is doing a run: a lease in the shared folder, for processes on any machines.

It has to work on NFS and between machines whose clocks disagree, so it trusts neither file locks
nor times in files. What it does trust: creating a file exclusively has one winner, and a process
can measure seconds on its own clock.

``<output_dir>/leases/<run_id>/`` holds *generations*, files named 1, 2, 3...; the highest one says
who has the run. It never changes. Every step is the exclusive creation of the next generation:

- claim:     the highest generation names nobody (or there is none); the next one names me
- take over: the highest one's holder is dead; the next one names me
- hand over: the highest one's holder has given me its token; the next one names me
- release:   the highest one names me; the next one names nobody

So of several processes that try the same step one succeeds, and a process that dies between two
steps leaves a folder in which somebody can go on. The holder rewrites a counter,
``<token>.beat``, from a thread of its own. An observer calls it dead when generation and counter
have not changed for ``expiry`` seconds of the observer's own clock; or at once, when the holder
was a process of this machine and is gone.

A holder that was suspended for longer than that finds a higher generation when it wakes. Its
process then ends at once (see ``stop_this_process``), and ``Lease.verify``, called before
every write, lets nothing through that the thread did not get to see first.
"""

import errno
import os
import platform
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_one.errors import InputError, RunHeldError
from lora_one.harness.console import say
from lora_one.harness.exit_status import TRY_AGAIN
from lora_one.harness.records.folder import write_atomically

EXPIRY = 60.0
EXPIRY_VARIABLE = "LORA_ONE_LEASE_EXPIRY"
BEATS_PER_EXPIRY = 6
LOOKS_PER_EXPIRY = 30
# Tells a child the token of the lease that its parent took for it.
TOKEN_VARIABLE = "LORA_ONE_LEASE"  # noqa: S105 (the name of a variable, no secret)

# What link() says where the file system has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

OnLoss = Callable[[str], None]


def lease_folder(output_dir: str | Path, run_id: str) -> Path:
    """Return where the lease of a run lies.

    Not in the run folder: a run that does not exist yet can be claimed, and a run folder can be
    emptied or deleted without touching who is at it.
    """
    return Path(output_dir) / "leases" / run_id


def expiry_seconds() -> float:
    """Return after how many seconds without a heartbeat this process's leases expire.

    Of the environment, not of the configuration: it is about the file system, not about the run.
    A lease carries its own, so processes with different values understand each other.

    Raises:
        InputError: if ``LORA_ONE_LEASE_EXPIRY`` is not a number above 0.
    """
    given = os.environ.get(EXPIRY_VARIABLE)
    if given is None:
        return EXPIRY
    with suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return float(given)
    raise InputError(f"{EXPIRY_VARIABLE}={given}: expected a number of seconds above 0.")


class Holder(BaseModel):
    """The process that a generation names; what is unknown is None."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    token: str = Field(description="tells this lease from every other")
    host: str | None = Field(None, description="name of the machine, for people")
    pid: Annotated[int, Field(gt=0)] | None = Field(None, description="process id there")
    job: str | None = Field(None, description="SLURM job")
    since: str | None = Field(None, description="when it took the lease, by its clock, for people")
    expiry: Annotated[float, Field(gt=0)] = Field(
        EXPIRY, description="dead after this many seconds without a heartbeat"
    )
    machine: str | None = Field(None, description="a boot of a machine, and its process table")
    started: str | None = Field(None, description="tells it from a later process with its id")

    @classmethod
    def here(cls) -> Self:
        """Describe this process, as the holder of a new lease."""
        return cls(
            token=uuid.uuid4().hex,
            host=platform.node(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            expiry=expiry_seconds(),
            machine=_machine(),
            started=(_process_state(os.getpid()) or (None, None))[1],
        )

    @property
    def name(self) -> str:
        """Name the process for people."""
        if self.host is None:
            return "a process that left no name"
        return f"{self.host}, process {self.pid}" + (f", job {self.job}" if self.job else "")

    @property
    def is_local(self) -> bool:
        """Tell whether this machine can see the process."""
        return self.machine is not None and self.machine == _machine() and self.pid is not None

    @property
    def is_gone(self) -> bool:
        """Tell whether this was a process of this machine that has ended."""
        if not self.is_local:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's, so it is there
        state = _process_state(self.pid)
        # A zombie (Z, X) has ended; only its parent has not asked yet.
        return state is not None and (state[0] in "ZX" or state[1] != self.started)


class Generation(BaseModel):
    """What a generation's file holds."""

    holder: Holder | None


def _machine() -> str | None:
    """Identify this boot of this machine, and the namespace in which process ids hold."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return None  # not Linux: leases expire by their heartbeat alone


def _process_state(pid: int) -> tuple[str, str] | None:
    """Return a process's state and start time; None where they cannot be seen."""
    try:
        # The second field, the command, is in parentheses and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None


@dataclass(frozen=True)
class Sight:
    """What one look at a lease shows.

    Attributes:
        generation: The highest; 0 where there is none.
        holder: Who has the run; None: nobody.
        beat: The holder's counter as it is in the file; None where there is none yet.
        beat_age: Seconds since the last heartbeat, for people: the clocks of two machines differ.
    """

    generation: int
    holder: Holder | None
    beat: str | None
    beat_age: float | None

    def __str__(self) -> str:
        if self.holder is None:
            return "nobody"
        since = "" if self.holder.since is None else f", since {self.holder.since}"
        age = "" if self.beat_age is None else f", last heartbeat {self.beat_age:.0f} s ago"
        return f"{self.holder.name}{since}{age}"


def look(folder: Path) -> Sight:
    """Read a lease as it is now."""
    while generation := _highest(folder):
        named = _read(folder / str(generation))
        if named is None:
            continue  # cleared up since, so there is a higher one, or the folder is gone
        holder = _parse(named[0], generation)
        if holder is None:
            return Sight(generation, None, None, None)
        # Until the first heartbeat, the generation itself is the sign of life.
        beat, changed = _read_beat(folder, holder) or (None, named[1])
        return Sight(generation, holder, beat, max(0.0, time.time() - changed))
    return Sight(0, None, None, None)


def _highest(folder: Path) -> int:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return 0
    highest = max((int(name) for name in names if name.isdecimal()), default=0)
    # NFS may show an old list; a file that is asked for by name is the server's answer.
    while (folder / str(highest + 1)).exists():
        highest += 1
    return highest


def _read(file: Path) -> tuple[str, float] | None:
    """Return a small file's text and time; opened anew, which is what makes NFS look again."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(), os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _parse(text: str, generation: int) -> Holder | None:
    """Return whom a generation names.

    A torn file (a process died in creating it, where there are no links) names an unknown process
    that has no heartbeat: it holds the run until it expires.
    """
    try:
        return Generation.model_validate_json(text).holder
    except ValidationError:
        return Holder(token=f"unknown-{generation}")


def _beat_file(folder: Path, token: str) -> Path:
    return folder / f"{token}.beat"


def _read_beat(folder: Path, holder: Holder) -> tuple[str, float] | None:
    return _read(_beat_file(folder, holder.token))


Life = Literal["free", "alive", "uncertain", "dead"]


class Watch:
    """One process's observation of a lease: time passes between its looks.

    Args:
        folder: The lease's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.life: Life = "free"
        self._signs: tuple[str, str | None] | None = None
        self._since = 0.0
        self._moved = False

    def look(self) -> Sight:
        """Look again, and judge in ``life`` by what has changed since the earlier looks.

        ``free``: nobody holds the run. ``dead``: its holder is. ``alive``: the holder is a process
        of this machine, or has moved. ``uncertain``: it is on another machine, and has neither
        moved nor been still for long enough.
        """
        before = time.monotonic()
        sight = look(self.folder)
        self.life = self._judge(sight, before)
        return sight

    def _judge(self, sight: Sight, before: float) -> Life:
        if sight.holder is None:
            return "free"
        if sight.holder.is_gone:
            return "dead"
        signs = (sight.holder.token, sight.beat)
        if signs != self._signs:
            self._moved = self._signs is not None and self._signs[0] == sight.holder.token
            # The change may have come as late as the end of this look.
            self._signs, self._since = signs, time.monotonic()
        elif before - self._since >= sight.holder.expiry:
            return "dead"
        return "alive" if self._moved or sight.holder.is_local else "uncertain"


class Lease:
    """A run that is this process's until it is released; a context manager that releases it.

    ``claim`` and ``acquire`` make one.

    Args:
        folder: The lease's folder.
        generation: The generation that names this process.
        holder: This process.
        on_loss: What to do, with a message, when somebody else has taken the run over.
    """

    def __init__(self, folder: Path, generation: int, holder: Holder, on_loss: OnLoss) -> None:
        self.token = holder.token
        self._folder = folder
        self.generation = generation
        self._expiry = holder.expiry
        self._on_loss = on_loss
        self._count = 0
        self._renewed = _clock()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def verify(self) -> None:
        """Make sure that the run is still this process's; call before every write.

        It costs nothing while the heartbeat goes on: nobody can have taken over a lease that was
        renewed less than an expiry ago, and half of that leaves time for the write.

        Raises:
            OSError: if the lease had to be renewed and could not be.
        """
        if _clock() - self._renewed >= self._expiry / 2:
            self.renew()

    def renew(self) -> None:
        """Give a sign of life, and look whether somebody has taken over."""
        with self._lock:
            if self._ended.is_set():
                return
            start = _clock()
            self._count += 1
            # A folder that is gone is a lease that is lost, which is seen below.
            with suppress(FileNotFoundError):
                write_atomically(_beat_file(self._folder, self.token), f"{self._count}\n")
            # In this order: the write makes NFS forget what it knew of the folder.
            if not self._is_mine():
                self._ended.set()
                _beat_file(self._folder, self.token).unlink(missing_ok=True)
                self._on_loss(self._describe_loss())
            self._renewed = start

    def release(self) -> None:
        """Give the run back; what is left is one small file, the generation that names nobody.

        A lease that cannot be released ends all the same: with the process, or by expiring.
        """
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
        self._thread.join()
        with suppress(OSError):
            leftovers = list(self._folder.iterdir())
            if self._is_mine() and _create(self._folder, self.generation + 1, None):
                for entry in leftovers:
                    entry.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._expiry / BEATS_PER_EXPIRY):
            # The file system may be away for a moment. If it stays away, verify() says so.
            with suppress(OSError):
                self.renew()

    def _is_mine(self) -> bool:
        # The token counts too: the folder may have been deleted and made anew.
        sight = look(self._folder)
        return (
            sight.generation == self.generation
            and sight.holder is not None
            and sight.holder.token == self.token
        )

    def _describe_loss(self) -> str:
        sight = look(self._folder)
        now = f"now: {sight}" if sight.holder else "it is nobody's now"
        return (
            f"{self._folder.name} was taken from process {os.getpid()}, which gave no sign of life "
            f"in {self._folder} for {self._expiry:g} s (suspended?), or that folder was deleted; "
            f"{now}. This process stops without writing anything more."
        )


def _clock() -> float:
    """Return seconds that also count while the machine sleeps, where there is such a clock."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


def stop_this_process(message: str) -> NoReturn:
    """End this process at once, without clearing up.

    Another process owns the run folder, and an exception would unwind through handlers that write
    into it; it would also have to wait for the end of whatever the main thread is writing now.
    """
    try:
        print(f"not done: {message}", file=sys.stderr, flush=True)
    finally:
        os._exit(TRY_AGAIN)


def claim(watch: Watch, *, token: str | None = None, on_loss: OnLoss = stop_this_process) -> Lease:
    """Take the run if it is free or its holder dead by what ``watch`` has seen; do not wait.

    Args:
        watch: The observation of the lease so far.
        token: Whose lease may be taken although it is alive: the one that was taken for us.
        on_loss: What to do when the lease is lost later on.

    Raises:
        RunHeldError: if another process has the run.
        OSError: if the folder cannot be written.
    """
    while True:
        sight = watch.look()
        inherits = sight.holder is not None and sight.holder.token == token
        if watch.life in ("alive", "uncertain") and not inherits:
            raise RunHeldError(
                f"another process is doing {watch.folder.name}: {sight}. Wait for it, or stop it, "
                "or give another output_dir."
            )
        watch.folder.mkdir(parents=True, exist_ok=True)
        holder, generation = Holder.here(), sight.generation + 1
        if not _create(watch.folder, generation, holder):
            continue
        if _highest(watch.folder) != generation:
            # Made a second time: others have come and gone, and cleared up, since that look.
            (watch.folder / str(generation)).unlink(missing_ok=True)
            continue
        lease = Lease(watch.folder, generation, holder, on_loss)
        if watch.life == "dead" and (_read_beat(watch.folder, sight.holder) or (None,))[0] != (
            sight.beat
        ):
            # It woke up in between, and may have looked just before we took its lease. By the end
            # of this it has had to look again.
            time.sleep(sight.holder.expiry / 2)
        return lease


def acquire(
    folder: Path, *, token: str | None = None, on_loss: OnLoss = stop_this_process
) -> Lease:
    """Take the run; wait to see whether a holder on another machine is alive.

    That is clear at its next heartbeat, or when it has expired.

    Raises:
        RunHeldError: if another process has the run and is alive.
        OSError: if the folder cannot be written.
    """
    watch = Watch(folder)
    said = False
    while True:
        try:
            return claim(watch, token=token, on_loss=on_loss)
        except RunHeldError:
            if watch.life == "alive":
                raise
        if not said:
            said = True
            say(f"{folder.name} is held by {look(folder)}; looking whether it is alive")
        time.sleep(expiry_seconds() / LOOKS_PER_EXPIRY)


def _create(folder: Path, generation: int, holder: Holder | None) -> bool:
    """Create a generation, whole and exclusively; False if it is there already."""
    target = folder / str(generation)
    text = Generation(holder=holder).model_dump_json() + "\n"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".claim.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        target.hardlink_to(temporary)
    except FileExistsError:
        # An NFS client whose answer got lost asks again, and finds its own file.
        return holder is not None and (_read(target) or ("",))[0] == text
    except FileNotFoundError:
        return False  # somebody released the run and cleared up the temporary file
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_link(target, text)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return True


def _create_without_link(target: Path, text: str) -> bool:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True
