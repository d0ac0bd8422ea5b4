"""Repositories of the Hugging Face hub on this machine: what is there, what is missing, fetch it.

A *snapshot* is a repository at one commit in the hub's cache (``HF_HOME/hub``). The cache keeps
whatever was ever asked for, so the folder of a snapshot says nothing about its files: here a file
counts only if it is there with the size that the hub's own listing of the commit gives.
"""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_one.errors import InputError, NotPreparedError, some

Kind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
# data/train-00001-of-00005.parquet: the second of five
_SHARD = re.compile(r"(.*?)-\d{5}-of-(\d{5})(.*)")


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, in the cache of this machine.

    Attributes:
        repository: Hub id.
        kind: ``model`` or ``dataset``.
        commit: The commit's hash.
        folder: Where the files lie, under their names in the repository.
        sizes: Bytes of every file that the commit has, here or not; None where the cache was
            filled by a tool that keeps no listing.
    """

    repository: str
    kind: Kind
    commit: str
    folder: Path
    sizes: dict[str, int] | None

    @property
    def names(self) -> list[str]:
        """Files of the commit, sorted; without a listing, those that are here."""
        if self.sizes is not None:
            return sorted(self.sizes)
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that are not here whole.

        Without a listing nothing tells a file's size, but the names of a data set's shards tell
        their number (a model's are in its index).
        """
        wanted = set(names)
        if self.sizes is None and self.kind == "dataset":
            wanted = {sibling for name in wanted for sibling in shards(name)}
        return sorted(name for name in wanted if not self._is_whole(name))

    def _is_whole(self, name: str) -> bool:
        path = self.folder / name
        if not path.is_file():
            return False
        return self.sizes is None or path.stat().st_size == self.sizes.get(name)


def is_shard(name: str) -> bool:
    """Say whether a data file's name tells how many others belong to it."""
    return _SHARD.fullmatch(name) is not None


def shards(name: str) -> list[str]:
    """Return all shards of the data file that ``name`` is a shard of, or ``[name]``."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return [name]
    before, count, after = found.groups()
    return [f"{before}-{index:05d}-of-{count}{after}" for index in range(int(count))]


def cached_snapshot(repository: str, kind: Kind, revision: str | None) -> Snapshot | None:
    """Find a repository in the cache of this machine, without any network.

    Args:
        repository: Hub id.
        kind: ``model`` or ``dataset``.
        revision: Branch, tag or commit; None is ``main`` as it was when last fetched.

    Returns:
        The snapshot, some of whose files may be missing, or None.
    """
    try:
        from huggingface_hub import constants, get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:  # a library without the harness has no hub, and so no cache of it
        return None

    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
    commit = revision or constants.DEFAULT_REVISION
    if not _COMMIT.fullmatch(commit):
        reference = home / "refs" / commit
        if not reference.is_file():
            return None
        commit = reference.read_text().strip()
    folder = home / "snapshots" / commit
    if not folder.is_dir():
        return None
    try:
        tree = get_cached_repo_tree(repository, repo_type=kind, revision=commit)
        sizes = {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:
        sizes = None
    return Snapshot(repository, kind, commit, folder, sizes)


def fetch(repository: str, kind: Kind, revision: str | None, names: Iterable[str]) -> Snapshot:
    """Bring files of a repository here, unless they are; names that it does not have are ignored.

    Offline (``HF_HUB_OFFLINE=1``, or no connection) this is a look into the cache.

    Raises:
        NotPreparedError: A file is not here and the hub cannot be asked for it.
        InputError: The hub has no such repository or revision, or does not give it to this user.
    """
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.constants import is_offline_mode
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise InputError(
            f"fetching '{repository}' from the hub needs the 'huggingface-hub' package: "
            "pip install 'lora-one[harness]'"
        ) from None

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise explain(repository, kind, revision, error) from None
    names = list(names)
    if is_offline_mode():
        return _require_here(repository, kind, revision, names)
    if _COMMIT.fullmatch(revision or "") and (known := _whole(repository, kind, revision, names)):
        return known
    try:
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
        )
        snapshot = cached_snapshot(repository, kind, Path(folder).name)
        if snapshot is None:
            raise FileNotFoundError(f"{folder} is not in the cache")
        # A file of the wrong size was damaged here: the hub's client takes it for complete.
        for name in snapshot.missing(set(names) & set(snapshot.names)):
            hf_hub_download(
                repository,
                name,
                repo_type=kind,
                revision=snapshot.commit,
                force_download=True,
            )
    # What the hub's client raises (name resolution, a proxy, a timeout, a gated or missing id)
    # changes between its versions and those of the HTTP library below it; all of it means that the
    # files did not come.
    except Exception as error:
        raise explain(repository, kind, revision, error) from error
    return snapshot


def _whole(repository: str, kind: Kind, commit: str | None, names: list[str]) -> Snapshot | None:
    """A commit never changes: what is here whole needs no question to the hub."""
    snapshot = cached_snapshot(repository, kind, commit)
    if snapshot is None or snapshot.sizes is None:
        return None
    return None if snapshot.missing(set(names) & set(snapshot.names)) else snapshot


def _require_here(repository: str, kind: Kind, revision: str | None, names: list[str]) -> Snapshot:
    snapshot = cached_snapshot(repository, kind, revision)
    at = f" at revision {revision}" if revision else ""
    if snapshot is None:
        raise NotPreparedError(
            f"the {kind} '{repository}'{at} is not on this machine, and HF_HUB_OFFLINE=1 forbids "
            "to fetch it"
        )
    missing = snapshot.missing(set(names) & set(snapshot.names))
    if missing:
        raise NotPreparedError(
            f"the {kind} '{repository}'{at} is here in part only: {some(missing)} missing or cut "
            f"short in {snapshot.folder}, and HF_HUB_OFFLINE=1 forbids to fetch it"
        )
    return snapshot


def explain(repository: str, kind: Kind, revision: str | None, error: Exception) -> InputError:
    """Turn an error of the hub's client into one that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    if isinstance(error, GatedRepoError):
        return InputError(
            f"the {kind} '{repository}' is gated: ask for access on {page}, then log in with "
            "`hf auth login`"
        )
    if isinstance(error, HFValidationError):
        return InputError(f"'{repository}' is neither a local folder nor the id of a {kind}")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"the hub has no {kind} '{repository}', or it is private: check the name, or log in "
            "with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"the {kind} '{repository}' has no revision '{revision}' on the hub")
    lines = str(error).strip().splitlines() or ["no message"]
    return NotPreparedError(
        f"the {kind} '{repository}' could not be fetched from the hub "
        f"({type(error).__name__}: {lines[0]})"
    )
