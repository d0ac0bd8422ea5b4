"""What a run reads, brought to this machine, tokenised, and read once more without a network.

Nothing counts as prepared before a fresh process that may not use the network has planned every
run: config, tokenizer, the headers of all weight files, every data file and the tokenised rows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_one.errors import InputError
from lora_one.harness.config.schema import Config, ModelConfig
from lora_one.harness.console import make_console, quiet_libraries, say
from lora_one.harness.data.splits import cache_folder
from lora_one.harness.models.base import local_folder
from lora_one.harness.models.files import ModelFiles, fetch_model, local_model
from lora_one.harness.plan import make_plan
from lora_one.snapshots import cached_snapshot
from lora_one.tasks.reads import Read

ROOT = Path(__file__).parents[3]
VERIFY = "from lora_one.harness.data.prepare import verify_all; verify_all()"


@dataclass(frozen=True)
class Item:
    """One line of the table: something that is on this machine now."""

    what: str
    where: str
    bytes: int
    revision: str


def prepare_all(configs: Sequence[Config]) -> None:
    """Fetch, tokenise, verify, and print what is where.

    Args:
        configs: The runs; what several of them share is fetched once.

    Raises:
        InputError: Whatever would stop one of the runs, or cannot be fetched.
    """
    quiet_libraries()
    needed = list({_needs(config): _harmless(config) for config in configs}.values())
    items: dict[str, Item] = {}
    models = {(config.model.name, config.model.revision): config.model for config in needed}
    for name, model in models.items():
        say(f"model {model.name}")
        items[str(name)] = _model_item(model)
    for index, config in enumerate(needed):
        say(f"rows {index + 1} of {len(needed)}: {config.dataset.name}, for {config.model.name}")
        for item in _prepare_rows(config):
            items[f"{item.what} {item.where} {item.revision}"] = item
    say("verifying without a network")
    _verify_offline(needed)
    _show(make_console(), items.values())
    say("prepared: runs with HF_HUB_OFFLINE=1 find all of it here")


def verify_all() -> None:
    """Plan the runs on standard input, one a line, as a run does before it loads a weight.

    Exits with status 2 and one line of what is missing. ``prepare_all`` calls it in a process that
    may not use the network.
    """
    quiet_libraries()
    for line in sys.stdin:
        config = Config.model_validate_json(line)
        try:
            plan = make_plan(config)
        except InputError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        again = [key for key, split in plan.data.splits.fresh.items() if split.reads]
        if again:
            print(f"{cache_folder(config)} lacks {', '.join(again)}", file=sys.stderr)
            sys.exit(2)


def _needs(config: Config) -> str:
    """What of a configuration decides what has to be here; the rest may differ."""
    model = config.model.model_dump(include={"name", "type", "revision", "max_length"})
    rest = [config.output_dir, config.evaluate.adapter, config.learns]
    return json.dumps([config.dataset.model_dump(), model, *rest], sort_keys=True)


def _harmless(config: Config) -> Config:
    """The same run, asking neither for consent to run code nor for another engine: none runs."""
    evaluation = config.evaluation.model_copy(
        update={"generate_only": True, "engine": "transformers"}
    )
    return config.model_copy(update={"evaluation": evaluation})


def _model_item(model: ModelConfig) -> Item:
    folder = local_folder(model.name)
    files: ModelFiles = fetch_model(model) if folder is None else local_model(folder)
    return Item(f"model {model.name}", str(files.folder), files.bytes, files.commit or "local")


def _prepare_rows(config: Config) -> Iterable[Item]:
    plan = make_plan(config)
    splits = plan.data.splits
    try:
        splits.save()
    except OSError as error:
        raise InputError(
            f"{cache_folder(config)}: the tokenised rows cannot be written ({error}). Choose "
            "another folder with output_dir=<folder>, here and for the runs."
        ) from error
    for read in splits.reads:
        yield _read_item(read)
    for split, file in splits.files().items():
        if file.is_file():
            rows = plan.data.facts["rows"][split]
            yield Item(f"tokens {split}, {rows:,} rows", str(file), file.stat().st_size, "")


def _read_item(read: Read) -> Item:
    if "file" in read:
        path = Path(read["file"])
        return Item("rows", str(path), path.stat().st_size, f"sha256 {read['sha256'][:12]}")
    snapshot = cached_snapshot(read["hub"], "dataset", read["commit"])
    if snapshot is None:
        raise InputError(f"the dataset '{read['hub']}' has gone from the cache while preparing")
    size = sum((snapshot.folder / name).stat().st_size for name in read["files"])
    name = " ".join(filter(None, (read["hub"], read["config"], read["split"])))
    return Item(f"rows {name}", str(snapshot.folder), size, read["commit"])


def _verify_offline(configs: Sequence[Config]) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", VERIFY],
        input="".join(f"{config.model_dump_json()}\n" for config in configs),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise InputError(f"a run without a network would fail: {lines[-1]}")


def _show(console: Console, items: Iterable[Item]) -> None:
    table = Table(title="on this machine", title_justify="left", box=None)
    for column, justify in (("what", "left"), ("size", "right"), ("revision", "left")):
        table.add_column(column, justify=justify, overflow="fold")
    table.add_column("where", overflow="fold")
    for item in items:
        table.add_row(item.what, _readable(item.bytes), item.revision, item.where)
    console.print(table, highlight=False)


def _readable(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
