"""A sweep: every point in a process of its own, finished ones skipped, one table at the end."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_one.harness.compose import Point
from lora_one.harness.console import say
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, INTERRUPTED
from lora_one.harness.folder import finished_record, run_id, write_atomically
from lora_one.harness.peers import gather, on_end, share
from lora_one.harness.ranks import environment_of_point, is_main


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
        # Rank 0 decides, so that all ranks do the same points.
        if share(finished_record(point.config) is not None):
            say("already done")
        else:
            statuses = gather(_run_alone(point, program))
            status = next((status for status in statuses if status != DONE), DONE)
        if status != DONE:
            problems[name] = status
    if is_main():
        _show(points)
    for name, status in problems.items():
        say(f"{'bad input' if status == BAD_INPUT else 'failed'}: {name}")
    return next(iter(problems.values()), DONE)


def _run_alone(point: Point, program: str) -> int:
    """Run one point in a fresh process, so that no state of one run reaches the next."""
    command = [sys.executable, program, *point.overrides]
    environment = environment_of_point(run_id(point.config))
    # If another rank dies, so does this process, and the point with it.
    with (
        subprocess.Popen(command, env=environment) as process,
        on_end(lambda _: process.terminate()),
    ):
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # Let the point write down that it was interrupted before this process goes.
            process.terminate()
            process.wait()
            raise
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
