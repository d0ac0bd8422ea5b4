"""Write docs/configuration.md: every key of the configuration, from the schema and from conf/.

    python scripts/config_reference.py        (or: make docs)

Names, values and meanings are those of ``lora_one/harness/config/schema.py`` and, for the options
of one benchmark, of its class; defaults are what Hydra composes; the choices of a group are its
files.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose
from omegaconf import OmegaConf
from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lora_one.harness.config.compose import composer
from lora_one.harness.config.schema import GROUPS, Config
from lora_one.harness.config.task_options import parameters
from lora_one.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
CONF = ROOT / "conf"
INTRODUCTION = """\
# Configuration

Every key, from the schema (`lora_one/harness/config/schema.py`) and the files of `conf/`. `make
docs` writes this page; change the sources, not the page.

`group=choice` takes a file of `conf/<group>/`, `section.key=value` sets one key, and `-m` sweeps
over `group=a,b` and `key=1,2`. Defaults are those of `python run_exp.py` alone; what a choice sets
otherwise is listed with it. `${seed}` is the value of `seed`. A key that nothing reads is an error.
`python run_exp.py <overrides> --cfg job` prints what a command line comes to."""
KINDS = {"integer": "int", "number": "number", "string": "text", "object": "mapping"}
UNLISTED = {"architecture"}  # long, and read by dry runs alone

Values = Mapping[str, Any]


def page() -> str:
    """Return the page."""
    schema = Config.model_json_schema()
    properties = schema["properties"]
    with composer(CONF):
        defaults = OmegaConf.to_container(compose("config"), resolve=False)
    sections = {key: _variants(entry, schema) for key, entry in properties.items()}
    for variants in sections.values():
        for variant in variants:
            variant["properties"] = _flat(variant["properties"], schema)
    top = [key for key, variants in sections.items() if not variants]
    parts = [INTRODUCTION, "## Top level", _keys("", properties, top, defaults)]
    for key in dict.fromkeys([*sections, *GROUPS]):
        variants, choices = sections.get(key), _files(key)
        if variants or choices:
            parts.append(f"## {key}")
        if variants:
            note = properties[key].get("description", "")
            parts += _section(key, note, variants, choices, defaults[key] or {})
        if choices:
            parts.append(_choices(key, choices, defaults[key] if variants else None))
    return "\n\n".join(parts) + "\n"


def _files(group: str) -> dict[str, Values]:
    """Return the contents of a group's files, with what they take over from others."""
    files = {}
    for file in sorted((CONF / group).rglob("*.yaml")):
        name = file.relative_to(CONF / group).with_suffix("").as_posix()
        files[name] = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return {name: _whole(content, files) for name, content in files.items()}


def _whole(content: Values, files: Mapping[str, Values]) -> Values:
    whole: dict[str, Any] = {}
    for parent in content.get("defaults", []):
        if isinstance(parent, str) and parent in files:  # of this group
            whole |= _whole(files[parent], files)
    return whole | {key: value for key, value in content.items() if key != "defaults"}


def _variants(entry: Values, schema: Values) -> list[Values]:
    """Return the schemas that a section can have: none for a single value."""
    branches = entry.get("oneOf") or entry.get("anyOf") or [entry]
    references = [branch["$ref"] for branch in branches if "$ref" in branch]
    return [schema["$defs"][reference.rpartition("/")[2]] for reference in references]


def _flat(properties: Values, schema: Values) -> dict[str, Any]:
    """Return the keys of a section, those of a section within it as ``section.key``."""
    flat: dict[str, Any] = {}
    for key, entry in properties.items():
        inner = [_flat(variant["properties"], schema) for variant in _variants(entry, schema)]
        flat |= {f"{key}.{name}": value for part in inner for name, value in part.items()}
        flat |= {} if inner else {key: entry}
    return flat


def _section(
    key: str, note: str, variants: list[Values], choices: Mapping[str, Values], default: Values
) -> list[str]:
    """Return what a section is and the tables of its keys: of all its variants, then of each."""
    common = variants[0]["properties"]
    said = _plain(f"{variants[0]['description']} {note}")
    parts = [said, _keys(key, common, common, default)]
    for variant in variants[1:]:
        properties = variant["properties"]
        kinds = properties["name"].get("enum") or [properties["name"]["const"]]
        values = next(choice for choice in choices.values() if choice["name"] in kinds)
        own = [name for name in properties if name not in common]
        parts.append(f"{_with(key, kinds)} {_plain(variant['description'])}")
        parts.append(_keys(key, properties, own, values))
    return [*parts, *_options(choices, common)] if key == "dataset" else parts


def _with(section: str, names: Iterable[str]) -> str:
    return f"`{section}.name` = {', '.join(map(_code, names))}:"


def _options(choices: Mapping[str, Values], common: Values) -> list[str]:
    """Return the table of each benchmark's own options, one for benchmarks that have the same."""
    tables: dict[str, list[str]] = {}
    for name in sorted(TASKS):
        own = [key for key in parameters(name) if key not in common]
        hints = get_type_hints(TASKS[name].__init__, include_extras=True)
        meanings = _meanings(TASKS[name])
        properties = {
            key: TypeAdapter(hints[key]).json_schema() | {"description": meanings[key]}
            for key in own
        }
        values = next(choice for choice in choices.values() if choice["name"] == name)
        if own:
            tables.setdefault(_keys("dataset", properties, own, values), []).append(name)
    return [part for table, names in tables.items() for part in (_with("dataset", names), table)]


def _meanings(task: type) -> dict[str, str]:
    """Return what a benchmark's docstring, or that of its parent class, says of its options."""
    documented = next(cls for cls in task.__mro__ if "Args:" in (cls.__doc__ or ""))
    said = inspect.getdoc(documented).partition("Args:\n")[2].replace("None", "null")
    return dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", said, re.MULTILINE))


def _keys(section: str, properties: Values, keys: Iterable[str], defaults: Values) -> str:
    prefix = f"{section}." if section else ""
    rows = [
        (
            _code(f"{prefix}{key}"),
            _kind(properties[key]),
            _code(defaults[key]) if key in defaults else "",
            _plain(properties[key]["description"]),
        )
        for key in keys
    ]
    return _table(("key", "values", "default", ""), rows)


def _choices(group: str, choices: Mapping[str, Values], default: Values | None) -> str:
    """Return the table of a group's files: what each is, and what it sets otherwise than above.

    Args:
        group: Its name.
        choices: The contents of its files.
        default: The section of the default choice; None where the group is no section.
    """
    rows = []
    for name, values in choices.items():
        row = [_code(name), _header(CONF / group / f"{name}.yaml")]
        if default is not None:
            # What is shown above for a variant or a benchmark is its first file's.
            kin = next(c for c in choices.values() if _kin(group, c) == _kin(group, values))
            above = {**kin, **default}
            sets = [
                _code(f"{key}={_yaml(value)}")
                for key, value in values.items()
                if key not in UNLISTED and value != above[key] and (key, value) != ("name", name)
            ]
            row.append(", ".join(sets))
        rows.append(row)
    head = (f"`{group}=`", "", "sets")
    return _table(head[: len(rows[0])], rows)


def _kin(group: str, values: Values) -> Any:
    return values["name"] if group == "dataset" else set(values)


def _kind(entry: Values) -> str:
    """Say in a few words which values a JSON schema allows."""
    if "anyOf" in entry:
        return " or ".join(_kind(branch) for branch in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(map(_code, entry["enum"]))
    if "const" in entry:
        return _code(entry["const"])
    match entry.get("type"):
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "array":
            return f"list of {_kind(entry['items'])}"
        case "string" if entry.get("format") == "path":
            return "path"
        case kind:
            return KINDS[kind] + _range(entry)


def _range(entry: Values) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    return ",".join(f" {sign} {entry[name]:.10g}" for name, sign in signs.items() if name in entry)


def _header(file: Path) -> str:
    """Return the first sentence of a file's comment."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    comment = [line.removeprefix("#") for line in lines[: _length(lines)]]
    return _plain(re.split(r"(?<=\.)\s|:\s*$", " ".join(comment))[0])


def _length(lines: list[str]) -> int:
    return next((at for at, line in enumerate(lines) if not line.startswith("# ")), len(lines))


def _plain(text: str) -> str:
    """Return text on one line, for Markdown: what stands between backticks is code."""
    prose_and_code = " ".join(text.replace("``", "`").split()).split("`")
    prose_and_code[::2] = [prose.replace("<", "&lt;") for prose in prose_and_code[::2]]
    return "`".join(prose_and_code)


def _code(value: Any) -> str:
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value or "''"
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return flow.removesuffix("...\n").strip()


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
