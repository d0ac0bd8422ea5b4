"""The card of a run's adapter (``adapter/README.md``): what it is, how it was made, how to load it.

The front matter is what the Hugging Face hub reads, so that the folder can be pushed as it is.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_one.harness.config.schema import Config
from lora_one.harness.export import describe_rank
from lora_one.harness.models.base import AUTO_CLASSES, local_folder
from lora_one.harness.records.folder import write_atomically
from lora_one.numerics.methods import METHODS
from lora_one.snapshots import cached_snapshot
from lora_one.tasks.registry import TASKS

_PIPELINES = {
    "causal": "text-generation",
    "seq2seq": "text-generation",
    "classification": "text-classification",
}


def write_card(config: Config, folder: Path, facts: dict[str, Any]) -> None:
    """Write the card of the adapter in a run folder; a run without one gets none.

    Args:
        config: The run.
        folder: The run folder.
        facts: Its record.
    """
    if facts["export"]["path"] != "adapter":
        return
    lines = [
        *_front_matter(config, facts),
        "",
        f"# {facts['run_id']}",
        "",
        *_introduction(config, facts),
        "",
        *_usage(config, facts),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _table(config, facts)),
        "",
        "```bash",
        facts["command"],
        "```",
        "",
        "`config.yaml` and `run.json` beside this folder hold every setting, version and seed.",
        "",
    ]
    write_atomically(folder / "adapter" / "README.md", "\n".join(lines))


def licence(name: str, revision: str | None) -> str | None:
    """Return the licence that a base model's own card names, if the card is on this machine."""
    folder = local_folder(name)
    if folder is None:
        snapshot = cached_snapshot(name, "model", revision)
        folder = None if snapshot is None else snapshot.folder
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    front_matter = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = front_matter and re.search(r"^license:\s*(\S+)\s*$", front_matter[1], re.MULTILINE)
    return found[1].strip("\"'") if found else None


def _front_matter(config: Config, facts: Mapping[str, Any]) -> list[str]:
    name = config.model.name
    entries: dict[str, Any] = {"library_name": "peft"}
    if local_folder(name) is None:  # the hub knows its own models only
        entries |= {"base_model": name, "base_model_relation": "adapter"}
    if (known := licence(name, config.model.revision)) is not None:
        entries["license"] = known
    entries["pipeline_tag"] = _PIPELINES[facts["architecture"]]
    if data := sorted(set(_hub_data(facts["data"]["sources"]))):
        entries["datasets"] = data
    entries["tags"] = ["lora", "peft", "lora-one-lab", config.method]
    # JSON is YAML, and quotes what needs it.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return ["---", *lines, "---"]


def _hub_data(sources: Mapping[str, Any]) -> Iterator[str]:
    """Yield the hub's data sets among the sources of the rows, however they are nested."""
    if isinstance(sources.get("hub"), str):
        yield sources["hub"]
    for value in sources.values():
        if isinstance(value, Mapping):
            yield from _hub_data(value)


def _introduction(config: Config, facts: Mapping[str, Any]) -> list[str]:
    trained = f"trained with `{config.optimizer.name}` on `{config.dataset.name}`"
    if not config.trains:
        trained = "not trained (train=none)"
    return [
        f"A plain LoRA of {describe_rank(facts['export'])} for the untouched "
        f"`{config.model.name}`. It was started with **{config.init.direction}** and {trained}."
    ]


def _usage(config: Config, facts: Mapping[str, Any]) -> list[str]:
    loader = AUTO_CLASSES[facts["architecture"]].__name__
    arguments = f'"{config.model.name}"'
    if facts["architecture"] == "classification":
        # One output for each label; a score's head has a single one.
        arguments += f", num_labels={len(TASKS[config.dataset.name].labels) or 1}"
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({arguments})",
        'model = PeftModel.from_pretrained(base, "adapter")',
        "```",
    ]


def _table(config: Config, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "method", f"`{config.method}`"
    if config.method not in ("adalora", "adapter"):
        method = METHODS[config.init.method]
        yield "start", _cell(method.equation)
        yield "source", _cell(method.source)
    gamma = (facts.get("init") or {}).get("stable_gamma")
    if gamma is not None:
        yield "stable gamma", f"{gamma:g}"
    divisor = "sqrt(r)" if config.peft.use_rslora else "r"
    yield (
        "scaling",
        f"alpha / {divisor}, alpha = {config.peft.lora_alpha}, r = {config.peft.lora_r}",
    )
    yield "base weights", f"`{facts['model']['fingerprint']}`"
    yield "licence of the base", licence(config.model.name, config.model.revision) or "see its card"
    template = facts["data"]["template"]
    if facts["architecture"] == "classification":
        yield "texts", _cell(", ".join(f"`{text!r}`" for text in template["texts"]))
    else:
        yield "prompt", _cell(f"`{template['prompt']!r}`")
    yield "data", f"`{config.dataset.name}`"
    yield "training rows", f"{facts['data']['rows']['train']}"
    yield "steps", f"{facts['train']['steps']}"
    yield from _results(facts)
    yield "code", _code(facts["provenance"])


def _results(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metrics, name = facts["metrics"], facts["primary_metric"]
    if name in metrics and name != "validation_loss":
        # Of several replies to a row n counts all; a loss leaves rows out that are too long.
        rows = metrics["n"] if name == "test_loss" else facts["data"]["rows"]["test"]
        yield name, f"{metrics[name]:.4f} of {rows} test rows"
    if metrics["validation_loss"] is not None:
        yield "validation loss", f"{metrics['validation_loss']:.4f}"


def _code(provenance: Mapping[str, Any]) -> str:
    version = f"lora-one {provenance['versions']['lora-one']}"
    if not provenance["git"]:
        return version
    changed = ", changed since" if provenance["git"]["dirty"] else ""
    return f"{version}, commit `{provenance['git']['commit'][:12]}`{changed}"


def _cell(text: str) -> str:
    """Return a text for a table: a docstring's code in single backticks, no bar of its own."""
    return text.replace("``", "`").replace("|", "\\|")
