"""Which files of a data set on the hub hold one split, and where they are on this machine.

The files are read by ``rows``, from the hub's own cache: ``datasets.load_dataset`` keeps a second
copy of every row, cannot read the hub's cache without a network, and offline takes the copy that
was prepared last, whatever revision was asked for.

A repository says in the ``configs`` of its README which files are which split; one that does not
is read as ``datasets`` would, by words such as ``train`` or ``test`` in the files' names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_one.errors import InputError, NotPreparedError, nearest
from lora_one.snapshots import Snapshot, cached_snapshot, fetch, is_shard

README = "README.md"
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz")
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split on this machine, and the commit that they are of."""

    commit: str
    names: list[str]
    paths: list[Path]


def fetch_split(hub_id: str, config: str | None, split: str, revision: str | None) -> SplitFiles:
    """Bring the files of one split here, unless they are.

    Args:
        hub_id: Id of the data set.
        config: One of its configurations; None where it has one only, or a default.
        split: Name of the split in the repository.
        revision: Branch, tag or commit; None is the newest.

    Raises:
        NotPreparedError: The files are not here and the hub cannot be reached.
        InputError: No such data set, revision, configuration or split.
    """
    snapshot = fetch(hub_id, "dataset", revision, [README])
    names = split_names(snapshot, config, split)
    snapshot = fetch(hub_id, "dataset", snapshot.commit, names)
    missing = snapshot.missing(names)
    if missing:
        raise NotPreparedError(f"the dataset '{hub_id}' is here in part only: no {missing[0]}")
    return SplitFiles(snapshot.commit, names, [snapshot.folder / name for name in names])


def split_is_here(hub_id: str, config: str | None, split: str, revision: str | None) -> bool:
    """Say whether every file that ``fetch_split`` would return is on this machine, whole."""
    snapshot = cached_snapshot(hub_id, "dataset", revision)
    if snapshot is None or (README in snapshot.names and snapshot.missing([README])):
        return False
    try:
        return not snapshot.missing(split_names(snapshot, config, split))
    except InputError:
        return False


def split_names(snapshot: Snapshot, config: str | None, split: str) -> list[str]:
    """Choose the files of one split among the names of a snapshot.

    Without the hub's listing of the commit, a name that is only matched may be one of several:
    then the README has to name every file, or a file's name the number of its shards.

    Raises:
        NotPreparedError: Nothing here tells which files the split has.
        InputError: The repository has no such configuration or split, or no file for it.
    """
    files = [name for name in snapshot.names if _is_data(name)]
    listed = snapshot.sizes is not None
    if not listed and README not in snapshot.names:
        raise _unknown(snapshot, README)
    declared = _declared(snapshot)
    if declared:
        patterns = _patterns(snapshot.repository, declared, config, split)
        named = [pattern for pattern in patterns if not _is_glob(pattern) and _is_data(pattern)]
        names = _match(files if listed else sorted({*files, *named}), patterns)
    else:
        if config is not None:
            # Branches such as refs/convert/parquet have no README, and a folder a configuration.
            files = [name for name in files if config in PurePosixPath(name).parts[:-1]]
        names, named = _by_words(files, split), []
    for name in () if listed else names:
        if name not in named and not is_shard(name):
            raise _unknown(snapshot, name)
    if not names:
        raise InputError(
            f"the dataset '{snapshot.repository}' has no file for the split '{split}'"
            f"{'' if config is None else f' of {config}'}; its data files: "
            f"{', '.join(files[:8]) or 'none'}"
        )
    return names


def _unknown(snapshot: Snapshot, name: str) -> NotPreparedError:
    return NotPreparedError(
        f"the dataset '{snapshot.repository}' was brought into {snapshot.folder} by a tool that "
        f"keeps no listing, and nothing tells whether {name} is all there is"
    )


def _is_glob(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    # Not outside the repository either: a README may name "../file" or "/file".
    hidden = any(part.startswith((".", "__", "/")) for part in path.parts)
    return name.endswith(DATA_SUFFIXES) and path.name not in _NO_DATA and not hidden


def _declared(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return the ``configs`` in the README's header that name files.

    Raises:
        InputError: The header is no YAML, or the ``configs`` are no list of mappings with names.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    readme = snapshot.folder / README
    if not readme.is_file():
        return []
    try:
        header = metadata_load(readme) or {}
    except (YAMLError, ValueError) as error:
        raise _malformed(snapshot.repository, " ".join(str(error).split())) from None
    configs = header.get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(entry, dict) for entry in configs):
        raise _malformed(snapshot.repository, "configs is no list of mappings")
    declared = [entry for entry in configs if entry.get("data_files")]
    if not all(isinstance(entry.get("config_name"), str) for entry in declared):
        raise _malformed(snapshot.repository, "an entry of configs has no config_name")
    return declared


def _malformed(hub_id: str, reason: str) -> InputError:
    return InputError(
        f"the README of the dataset '{hub_id}' says which files a split has, and cannot be read: "
        f"{reason}. Download the files and pass dataset.path=<file or folder>."
    )


def _patterns(
    hub_id: str, declared: list[dict[str, Any]], config: str | None, split: str
) -> list[str]:
    entry = _choose_config(hub_id, declared, config)
    folder = entry.get("data_dir")
    by_split: dict[str, list[str]] = {}
    for name, patterns in _pairs(entry["data_files"]):
        if not all(isinstance(text, str) for text in (name, *patterns)):
            raise _malformed(hub_id, f"data_files of {entry['config_name']} are no paths by split")
        by_split.setdefault(name, []).extend(patterns)
    if split not in by_split:
        raise InputError(
            f"the dataset '{hub_id}' has no split '{split}'; it has: {', '.join(by_split)}."
            f"{nearest(split, by_split)}"
        )
    return [f"{folder}/{pattern}" if folder else pattern for pattern in by_split[split]]


def _choose_config(
    hub_id: str, declared: list[dict[str, Any]], config: str | None
) -> dict[str, Any]:
    names = [entry["config_name"] for entry in declared]
    if config is not None:
        chosen = [entry for entry in declared if entry["config_name"] == config]
    else:
        chosen = [e for e in declared if e.get("default") or e["config_name"] == "default"]
        chosen = chosen or (declared if len(declared) == 1 else [])
    if not chosen:
        raise InputError(
            f"the dataset '{hub_id}' has no configuration '{config or 'default'}'; it has: "
            f"{', '.join(names)}.{nearest(str(config), names)}"
        )
    return chosen[0]


def _pairs(data_files: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yield (split, patterns) from every form in which a README may write ``data_files``.

    What has no such form comes as it is: other things than texts.
    """
    if isinstance(data_files, Mapping):
        for split, path in data_files.items():
            yield split, path if isinstance(path, list) else [path]
        return
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        if isinstance(entry, Mapping):
            path = entry.get("path")
            yield entry.get("split"), path if isinstance(path, list) else [path]
        else:
            yield "train", [entry]


def _match(files: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the files that match a pattern, in the order of the patterns, then of the names."""
    found: dict[str, None] = {}
    for pattern in patterns:
        expression = _expression(pattern)
        found |= dict.fromkeys(name for name in files if expression.fullmatch(name))
    return list(found)


def _expression(pattern: str) -> re.Pattern[str]:
    """Translate a shell pattern: ``*`` stays within a folder, ``**`` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(part) or (part if part.startswith("[") else re.escape(part))
            for part in parts
        )
    )


def _by_words(files: Sequence[str], split: str) -> list[str]:
    """Return the files whose name or folder says the split; where none says any, all train."""
    said = {name: _said_split(name) for name in files}
    if not any(said.values()):
        return list(files) if split == "train" else []
    return [name for name, word in said.items() if word == split]


def _said_split(name: str) -> str | None:
    path = PurePosixPath(name)
    # A folder's word counts before a file's, as in datasets.
    for part in (*path.parts[:-1], path.name):
        words = re.split(r"[-._ 0-9]+", part)
        for split, valid in _WORDS.items():
            if any(word in valid for word in words):
                return split
    return None
