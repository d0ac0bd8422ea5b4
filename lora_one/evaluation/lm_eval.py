"""Hand a run's adapter to lm-evaluation-harness, for few-shot suites such as gsm8k_cot.

``python -m lora_one.evaluation.lm_eval <run folder or adapter> --tasks gsm8k_cot mmlu`` evaluates
the exported adapter on its untouched base, prints the same evaluation as an ``lm_eval`` command,
and keeps the results in ``lm_eval.json`` beside the run. ``--print`` only prints the command, for a
machine where lm-evaluation-harness is installed elsewhere.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_one.errors import InputError

RESULTS = "lm_eval.json"


@dataclass(frozen=True)
class Target:
    """What is evaluated, and how its base is loaded.

    Attributes:
        base: Hub id or folder of the base model, or of a model trained in full.
        adapter: Folder of the adapter, if there is one.
        folder: Where the results go.
        revision: Commit, tag or branch of the base.
        dtype: Of the base's weights.
        trust_remote_code: Run Python code that comes with the base.
    """

    base: str
    adapter: Path | None
    folder: Path
    revision: str = "main"
    dtype: str = "float32"
    trust_remote_code: bool = False

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of lm-evaluation-harness's ``hf`` model."""
        arguments: dict[str, Any] = {"pretrained": self.base, "dtype": self.dtype}
        if self.adapter is not None:
            arguments["peft"] = str(self.adapter)
        if self.revision != "main":
            arguments["revision"] = self.revision
        if self.trust_remote_code:
            arguments["trust_remote_code"] = True
        return arguments


@dataclass(frozen=True)
class Settings:
    """How it is evaluated; the names are those of ``lm_eval``'s options."""

    tasks: Sequence[str]
    num_fewshot: int | None = None
    batch_size: str = "auto"
    limit: float | None = None
    device: str | None = None
    include_path: Path | None = None


def find_target(
    path: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """Find out what a run folder or an adapter folder holds.

    Args:
        path: A folder with ``run.json`` (a finished run) or with ``adapter_config.json``.
        base: Another place of the base model than the one that is recorded.
        dtype: Of the base's weights; None is that of the run, or float32 for a lone adapter.
        trust_remote_code: Run Python code that comes with the base; a folder, which somebody else
            may have written, cannot ask for that.

    Raises:
        InputError: Neither is there, the run is not finished, it left no adapter and no model, or
            its base comes with code that ``trust_remote_code`` does not allow.
    """
    exported = path.name in ("adapter", "model") and (path.parent / "run.json").is_file()
    home = path.parent if exported else path
    if not (home / "run.json").is_file():
        if not (path / "adapter_config.json").is_file():
            raise InputError(
                f"{path}: neither a run folder (no run.json) nor an adapter (no "
                "adapter_config.json)"
            )
        return Target(
            base=base or _base_of(path),
            adapter=path,
            folder=path,
            dtype=dtype or "float32",
            trust_remote_code=trust_remote_code,
        )
    _require_finished(home)
    settings = _model_settings(home / "config.yaml")
    if settings.get("trust_remote_code") and not trust_remote_code:
        raise InputError(
            f"{home}: the run was made with model.trust_remote_code=true, so that "
            f"{settings.get('name')} runs Python code of its own; if you trust that code, add "
            "--trust_remote_code"
        )
    dtype = dtype or ("bfloat16" if settings.get("bf16") else "float32")
    adapter, model = home / "adapter", home / "model"
    if (adapter / "adapter_config.json").is_file():
        return Target(
            base=base or settings.get("name") or _base_of(adapter),
            adapter=adapter,
            folder=home,
            revision=settings.get("revision") or "main",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    if (model / "config.json").is_file():
        return Target(str(model), None, home, dtype=dtype, trust_remote_code=trust_remote_code)
    raise InputError(
        f"{home}: the run has left neither adapter/ nor model/. If it evaluated an adapter "
        "(evaluate.adapter), give that adapter's folder."
    )


def _require_finished(home: Path) -> None:
    """Refuse what an unfinished run has left: it may be half written, or replaced later."""
    try:
        status = json.loads((home / "run.json").read_text(encoding="utf-8")).get("status")
    except json.JSONDecodeError as error:
        raise InputError(f"{home}: run.json cannot be read: {error}") from None
    if status != "finished":
        raise InputError(
            f"{home}: the run is not finished (run.json says '{status}'). Let it finish, or give "
            "its command again; or copy the adapter's folder elsewhere and give the copy."
        )


def command(target: Target, settings: Settings) -> str:
    """Return the shell command that evaluates the same with ``lm_eval`` itself.

    Raises:
        InputError: A path with a comma, which ``--model_args`` cannot write.
    """
    arguments = target.model_args
    if any("," in str(value) for value in arguments.values()):
        raise InputError(f"lm_eval cannot read a comma in a path: {arguments}")
    words = ["lm_eval", "run", "--model", "hf", "--model_args"]
    words.append(",".join(f"{key}={value}" for key, value in arguments.items()))
    words += ["--tasks", ",".join(settings.tasks), "--batch_size", settings.batch_size]
    for option in ("num_fewshot", "limit", "device", "include_path"):
        value = getattr(settings, option)
        if value is not None:
            words += [f"--{option}", f"{value:g}" if option == "limit" else str(value)]
    return shlex.join(words)


def evaluate(target: Target, settings: Settings) -> dict[str, Any]:
    """Run lm-evaluation-harness and write ``lm_eval.json``.

    Returns:
        What is written for this evaluation: ``command``, ``lm_eval`` (version), and by task
        ``results``, ``groups``, ``versions``, ``n-shot`` and ``n-samples``.

    Raises:
        InputError: lm-evaluation-harness is not installed, or has no task of that name.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            "evaluating with lm-evaluation-harness needs the 'lm-eval' package "
            f"({error}): pip install 'lora-one[evaluation]'"
        ) from None
    settings = on_this_machine(settings)
    include = None if settings.include_path is None else str(settings.include_path)
    manager = TaskManager(include_path=include, metadata=dict(target.model_args))
    unknown = [task for task in settings.tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "them, and --include_path adds a folder of task files"
        )
    found = simple_evaluate(
        model="hf",
        model_args=dict(target.model_args),
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        limit=settings.limit,
        device=settings.device,
        task_manager=manager,
        log_samples=False,
    )
    kept = ("results", "groups", "versions", "n-shot", "n-samples")
    facts = {
        "command": command(target, settings),
        "lm_eval": version("lm_eval"),
        **{key: found[key] for key in kept if key in found},
    }
    # Numbers may be numpy's; what else is no JSON is shown as text.
    facts = json.loads(json.dumps(facts, default=_plain))
    write(target.folder / RESULTS, facts)
    return facts


def on_this_machine(settings: Settings) -> Settings:
    """Name the CPU where there is no other device: lm_eval takes CUDA unless it is told."""
    import torch

    if settings.device is not None or torch.accelerator.is_available():
        return settings
    return replace(settings, device="cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line; return 0 when done, 2 for bad input."""
    given = _parser().parse_args(arguments)
    settings = Settings(
        tasks=[name for word in given.tasks for name in word.split(",") if name],
        num_fewshot=given.num_fewshot,
        batch_size=given.batch_size,
        limit=given.limit,
        device=given.device,
        include_path=given.include_path,
    )
    try:
        target = find_target(
            given.path,
            base=given.base,
            dtype=given.dtype,
            trust_remote_code=given.trust_remote_code,
        )
        if given.print:
            print(command(target, settings))
            return 0
        settings = on_this_machine(settings)
        print(command(target, settings))
        _show(evaluate(target, settings))
        print(f"written to {target.folder / RESULTS}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_one.evaluation.lm_eval",
        description="Evaluate a run's adapter with lm-evaluation-harness.",
    )
    parser.add_argument("path", type=Path, help="run folder, or folder of an adapter")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of lm_eval's tasks")
    parser.add_argument("--num_fewshot", type=int, help="default: as the task says")
    parser.add_argument("--batch_size", default="auto", help="a number, or auto (default)")
    parser.add_argument("--limit", type=float, help="examples per task, or a share below 1")
    parser.add_argument("--device", help="such as cuda:0 or cpu")
    parser.add_argument("--include_path", type=Path, help="folder with task files of your own")
    parser.add_argument("--base", help="the base model, where it is elsewhere than recorded")
    parser.add_argument("--dtype", help="of the base's weights (default: as in the run)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the base"
    )
    parser.add_argument("--print", action="store_true", help="print the lm_eval command only")
    return parser


def _base_of(adapter: Path) -> str:
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{adapter}: adapter_config.json names no base model; give --base <model>")
    return base


def _model_settings(file: Path) -> dict[str, Any]:
    """Return the ``model`` section of a run's ``config.yaml``."""
    import yaml

    if not file.is_file():
        raise InputError(f"{file}: no such file; a run folder holds run.json and config.yaml")
    return (yaml.safe_load(file.read_text()) or {}).get("model") or {}


def write(file: Path, facts: Mapping[str, Any]) -> None:
    """Add an evaluation to the file, in place of an earlier one by the same command."""
    earlier = json.loads(file.read_text())["evaluations"] if file.is_file() else []
    kept = [entry for entry in earlier if entry["command"] != facts["command"]]
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"evaluations": [*kept, facts]}, indent=2) + "\n")
    unfinished.replace(file)


def _show(facts: Mapping[str, Any]) -> None:
    for task, metrics in (facts["results"] | facts.get("groups", {})).items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                print(f"{task}: {name.removesuffix(',none')} {value:.4f}")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


if __name__ == "__main__":
    sys.exit(main())
