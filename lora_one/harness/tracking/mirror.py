"""A Weights & Biases run that shows what a run folder holds; imports no torch.

``metrics.jsonl`` is the source of truth, and line i of it is W&B's internal step i. So a copy can
be taken up again at any line without a gap or a repetition, whatever optimiser steps the lines
speak of; the charts' axis is ``step``.

The live tracker (``follow.py``) and ``scripts/wandb_sync.py`` are the same code: the one copies a
folder while it grows, the other when it lies there.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from omegaconf import OmegaConf
from yaml import YAMLError

from lora_one.errors import InputError
from lora_one.harness.config.schema import WandbConfig
from lora_one.harness.exit_status import DONE, FAILED, TRY_AGAIN
from lora_one.harness.records.folder import read_record

Settings = dict[str, Any]
Say = Callable[[str], None]

EXIT_CODES = {"finished": DONE, "failed": FAILED, "preempted": TRY_AGAIN}
CONNECT_SECONDS = 3.0
# Of the time that a run may wait for W&B at its end: what is left is for Python and the disk.
SHARE_OF_INIT, SHARE_OF_FINISH = 0.4, 0.8
COLUMNS = ("layer", "out", "in", "rank", "sigma_1", "sigma_r", "sigma_r+1")
FACTS = ("status", "losses", "phases", "train")
UPDATE_SPECTRUM = "update_singular_values/"
MEASURES = ("captured_energy", "norm_ratio", "svd_error")


def wandb_id(run_id: str) -> str:
    """Return the id of a run in W&B: the same for every attempt at the same run."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:16]


def read_settings(folder: Path) -> Settings:
    """Return a run folder's ``config.yaml``.

    Raises:
        InputError: if there is none, or it is not one.
    """
    path = folder / "config.yaml"
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("wandb"), dict):
        raise InputError(f"{path} is not the configuration of a run")
    return settings


class Lines:
    """The lines of ``metrics.jsonl``, as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._offset = 0

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every whole line that was not yielded yet, with its index.

        A file that has become shorter is one that a resumed run has cut back to its checkpoint:
        it is read again from its start.

        Raises:
            InputError: if a line is not JSON.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                self.count = self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # half a line: the rest is being written
                try:
                    values = json.loads(line)
                except ValueError as error:
                    where = f"{self.path}, line {self.count + 1}"
                    raise InputError(f"{where}: not JSON ({error})") from error
                index = self.count
                self._offset += len(line)
                self.count += 1
                yield index, values


class Mirror:
    """One run in W&B, offline or online.

    Args:
        folder: The run folder.
        where: Project, entity, name and so on.
        mode: ``online`` or ``offline``; offline files go to ``<folder>/wandb``, complete, in the
            place of those of earlier attempts.
        say: Takes one line for the user.
        directory: Where W&B keeps its files; None: ``<folder>/wandb``.
        live: Whether the run is going on in the parent process; then its load is recorded.
        resumes: Whether W&B keeps the lines that it has of an earlier attempt; otherwise what it
            has under this id is replaced.

    Raises:
        InputError: if the folder is not a run folder.
        wandb.Error: if W&B does not answer in time.
    """

    def __init__(
        self,
        folder: Path,
        where: WandbConfig,
        mode: str,
        say: Say,
        *,
        directory: Path | None = None,
        live: bool = False,
        resumes: bool = False,
    ) -> None:
        import wandb

        self.folder, self.where, self.mode, self._say = folder, where, mode, say
        record = self._record()
        run_id = record["run_id"]
        self._lines = Lines(folder / "metrics.jsonl")
        self._has_provenance = self._has_report = False
        if mode == "offline" and directory is None:
            for earlier in folder.glob("wandb/offline-run-*"):
                shutil.rmtree(earlier)
        machine = {"x_stats_pid": os.getppid()} if live else _NOT_THIS_MACHINE
        self.run = wandb.init(
            id=wandb_id(run_id),
            resume="allow" if resumes and mode == "online" else None,
            mode=mode,
            name=where.name or run_id,
            project=where.project,
            entity=where.entity,
            group=where.group or record.get("wandb", {}).get("group"),
            tags=where.tags,
            config=read_settings(folder) | {"method": record["method"], "run_id": run_id},
            dir=str(directory or folder),
            # Without this, a run that was given up would be handed out in the place of the next.
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                symlink=False,
                disable_git=True,
                disable_code=True,
                program="run_exp.py",
                init_timeout=SHARE_OF_INIT * where.timeout_seconds,
                finish_timeout=SHARE_OF_FINISH * where.timeout_seconds,
                finish_timeout_raises=True,
                **machine,
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self._next = self.run.step

    @property
    def files(self) -> Path:
        """The folder of W&B's own files of this run."""
        return Path(self.run.settings.sync_dir)

    @property
    def lines(self) -> int:
        """The number of lines copied so far."""
        return self._lines.count

    def catch_up(self) -> None:
        """Copy what has come into the folder since the last time."""
        record = self._record()
        if not self._has_provenance and "provenance" in record:
            self._has_provenance = True
            self.run.config.update({"provenance": record["provenance"]}, allow_val_change=True)
        if not self._has_report and (self.folder / "init.json").exists():
            self._has_report = True
            self._try("init report", self._copy_report)
        for index, values in self._lines.new():
            if index >= self._next:
                self.run.log(values, step=index)
                self._next = index + 1

    def close(self) -> str:
        """Copy the rest and the final metrics, tell W&B how the run ended, and return that.

        Raises:
            TimeoutError: if W&B does not take everything in time.
        """
        self.catch_up()
        record = self._record()
        status = record["status"]
        facts = {key: record[key] for key in FACTS if key in record}
        if "error" in record:
            facts["error"] = {key: record["error"][key] for key in ("type", "message", "phase")}
        self.run.summary.update({**facts, **record["metrics"]})
        if self.where.log_plots:
            self._try("plots", self._draw)
        if self.where.log_adapter and status == "finished":
            self._try("adapter", self._copy_adapter)
        if status == "preempted" and self.mode == "online":
            self.run.mark_preempting()
        self.run.finish(exit_code=EXIT_CODES.get(status, FAILED))
        return status

    def _record(self) -> dict[str, Any]:
        record = read_record(self.folder)
        if record is None or not {"run_id", "method", "status", "metrics"} <= record.keys():
            raise InputError(f"{self.folder} is not a run folder: no run.json that can be read")
        return record

    def _try(self, what: str, copy: Callable[[], None]) -> None:
        """Copy something that the run is complete without: tables and files need W&B's answer."""
        try:
            copy()
        except Exception as error:  # W&B raises anything from ValueError to its own kinds
            self._say(f"the {what} could not be copied: {brief(error)}")

    def _copy_report(self) -> None:
        import wandb

        report = json.loads((self.folder / "init.json").read_text(encoding="utf-8"))
        layers = report.pop("layers", [])
        self.run.summary["init"] = {
            key: value for key, value in report.items() if isinstance(value, int | float | str)
        }
        if layers:
            rows = [
                [layer["name"], *layer["shape"], layer["rank"], *_singular_values(layer)]
                + [layer[measure] for measure in MEASURES]
                for layer in layers
            ]
            table = wandb.Table(columns=[*COLUMNS, *MEASURES], data=rows)
            self.run.summary["init_layers"] = table

    def _draw(self) -> None:
        """Draw the losses over the steps, and spectra: the start's and the last update's."""
        from wandb.plot import line_series

        values = [values for _, values in Lines(self._lines.path).new()]
        charts = {}
        curves = {
            key: [(line["step"], line[key]) for line in values if key in line]
            for key in ("loss", "validation_loss")
        }
        curves = {key: points for key, points in curves.items() if points}
        if curves:
            xs, ys = zip(*(zip(*points, strict=True) for points in curves.values()), strict=True)
            charts["plots/losses"] = line_series(xs, ys, list(curves), "losses", "step")
        report_path = self.folder / "init.json"
        if report_path.exists():
            report = json.loads(report_path.read_text(encoding="utf-8"))
            spectra = {
                layer["name"]: layer["singular_values"]
                for layer in report.get("layers", [])
                if layer["singular_values"]
            }
            if spectra:
                title = f"singular values, {report['method']}"
                charts["plots/spectra"] = _spectra(spectra, title)
        # A list has no chart of its own in W&B; the last one of each layer gets one.
        updates = {
            key.removeprefix(UPDATE_SPECTRUM): value
            for line in values
            for key, value in line.items()
            if key.startswith(UPDATE_SPECTRUM)
        }
        if updates:
            charts["plots/update_spectra"] = _spectra(updates, "singular values of the update")
        if charts:
            self.run.log(charts, step=max(self._next - 1, 0))

    def _copy_adapter(self) -> None:
        import wandb

        adapter = self.folder / "adapter"
        if adapter.is_dir():
            artifact = wandb.Artifact(f"adapter-{self.run.id}", type="model")
            for file in sorted(adapter.iterdir()):
                # Immutable: read where it lies. Otherwise W&B would first copy it to the home.
                artifact.add_file(str(file), policy="immutable")
            self.run.log_artifact(artifact)


# What W&B would find out about the machine that copies says nothing about the one that ran.
_NOT_THIS_MACHINE: dict[str, Any] = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def _spectra(layers: dict[str, list[float]], title: str) -> Any:
    """Return a chart of every layer's singular values over their index."""
    from wandb.plot import line_series

    ys = list(layers.values())
    return line_series([list(range(1, len(y) + 1)) for y in ys], ys, list(layers), title, "index")


def _singular_values(layer: dict[str, Any]) -> list[float | None]:
    kept = layer["singular_values"] or [None]
    return [kept[0], kept[-1], layer["next_singular_value"]]


def brief(error: Exception) -> str:
    """Return the first line of what W&B says; more may be a whole web page."""
    return str(error).partition("\n")[0].strip()[:200]


def choose_mode() -> tuple[str, str]:
    """Return ``online`` or ``offline``, and in the latter case why; takes at most seconds."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if settings.mode != "online":
        return "offline", f"W&B's mode is {settings.mode}"
    try:
        if not wandb.login(prompt=False, verify=False):
            return "offline", f"no API key for {settings.base_url}"
    except wandb.errors.AuthenticationError as error:
        return "offline", f"no API key that can be used: {error}"
    if not _reachable(settings.base_url):
        return "offline", f"{settings.base_url} cannot be reached"
    return "online", ""


def _reachable(url: str) -> bool:
    """Tell whether the host, or the proxy in front of it, takes a connection."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy)
    address = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection(address, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
