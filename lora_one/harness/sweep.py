"""A sweep: every point in a process of its own, finished ones skipped, one table at the end."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_one.errors import PreemptedError
from lora_one.harness import preemption
from lora_one.harness.compose import Point
from lora_one.harness.console import say
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, INTERRUPTED, TRY_AGAIN
from lora_one.harness.folder import finished_record, read_record, run_id, write_atomically
from lora_one.harness.ranks import is_main


def run_points(points: Sequence[Point], program: str) -> int:
    """Run the points one after the other and show what came out.

    A point that fails does not stop the others. The same command, given again, runs only what is
    not finished yet.

    Args:
        points: What to run.
        program: The script that runs one point.

    Returns:
        0 if every point is finished, else the status of the first that is not.
    """
    problems: dict[str, int] = {}
    for index, point in enumerate(points):
        name = run_id(point.config)
        say(f"[{index + 1}/{len(points)}] {name}")
        status = DONE
        if finished_record(point.config):
            say("already done")
        else:
            status = _run_alone(point, program, index)
        if status != DONE:
            problems[name] = status
    if is_main():
        _show(points)
    for name, status in problems.items():
        say(f"{'bad input' if status == BAD_INPUT else 'failed'}: {name}")
    return next(iter(problems.values()), DONE)


def _run_alone(point: Point, program: str, index: int) -> int:
    """Run one point in a fresh process, so that no state of one run reaches the next."""
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:
        # Each point forms a process group of its own: a port of its own, and not the launcher's
        # store, which still holds the keys of the group before.
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + 1 + index)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    command = [sys.executable, program, *point.overrides]
    with subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # Let the point write down that it was interrupted before this process goes.
            process.terminate()
            process.wait()
            raise
        except PreemptedError:
            # The point stops as it would alone, and this process after it.
            process.send_signal(preemption.last_signal())
            process.wait()
            raise
    if status == TRY_AGAIN:
        record = read_record(Path(point.config.output_dir) / run_id(point.config)) or {}
        if record.get("status") == "preempted":
            facts = record["preempted"]
            raise PreemptedError(facts["reason"], requeues=facts["requeues"])
    if status in (-signal.SIGINT, INTERRUPTED):
        raise KeyboardInterrupt
    return status if status in (DONE, BAD_INPUT) else FAILED


def _show(points: Sequence[Point]) -> None:
    from lora_one.reports.records import load_runs
    from lora_one.reports.table import render, summarise, to_csv, to_markdown

    # Points that differ in what nothing reads are one run.
    folders = list(
        dict.fromkeys(Path(point.config.output_dir) / run_id(point.config) for point in points)
    )
    table = summarise(load_runs(folders))
    render(table)
    names = "\n".join(folder.name for folder in folders)
    digest = hashlib.sha256(names.encode()).hexdigest()[:8]
    target = Path(points[0].config.output_dir) / "sweeps"
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / f"{digest}.md", to_markdown(table))
        write_atomically(target / f"{digest}.csv", to_csv(table))
    except OSError as error:
        say(f"warning: the table could not be written to {target}: {error}")
    else:
        say(f"table: {target / digest}.md and .csv")
