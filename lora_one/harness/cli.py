"""The command line: official spellings, Hydra's flags, one run or a sweep, errors as exit status.

Exit status: 0 done, 2 bad input (one message, nothing written), 1 the run failed (its record says
why), 75 not finished (preempted, or another process is at it: try again), 130 interrupted.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser

from lora_one.errors import (
    InputError,
    NonFiniteError,
    NotPreparedError,
    PeerError,
    PreemptedError,
    RunHeldError,
    StorageError,
)
from lora_one.harness.config.compose import Point, compose_config, composer, expand
from lora_one.harness.config.published import translate
from lora_one.harness.config.schema import Config
from lora_one.harness.console import quiet_imports
from lora_one.harness.distributed.peers import agree, together
from lora_one.harness.distributed.ranks import identify, is_main
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED, INTERRUPTED, TRY_AGAIN
from lora_one.harness.resuming import preemption
from lora_one.harness.resuming.time_limit import requeueing
from lora_one.harness.sweeps import sweep
from lora_one.harness.sweeps.comparison import compare, describe, make_arms

Run = Callable[[Config], Any]
RunTogether = Callable[[list[Config]], Any]
Act = Callable[[list[Point], bool], int]

SWEEP_FLAGS = {"-m", "--multirun"}
COMPLETION_FLAGS = {"--shell-completion", "-sc"}
HELP_FLAGS = {"--help", "-h", "--hydra-help", "--version"} | COMPLETION_FLAGS
CONFIG_FLAGS = {"--cfg", "-c"}
# What says how --cfg shows the configuration; by itself Hydra would launch a run, or raise.
SHOWING_FLAGS = {"--resolve", "--package", "-p"}
# Keys that decide what has to be on this machine.
PREPARED = {
    "dataset",
    "dataset_name",
    "experiment",
    "smoke",
    "train",
    "evaluate",
    "seed",
    "output_dir",
} | {
    f"model{suffix}"
    for suffix in ("", ".name", ".type", ".revision", ".max_length", ".trust_remote_code")
}
HYDRA_FLAGS = HELP_FLAGS | CONFIG_FLAGS | SHOWING_FLAGS | {"--info", "-i"}


def launch(run: Run, conf: Path, program: str, arguments: list[str] | None = None) -> int:
    """Do what the command line says and return the exit status.

    SIGTERM, SIGUSR1, SIGUSR2 and a SLURM time limit that is close stop it, with what is done kept;
    after all but SIGTERM a SLURM batch job is queued again.

    Args:
        run: Runs one experiment.
        conf: Folder of the Hydra configuration.
        program: The script that a sweep starts for each of its points.
        arguments: The command line without the program's name; None: ``sys.argv[1:]``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments

    def act(points: list[Point], multirun: bool) -> int:
        if points[0].config.comparison is not None:
            return _compare(points, conf, program, multirun)
        if _on_slurm(points):
            from lora_one.harness.slurm.submit import submit

            return submit(points, program, multirun)
        with requeueing(points[0].config.preemption):
            if multirun:
                return sweep.run_points(points, program)
            run(points[0].config)
            return DONE

    return _guarded(conf, arguments, act)


def launch_together(run: RunTogether, conf: Path, arguments: list[str] | None = None) -> int:
    """As ``launch``, for what is done for all points of a sweep at once, in this process."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def act(points: list[Point], _: bool) -> int:
        if is_main():
            run([point.config for point in points])
        return DONE

    # Where things are being prepared, the advice to prepare them would help nobody.
    return _guarded(conf, arguments, act, advise=False)


def _compare(points: list[Point], conf: Path, program: str, multirun: bool) -> int:
    """Tune and compare, here or through SLURM."""
    if _on_slurm(points):
        from lora_one.harness.slurm.submit import submit

        execute = partial(submit, program=program, multirun=True, table=False)
    else:
        execute = partial(sweep.run_points, program=program, table=False)
    with composer(conf), requeueing(points[0].config.preemption):
        return compare(make_arms(points, multirun), execute)


def _guarded(conf: Path, arguments: list[str], act: Act, *, advise: bool = True) -> int:
    quiet_imports()
    try:
        identify()
        with preemption.listening():
            return _dispatch(conf, arguments, act)
    except NotPreparedError as error:
        advice = (
            f" Prepare it where there is a network: {prepare_command(arguments)}" if advise else ""
        )
        _complain(f"error: {str(error).rstrip('.')}.{advice}")
        return BAD_INPUT
    except RunHeldError as error:
        _complain(f"not done: {error}")
        return TRY_AGAIN
    except InputError as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except PreemptedError as error:
        _complain(f"preempted: {error}")
        return TRY_AGAIN
    except (NonFiniteError, PeerError, StorageError) as error:
        _complain(f"failed: {error}")
        return FAILED
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def _on_slurm(points: Sequence[Point]) -> bool:
    return any(point.config.launcher.name == "slurm" for point in points)


def prepare_command(arguments: Sequence[str]) -> str:
    """Return the command that brings here what a command line of ``run_exp.py`` needs."""
    overrides = get_args_parser().parse_intermixed_args(list(arguments)).overrides
    heads = {_key(override).partition(".")[0] for override in overrides}
    # Which rows a run needs may depend on its method only where it does not train.
    wanted = PREPARED | ({"init", "peft"} if heads & {"train", "evaluate"} else set())
    flags = [argument for argument in arguments if argument in SWEEP_FLAGS]
    kept = [
        override
        for override in overrides
        if _key(override) in wanted or _key(override).partition(".")[0] in wanted - {"model"}
    ]
    return shlex.join(["python", "scripts/prepare.py", *flags, *kept])


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _dispatch(conf: Path, arguments: list[str], act: Act) -> int:
    options = get_args_parser().parse_intermixed_args(arguments)
    flags = [argument for argument in arguments if argument not in options.overrides]
    questions = [flag for flag in flags if flag not in SWEEP_FLAGS]
    _check(questions, options.overrides)
    if HELP_FLAGS & set(questions):
        # Help is the same for every configuration: what else is on the line cannot be wrong.
        completes = COMPLETION_FLAGS & set(questions)
        _let_hydra_answer(conf, questions, options.overrides if completes else [])
        return 0
    with together():
        return _act_on(conf, options.overrides, questions, options.multirun, act)


def _act_on(conf: Path, given: list[str], questions: list[str], multirun: bool, act: Act) -> int:
    """Compose, on every rank the same, and answer or act."""
    with composer(conf):
        if multirun:
            points, notes = expand(given)
        else:
            overrides, notes = translate(given)
            points = [Point(tuple(overrides), compose_config(overrides))]
    dumps = [point.config.model_dump(mode="json") for point in points]
    agree("configuration", dumps if multirun else dumps[0])
    for note in notes:
        _complain(f"note: {note}")
    if questions:
        _let_hydra_answer(conf, questions, points[0].overrides)
    elif points[0].config.dry_run:
        from lora_one.harness.dry_run import show_plan

        if points[0].config.comparison is not None:
            with composer(conf):
                points = describe(make_arms(points, multirun))
        show_plan([point.config for point in points])
        if _on_slurm(points):
            from lora_one.harness.slurm.submit import show_order

            show_order(points)
    else:
        return act(points, multirun)
    return 0


def _check(questions: list[str], overrides: list[str]) -> None:
    """Refuse what Hydra would take and we would not heed."""
    unknown = sorted({flag for flag in questions if flag.startswith("-")} - HYDRA_FLAGS)
    if unknown:
        valid = ", ".join(sorted(SWEEP_FLAGS | HYDRA_FLAGS))
        raise InputError(f"{unknown[0]}: no such flag here. Valid: {valid}.")
    showing = sorted(SHOWING_FLAGS & set(questions))
    if showing and not CONFIG_FLAGS & set(questions):
        raise InputError(f"{showing[0]} says how --cfg shows the configuration. Add --cfg job.")
    commands = ("install=", "uninstall=", "query=")
    if COMPLETION_FLAGS & set(questions) and not any(
        override.startswith(commands) for override in overrides
    ):
        raise InputError(
            "--shell-completion does nothing by itself. Say what: install=bash, uninstall=bash (or "
            "zsh, fish)."
        )
    if not questions:
        for override in overrides:
            if override.lstrip("+~").startswith(("hydra.", "hydra/")):
                raise InputError(
                    f"{override}: Hydra composes the configuration here but does not launch the "
                    "runs, so its own settings have no effect."
                )


def _let_hydra_answer(conf: Path, flags: list[str], overrides: Sequence[str]) -> None:
    """Print what Hydra knows: help, the composed configuration, shell completion."""
    if not is_main():
        return
    original = sys.argv
    sys.argv = [original[0], *flags, *overrides]
    answer = hydra.main(version_base="1.3", config_path=str(conf.resolve()), config_name="config")
    try:
        answer(lambda _: None)()
    except SystemExit as ended:
        # Hydra has said which package is not there, and ends with 1, which is a failed run's.
        sys.exit(BAD_INPUT if ended.code else DONE)
    finally:
        sys.argv = original


def _complain(text: str) -> None:
    if is_main():
        print(text, file=sys.stderr, flush=True)
