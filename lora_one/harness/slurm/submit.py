"""Hand the unfinished points of a command to SLURM as one job array.

A task of the array becomes its run: submitit starts it and then calls ``os.execv``, so that SLURM's
signals, the exit status and the memory are those of ``run_exp.py`` itself, and submitit's own
handling of signals and time limits is gone with the process that it was in. The run writes its
checkpoint and requeues its job itself; SLURM then does the same submission again.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

from lora_one.errors import InputError, PreemptedError
from lora_one.harness.config.compose import Point
from lora_one.harness.config.schema import SlurmLauncher
from lora_one.harness.console import say
from lora_one.harness.distributed.ranks import world_size
from lora_one.harness.exit_status import DONE
from lora_one.harness.records.folder import finished_record, run_id, write_atomically
from lora_one.harness.records.source import snapshot_name, take_snapshot
from lora_one.harness.slurm.options import as_flags, sbatch_options
from lora_one.harness.slurm.queue import QueueError, ask
from lora_one.harness.slurm.watch import Task, watch
from lora_one.harness.sweeps.files import SweepFiles

# In the folder of a submission: run id -> job, so that the same command finds its jobs again.
JOBS = "jobs.json"
# Of the variables that SLURM sets in a job, or a user before it: those that lead to SLURM.
WAYS_TO_SLURM = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}


@dataclass(frozen=True)
class Order:
    """What is to be submitted.

    Attributes:
        launcher: How the jobs are to be.
        points: Run id -> point, of those that are neither finished nor submitted.
        done: How many are finished.
        output_dir: Where jobs leave their logs.
    """

    launcher: SlurmLauncher
    points: dict[str, Point]
    done: int
    output_dir: Path


def submit(points: Sequence[Point], program: str, multirun: bool, *, table: bool = True) -> int:
    """Submit the unfinished points, wait for them unless told otherwise, and show the table.

    Args:
        points: What was asked for.
        program: The script that runs one point.
        multirun: Whether they are the points of a sweep, be it one.
        table: Whether to show the table of the runs at the end.

    Returns:
        0 if every point is finished (or submitted), else as ``watch`` says.

    Raises:
        InputError: the jobs cannot be submitted; nothing has been written then.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "launcher=slurm_...: there is no sbatch on PATH. Give the command on a login node of "
            "the cluster, or run here with launcher=local."
        )
    if world_size() > 1:
        raise InputError(
            f"launcher=slurm_... under {world_size()} ranks would submit every job "
            f"{world_size()} times. Give the command without srun, torchrun or accelerate launch."
        )
    order, tasks = make_order(points)
    total = order.done + len(order.points) + len(tasks)
    if order.done:
        say(f"already done: {order.done} of {total}")
    if tasks:
        say(f"already submitted: {len(tasks)} of {total}, {', '.join(task.job for task in tasks)}")
    status = DONE
    files = SweepFiles(points)
    if order.points:
        tasks += _hand_over(order, Path(program).resolve(), files.digest if multirun else None)
        files.announce()
    if tasks:
        numbers = ",".join(dict.fromkeys(task.number for task in tasks))
        say(
            f"see them: squeue --job={numbers}; "
            f"python -m lora_one.reports status {shlex.quote(str(order.output_dir))}\n"
            f"cancel them: scancel {numbers.replace(',', ' ')}"
        )
        if not order.launcher.wait:
            return DONE
        try:
            status = watch(tasks, order.launcher.poll_s)
        except (KeyboardInterrupt, PreemptedError):
            say("the jobs go on; the same command waits for them again")
            raise
    if table:
        files.show_table()
    return status


def make_order(points: Sequence[Point]) -> tuple[Order, list[Task]]:
    """Find out what is to be submitted, and how, and which jobs of earlier commands still live.

    Raises:
        InputError: the points do not agree about it.
    """
    first = points[0].config
    for point in points:
        if point.config.launcher != first.launcher:
            raise InputError(
                "launcher: a sweep is one job array, so all of its points have the same launcher. "
                "Give one launcher, and one value for each of its keys."
            )
    distinct = {run_id(point.config): point for point in points}
    todo = {name: p for name, p in distinct.items() if not finished_record(p.config)}
    output_dir = Path(first.output_dir).resolve()
    done = len(distinct) - len(todo)
    tasks = _submitted(todo, output_dir)
    for task in tasks:
        del todo[task.run]
    return Order(first.launcher, todo, done, output_dir), tasks


def _submitted(points: Mapping[str, Point], output_dir: Path) -> list[Task]:
    """Find the jobs that do these points, waiting or at work, of earlier commands."""
    tasks: dict[str, Task] = {}
    for file in sorted(output_dir.glob(f"slurm/*/{JOBS}")):
        jobs = {
            run: job
            for run, job in json.loads(file.read_text(encoding="utf-8")).items()
            if run in points
        }
        if not jobs or shutil.which("squeue") is None:
            continue
        try:
            queue = ask(next(iter(jobs.values())).partition("_")[0])
        except QueueError as error:
            raise InputError(f"SLURM does not answer ({error}). Try again later.") from error
        for run, name in jobs.items():
            job = queue.get(name)
            # A controller that lost its state counts from 1 again: the number may be another job's.
            if job is not None and job.live and job.logs == file.parent.name:
                stderr = JobPaths(file.parent, job_id=name).stderr
                tasks[run] = Task(name, run, points[run].config, stderr)
    return list(tasks.values())


def show_order(points: Sequence[Point]) -> None:
    """Print what would be submitted, and let SLURM judge it where there is one.

    Raises:
        InputError: SLURM would refuse it.
    """
    order, tasks = make_order(points)
    flags = as_flags(sbatch_options(order.launcher))
    jobs, throttle = len(order.points), order.launcher.max_parallel
    say(
        f"\nslurm: {jobs} to submit, {order.done} done, {len(tasks)} submitted already; "
        f"{'all' if throttle is None else f'at most {throttle}'} at a time; each"
    )
    for flag in flags:
        say(f"  {flag}")
    for line in order.launcher.setup:
        say(f"  setup: {line}")
    if shutil.which("sbatch") is None:
        say("  not checked: there is no sbatch on this machine")
        return
    array = [f"--array=0-{jobs - 1}"] if jobs > 1 else []
    answer = subprocess.run(
        ["sbatch", "--test-only", *flags, *array, "--wrap=true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise InputError(f"SLURM would refuse this job: {_message(answer.stderr)}")
    say("  checked: SLURM would accept it")


def _hand_over(order: Order, program: Path, group: str | None) -> list[Task]:
    """Submit; afterwards the jobs depend on nothing but the snapshot and the logs' folder."""
    with _nothing_left_behind(order.output_dir, program) as logs:
        program = take_snapshot(program, order.output_dir / "snapshots")
        executor = SlurmExecutor(logs)
        executor.update_parameters(
            # submitit sets its own name, which is refused where keys are checked.
            wckey=None,
            setup=order.launcher.setup,
            array_parallelism=order.launcher.max_parallel or len(order.points),
            # A step takes neither from its job: the CPUs since SLURM 22.05, the mode never.
            srun_args=[f"--cpus-per-task={order.launcher.cpus_per_task}", "--open-mode=append"],
            # All options in one place and in sbatch's own words; submitit's defaults give way.
            additional_parameters={
                name.replace("-", "_"): value
                for name, value in sbatch_options(order.launcher).items()
            },
        )
        python = [sys.executable, "-u", str(program)]
        commands = [[*python, *_alone(point, group)] for point in order.points.values()]
        try:
            # submitit prints what sbatch says before it raises it.
            with contextlib.redirect_stderr(io.StringIO()), _outside_of_jobs():
                jobs = executor.map_array(os.execv, [sys.executable] * len(commands), commands)
        except (FailedJobError, FailedSubmissionError) as error:
            raise InputError(f"SLURM refused the jobs: {_message(str(error))}") from error
        tasks = [
            Task(job.job_id, name, point.config, job.paths.stderr)
            for job, (name, point) in zip(jobs, order.points.items(), strict=True)
        ]
    write_atomically(logs / JOBS, json.dumps({task.run: task.job for task in tasks}) + "\n")
    say(f"submitted {len(tasks)} as job {tasks[0].number}; logs in {logs}")
    return tasks


def _alone(point: Point, group: str | None) -> list[str]:
    """The overrides of a point that runs where it is, not through a launcher.

    Its group in Weights & Biases is the sweep's. LORA_ONE_SWEEP would say so too, but also that a
    driver in the same job speaks for the run.
    """
    kept = [o for o in point.overrides if o.lstrip("+~").split("=")[0].split(".")[0] != "launcher"]
    if group is not None and point.config.wandb.group is None:
        kept.append(f"wandb.group='{group}'")
    return [*kept, "launcher=local"]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the job in which the command is given: sbatch hands its memory and counts on."""
    inside = "SLURM_JOB_ID" in os.environ
    job = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if inside and name.startswith("SLURM_") and name not in WAYS_TO_SLURM
    }
    try:
        yield
    finally:
        os.environ.update(job)


@contextlib.contextmanager
def _nothing_left_behind(output_dir: Path, program: Path) -> Iterator[Path]:
    """Make a folder for the logs of one submission; if it fails, remove it and the snapshot."""
    logs, snapshots = output_dir / "slurm", output_dir / "snapshots"
    snapshot = snapshots / snapshot_name(program)
    made = [] if snapshot.exists() else [snapshot]
    try:
        logs.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S-")
        folder = Path(tempfile.mkdtemp(dir=logs, prefix=stamp))
        folder.chmod(0o755)
        made.append(folder)
        yield folder
    except (InputError, OSError) as error:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        for parent in (logs, snapshots, output_dir):
            with contextlib.suppress(OSError):  # others have something in it
                parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"output_dir={output_dir} cannot be written: {error.strerror or error}. Choose "
                "another with output_dir=<folder>."
            ) from error
        raise


def _message(text: str) -> str:
    """Join the lines that sbatch printed, without its own name in front."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines()]
    message = "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) + "."
    if "Invalid job array specification" in message:
        message += (
            " One command is one job array, of at most MaxArraySize points (scontrol show config): "
            "give fewer seeds or values at a time."
        )
    return message
