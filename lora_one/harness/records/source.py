"""The source code of a run: which commit it is, and a copy that later edits do not reach.

A snapshot is a folder with what a run executes and reads of this repository, and a
``source.json`` that says where it comes from. It has no history, so that whoever asks it for its
commit is told what was true when it was made. Imports no torch.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_one.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = "source.json"
# What a run executes and reads, beside its entry point. Of the data only what is in the history:
# what else lies there has a path, and paths keep their meaning.
CODE = ("conf", "lora_one")
DATA = ("data",)


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """Return the commit of the code below ``root`` and whether it was changed since.

    None where there is no history: an installed package has a version instead.
    """
    try:
        # Before git, which would describe the checkout that a snapshot may lie in.
        return json.loads((root / ORIGIN).read_text(encoding="utf-8"))["git"]
    except FileNotFoundError:
        pass
    try:
        return {
            "commit": _git(root, "rev-parse", "HEAD").strip(),
            "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(root: Path = ROOT) -> Path:
    """Return the folder that the snapshot ``root`` was taken of; of no snapshot, ``root``."""
    try:
        return Path(json.loads((root / ORIGIN).read_text(encoding="utf-8"))["from"])
    except FileNotFoundError:
        return root


def snapshot_name(program: Path) -> str:
    """Return the name that a snapshot of the code around ``program`` has: a hash of all of it."""
    return _digest(_sources(program), commit(program.parent))


def take_snapshot(program: Path, folder: Path) -> Path:
    """Copy the code around ``program`` to ``<folder>/<hash>``, unless it is there already.

    Args:
        program: The entry point; ``conf``, ``lora_one`` and ``data`` lie beside it.
        folder: Where snapshots are kept.

    Returns:
        The entry point in the snapshot.

    Raises:
        InputError: the snapshot is there, and somebody has changed it.
    """
    root, files, git = program.parent, _sources(program), commit(program.parent)
    target = folder / _digest(files, git)
    if target.exists():
        copies = {name: target / name for name in files}
        whole = all(path.is_file() for path in copies.values())
        if not whole or _digest(copies, commit(target)) != target.name:
            raise InputError(
                f"{target} has been changed since it was made. Delete it, once no job that was "
                "submitted with it is left."
            )
        return target / program.name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        copy = Path(temporary) / target.name
        for name, path in files.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy / name)
        origin = {"git": git, "from": str(root)}
        (copy / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        try:
            copy.rename(target)
        except OSError:
            # Another command has made the same one in the meantime.
            if not target.exists():
                raise
    return target / program.name


def _sources(program: Path) -> dict[str, Path]:
    """Return the files to copy: path below the program's folder -> file."""
    root = program.parent
    names = {program.name, *_listed(root, CODE, "--cached", "--others"), *_listed(root, DATA)}
    return {name: root / name for name in sorted(names) if (root / name).is_file()}


def _listed(root: Path, folders: Iterable[str], *which: str) -> set[str]:
    """List the files of some folders as git knows them; all of them where git knows none."""
    try:
        listed = _git(root, "ls-files", "-z", "--exclude-standard", *which, "--", *folders)
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    if listed:
        return set(filter(None, listed.split("\0")))
    files = [file for folder in folders for file in (root / folder).rglob("*")]
    names = {file.relative_to(root) for file in files}
    return {
        str(name)
        for name in names
        if "__pycache__" not in name.parts and name.parts[:2] != ("data", "cache")
    }


def _digest(files: Mapping[str, Path], git: Mapping[str, Any] | None) -> str:
    digest = hashlib.sha256(json.dumps(git, sort_keys=True).encode())
    for name, path in files.items():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"\0{name}\0{content}".encode())
    return digest.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
