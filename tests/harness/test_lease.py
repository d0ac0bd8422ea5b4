"""One process has a run at a time, whatever happens to processes, machines and clocks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_one.errors import InputError, RunHeldError
from lora_one.harness.records import lease as leases
from lora_one.harness.records.lease import (
    EXPIRY_VARIABLE,
    Holder,
    Sight,
    Watch,
    acquire,
    claim,
    look,
)

PROGRAM = Path(__file__).with_name("lease_process.py")
SECONDS = 0.6  # expiry in tests: heartbeats every 0.1 s
RACES, RACERS = 50, 5


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def started():
    """Start processes that are gone at the end of the test."""
    processes = []

    def keep(*arguments: object, **environment: str) -> subprocess.Popen:
        processes.append(start(*arguments, **environment))
        return processes[-1]

    yield keep
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def short_expiry(monkeypatch):
    monkeypatch.setenv(EXPIRY_VARIABLE, str(SECONDS))


def write_generation(folder: Path, number: int, holder: Holder | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"holder": None if holder is None else holder.model_dump()}
    (folder / str(number)).write_text(json.dumps(content))


def foreign(**changes: object) -> Holder:
    """A holder on a machine that this one cannot see, with this process's id."""
    return Holder.here().model_copy(update={"host": "gpu07", "machine": "gpu07 boot"} | changes)


def gone() -> Holder:
    """A holder on this machine that has ended: somebody else has its process id now."""
    return Holder.here().model_copy(update={"started": "1"})


def fail(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["free", "dead", "dead, no links"])
def test_of_many_processes_that_want_a_lease_one_gets_it(started, tmp_path, kind):
    if kind.startswith("dead"):
        for number in range(RACES):
            write_generation(tmp_path / str(number), 3, gone())
    when = time.time() + 2.0
    environment = {EXPIRY_VARIABLE: "30"} | ({"NO_LINKS": "1"} if "no links" in kind else {})
    racers = [started("race", tmp_path, when, RACES, **environment) for _ in range(RACERS)]
    won = [int(number) for racer in racers for number in racer.stdout.readline().split()]
    assert sorted(won) == list(range(RACES))


@pytest.mark.slow
def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(started, tmp_path):
    holder = started("hold", tmp_path / "run", tmp_path / "file", **{EXPIRY_VARIABLE: "3600"})
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunHeldError, match=f"process {holder.pid}, since .*, last heartbeat"):
        acquire(tmp_path / "run")
    holder.kill()
    while look(tmp_path / "run").holder.is_gone is False:  # its parent has not reaped it yet
        time.sleep(0.01)
    with acquire(tmp_path / "run", on_loss=fail):
        assert look(tmp_path / "run").holder.pid == os.getpid()


@pytest.mark.slow
def test_a_suspended_process_that_lost_its_lease_writes_nothing_when_it_wakes(started, tmp_path):
    file = tmp_path / "file"
    holder = started("hold", tmp_path / "run", file)
    assert holder.stdout.readline() == "held\n"
    while not file.exists():
        time.sleep(0.01)
    holder.send_signal(signal.SIGSTOP)
    watch = Watch(tmp_path / "run")
    began = time.monotonic()
    while watch.look() and watch.life != "dead":
        time.sleep(0.02)
    assert time.monotonic() - began >= SECONDS
    with claim(watch, on_loss=fail):
        written = file.stat().st_size
        holder.send_signal(signal.SIGCONT)
        _, said = holder.communicate(timeout=20)
        assert holder.returncode == 75
        assert file.stat().st_size == written
    assert f"not done: run was taken from process {holder.pid}" in said
    assert f"now: {os.uname().nodename}, process {os.getpid()}" in said


def test_a_lease_of_another_machine_expires_by_its_stillness_alone(tmp_path):
    """Not by the times of its files, which another clock has written."""
    holder = foreign()
    write_generation(tmp_path, 1, holder)
    beat = tmp_path / f"{holder.token}.beat"
    watch = Watch(tmp_path)
    lives = set()
    began = time.monotonic()
    while time.monotonic() - began < 2 * SECONDS:
        beat.write_text(str(time.monotonic()))
        os.utime(beat, (0, 0))
        watch.look()
        lives.add(watch.life)
        time.sleep(SECONDS / 6)
    assert lives == {"uncertain", "alive"}
    with pytest.raises(RunHeldError, match="gpu07"):
        claim(watch)

    still = time.monotonic()
    os.utime(beat, (2**31, 2**31))
    while watch.look() and watch.life != "dead":
        assert time.monotonic() - still < 5
        time.sleep(0.01)
    assert time.monotonic() - still >= SECONDS * 0.8  # the last beat was up to a sixth before
    with claim(watch, on_loss=fail) as lease:
        assert lease.generation == 2


def test_acquire_waits_for_another_machine_to_move_or_to_expire(tmp_path):
    holder = foreign()
    write_generation(tmp_path, 1, holder)
    beat = tmp_path / f"{holder.token}.beat"
    timer = threading.Timer(SECONDS / 3, beat.write_text, ["1"])
    timer.start()
    with pytest.raises(RunHeldError, match=r"gpu07, process \d+, since"):
        acquire(tmp_path)
    timer.join()
    began = time.monotonic()
    with acquire(tmp_path, on_loss=fail):
        assert time.monotonic() - began >= SECONDS


def test_a_holder_that_wakes_while_it_is_taken_over_is_given_the_time_to_notice(
    tmp_path, monkeypatch
):
    holder = gone()
    write_generation(tmp_path, 1, holder)
    create = leases._create

    def create_and_wake(*arguments: object) -> bool:
        (tmp_path / f"{holder.token}.beat").write_text("awake")
        return create(*arguments)

    monkeypatch.setattr(leases, "_create", create_and_wake)
    began = time.monotonic()
    with claim(Watch(tmp_path), on_loss=fail):
        assert time.monotonic() - began >= SECONDS / 2


@pytest.mark.parametrize("crash", ["before the link", "released", "clearing up", "no beat yet"])
def test_whatever_a_crash_leaves_can_be_claimed(tmp_path, crash):
    folder = tmp_path / "run"
    folder.mkdir()
    if crash == "before the link":
        (folder / ".claim.abc").write_text("{")
    elif crash == "released":
        write_generation(folder, 4, None)
    elif crash == "clearing up":
        write_generation(folder, 3, gone())
        write_generation(folder, 4, None)
    else:
        write_generation(folder, 1, gone())
    with claim(Watch(folder), on_loss=fail) as lease:
        assert look(folder).holder.token == lease.token
    # Then one generation is left, and it names nobody.
    assert [entry.name for entry in folder.iterdir()] == [str(lease.generation + 1)]
    assert look(folder).holder is None


def test_a_torn_generation_holds_the_run_until_it_expires(tmp_path, monkeypatch):
    (tmp_path / "1").write_text('{"hol')
    watch, now = Watch(tmp_path), time.monotonic()
    with pytest.raises(RunHeldError, match="a process that left no name"):
        claim(watch)
    monkeypatch.setattr(leases.time, "monotonic", lambda: now + leases.EXPIRY + 1)
    claim(watch, on_loss=fail).release()


def test_who_looked_before_others_came_and_went_gets_no_generation_of_old(tmp_path, monkeypatch):
    write_generation(tmp_path, 5, None)
    seen = iter([Sight(3, None, None, None)])
    look_now = leases.look
    monkeypatch.setattr(leases, "look", lambda folder: next(seen, None) or look_now(folder))
    with claim(Watch(tmp_path), on_loss=fail) as lease:
        assert lease.generation == 6


def test_a_lease_is_handed_over_by_its_token(tmp_path):
    lost = []
    with claim(Watch(tmp_path), on_loss=lost.append) as parent:
        with pytest.raises(RunHeldError):
            acquire(tmp_path, token="another's")  # noqa: S106 (no secret)
        with acquire(tmp_path, token=parent.token, on_loss=fail) as child:
            parent.renew()
            assert len(lost) == 1
            parent.release()
            child.renew()
            assert look(tmp_path).holder.token == child.token
    assert look(tmp_path).holder is None


def test_a_lease_whose_folder_is_deleted_is_lost(tmp_path):
    lost = []
    lease = claim(Watch(tmp_path / "run"), on_loss=lost.append)
    for entry in (tmp_path / "run").iterdir():
        entry.unlink()
    with claim(Watch(tmp_path / "run"), on_loss=fail) as other:
        assert other.generation == lease.generation
        lease.renew()
        assert "was taken from process" in lost[0]


def test_a_failing_file_system_is_told_before_a_write_and_not_by_the_heartbeat(
    tmp_path, monkeypatch
):
    def is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with claim(Watch(tmp_path), on_loss=fail) as lease:
        monkeypatch.setattr(leases, "write_atomically", is_full)
        lease.verify()
        time.sleep(SECONDS / 2 + 0.05)
        with pytest.raises(OSError, match="No space left"):
            lease.verify()
        monkeypatch.undo()
        lease.renew()


def test_a_process_id_that_is_used_again_is_not_the_process():
    here = Holder.here()
    assert not here.is_gone
    assert gone().is_gone
    assert not foreign(started="1").is_gone


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf", "nan"])
def test_an_expiry_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv(EXPIRY_VARIABLE, given)
    with pytest.raises(InputError, match="expected a number of seconds above 0"):
        Holder.here()
