"""Make the Weights & Biases runs of run folders, from what lies in the folders alone.

    python scripts/wandb_sync.py results                             every run in it
    python scripts/wandb_sync.py results/<run> --mode online         one run, straight to W&B
    python scripts/wandb_sync.py results --mode offline              .wandb files, for `wandb sync`

Id, configuration, every line of metrics.jsonl, the init report, the final metrics and how the run
ended. What W&B already has under a run's id is replaced, so the same command may be given again.
Without --mode: online where there is a key and a network. Exit status: 0 done, 1 a run could not
be copied, 2 bad input.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pydantic import ValidationError

from lora_one.errors import InputError
from lora_one.harness.config.schema import WandbConfig
from lora_one.harness.exit_status import BAD_INPUT, DONE, FAILED
from lora_one.harness.tracking.mirror import Mirror, brief, choose_mode, read_settings


def find_folders(path: Path) -> list[Path]:
    """Return the run folder at a path, or those directly below it.

    Raises:
        InputError: if there is none.
    """
    if (path / "run.json").exists():
        return [path]
    folders = sorted(file.parent for file in path.glob("*/run.json"))
    if not folders:
        raise InputError(f"{path} is no run folder and has none in it (a folder with a run.json)")
    return folders


def settle_mode(wanted: str | None) -> str:
    """Return online or offline.

    Raises:
        InputError: if online is wanted and not possible.
    """
    if wanted == "offline":
        return wanted
    mode, reason = choose_mode()
    if wanted == "online" and mode == "offline":
        raise InputError(
            f"--mode online: {reason}. Log in with `wandb login` where there is a network, or give "
            "--mode offline."
        )
    if mode == "offline":
        print(f"offline: {reason}")
    return mode


def read_where(folder: Path, options: argparse.Namespace) -> WandbConfig:
    """Return where a run goes: as its configuration says, but for what the command line says.

    Raises:
        InputError: if the configuration says something else than project, entity and so on.
    """
    keys = ("project", "entity", "group", "timeout_seconds")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    try:
        return WandbConfig.model_validate(read_settings(folder)["wandb"] | given)
    except ValidationError as error:
        raise InputError(f"{folder / 'config.yaml'}: wandb: {error}") from error


def sync(folder: Path, where: WandbConfig, mode: str) -> None:
    """Copy one run folder and say what became of it."""

    def say(text: str) -> None:
        print(f"{folder.name}: {text}", flush=True)

    with contextlib.ExitStack() as stack:
        # Online nothing need stay behind; offline the files are what it is about.
        directory = None
        if mode == "online":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mirror = Mirror(folder, where, mode, say, directory=directory)
        status = mirror.close()
        say(f"{status}, {mirror.lines} lines, run {where.project}/{mirror.run.id}")
        if mode == "offline":
            say(f"wandb sync {mirror.files}")


def main() -> int:
    """Copy what the command line names and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument("--mode", choices=["online", "offline"], help="default: online if possible")
    parser.add_argument("--project", help="default: as the run's configuration says")
    parser.add_argument("--entity", help="default: as the run's configuration says")
    parser.add_argument("--group", help="default: the sweep that the run was a point of")
    parser.add_argument(
        "--timeout",
        type=float,
        dest="timeout_seconds",
        metavar="SECONDS",
        help="the longest to wait for W&B, for each run",
    )
    options = parser.parse_args()
    # W&B's reports about itself go the same way as the data, and hold it up when it is blocked.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        runs = [(folder, read_where(folder, options)) for folder in find_folders(options.path)]
        mode = settle_mode(options.mode)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    failed = 0
    for folder, where in runs:
        try:
            sync(folder, where, mode)
        except Exception as error:  # W&B raises anything; the other runs are not to suffer
            print(f"{folder.name}: failed: {brief(error)}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"{failed} of {len(runs)} runs could not be copied", file=sys.stderr)
    return FAILED if failed else DONE


if __name__ == "__main__":
    sys.exit(main())
