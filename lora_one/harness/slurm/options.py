"""What a launcher's settings mean to sbatch, checked before anything is submitted."""

from typing import Any

from lora_one.errors import InputError
from lora_one.harness.config.schema import SlurmLauncher

# Options of sbatch that have a key of their own.
OWN_KEYS = {
    "job-name": "job_name",
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem_gb",
    "time": "timeout_min",
    "signal": "signal_delay_s",
}
# Options that decide what a job is here, and the reason why they are not to be changed.
SETTLED = {
    "array": "the points decide it; see launcher.max_parallel",
    "output": "logs go to <output_dir>/slurm",
    "error": "logs go to <output_dir>/slurm",
    "open-mode": "a requeued job adds to its logs",
    "requeue": "jobs are always requeued after a preemption",
    "no-requeue": "jobs are always requeued after a preemption",
    "chdir": "jobs run where the command was given, so that relative paths keep their meaning",
    "ntasks": "a job has launcher.tasks_per_node x launcher.nodes tasks",
    "wait": "see launcher.wait",
    "wrap": "the job is the run",
    "test-only": "see dry_run=true",
    "parsable": "the job number is read as sbatch prints it",
}


def check_launcher(launcher: SlurmLauncher, margin_seconds: float) -> None:
    """Check the settings of a SLURM launcher against each other and ``preemption``'s margin.

    Raises:
        InputError: the first pair of settings that contradict each other.
    """
    tasks, gpus = launcher.tasks_per_node, launcher.gpus_per_node
    if gpus and tasks not in (None, gpus):
        raise InputError(
            f"launcher.tasks_per_node={tasks} with launcher.gpus_per_node={gpus}: every task is "
            f"one rank with one GPU. Give launcher.tasks_per_node={gpus}, or leave it out."
        )
    for key, delay in (
        ("launcher.signal_delay_s", launcher.signal_delay_s),
        ("preemption.margin_seconds", margin_seconds),
    ):
        if delay >= 60 * launcher.timeout_min:
            raise InputError(
                f"{key}={delay:g} is as long as the job: "
                f"launcher.timeout_min={launcher.timeout_min} is {60 * launcher.timeout_min} s, so "
                "that it would stop at its start. Give a shorter delay or a longer limit."
            )
    for given in launcher.additional:
        option = given.replace("_", "-")
        if option in OWN_KEYS:
            raise InputError(f"launcher.additional.{given}: give launcher.{OWN_KEYS[option]}.")
        if option in SETTLED:
            raise InputError(f"launcher.additional.{given} cannot be set: {SETTLED[option]}.")


def sbatch_options(launcher: SlurmLauncher) -> dict[str, Any]:
    """Return the long options of sbatch for one job: name -> value, True for a flag."""
    options = {
        "job-name": launcher.job_name,
        "account": launcher.account,
        "partition": launcher.partition,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "nodes": launcher.nodes,
        "gpus-per-node": launcher.gpus_per_node or None,
        "ntasks-per-node": launcher.tasks,
        "cpus-per-task": launcher.cpus_per_task,
        "mem": None if launcher.mem_gb is None else f"{round(launcher.mem_gb * 1024)}M",
        "time": launcher.timeout_min,
        "signal": f"USR2@{launcher.signal_delay_s}",
        # Also where the cluster's default is not to requeue.
        "requeue": True,
        **{name.replace("_", "-"): value for name, value in launcher.additional.items()},
    }
    return {name: value for name, value in options.items() if value is not None}


def as_flags(options: dict[str, Any]) -> list[str]:
    """Spell options as sbatch's command line has them."""
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
    ]
