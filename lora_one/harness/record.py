"""The run folder: one directory that describes one run, complete at every moment.

``run.json`` is replaced atomically, so a reader never sees half of it; ``metrics.jsonl`` grows by
whole lines. Under several ranks only rank 0 writes.
"""

import json
import os
import platform
import shutil
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf

from lora_one.errors import InputError
from lora_one.evaluation.journal import is_part
from lora_one.harness.config import Config
from lora_one.harness.exit_status import INTERRUPTED, TRY_AGAIN
from lora_one.harness.folder import finished_record, read_record, run_id, write_atomically
from lora_one.harness.meter import Meter
from lora_one.harness.peers import Ending, attend, on_end, share


class RunRecord:
    """The folder of one run, and the record in it.

    Args:
        config: The run's configuration.
        writes: False on all ranks but 0; then every method only keeps time.
    """

    def __init__(self, config: Config, *, writes: bool = True) -> None:
        self.config = config
        self.writes = writes
        self.run_id = run_id(config)
        self.folder = Path(config.output_dir) / self.run_id
        self._meter = Meter()
        self._phases: list[str] = []
        self._saving = threading.Lock()
        self.facts: dict[str, Any] = {
            "run_id": self.run_id,
            "status": "running",
            "method": config.method,
            "seed": config.seed,
            "process": {"host": platform.node(), "pid": os.getpid()},
            "started": _now(),
            "metrics": {},
            "phases": {},
        }

    @property
    def finished(self) -> dict[str, Any] | None:
        """The record of an earlier, finished run of the same configuration, as rank 0 sees it."""
        return share(finished_record(self.config))

    def open(self) -> Self:
        """Create the folder; what an unfinished earlier attempt left in it goes.

        Replies that it had made stay: the evaluation sees whether they can still be used.

        Raises:
            InputError: if the folder cannot be written.
        """
        if not self.writes:
            return self
        self._refuse_if_alive()
        try:
            for entry in self.folder.iterdir() if self.folder.exists() else ():
                if not is_part(entry):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            settings = OmegaConf.to_yaml(OmegaConf.create(self.config.model_dump()))
            write_atomically(self.folder / "config.yaml", settings)
            self._save()
        except OSError as error:
            raise InputError(
                f"output_dir={self.config.output_dir} cannot be written: "
                f"{error.strerror or error}. Choose another with output_dir=<folder>."
            ) from error
        return self

    def _refuse_if_alive(self) -> None:
        """Leave a run alone that another process of this machine is doing right now."""
        earlier = read_record(self.folder) or {}
        process = earlier.get("process") or {}
        if earlier.get("status") != "running" or process.get("host") != platform.node():
            return
        if process["pid"] != os.getpid() and Path(f"/proc/{process['pid']}").exists():
            raise InputError(
                f"{self.folder} is being written by process {process['pid']}. Wait for it, or stop "
                "it, or give another output_dir."
            )

    def update(self, **facts: Any) -> None:
        """Add facts to ``run.json``."""
        self.facts.update(facts)
        self._save()

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.writes:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``<folder>/<name>``."""
        if self.writes:
            write_atomically(self.folder / name, json.dumps(value, indent=1) + "\n")

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``<folder>/<name>`` as one JSON object per line."""
        if self.writes:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(self.folder / name, lines)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds and the peak memory of one phase of the run.

        A phase may come more than once, and inside another (a validation during training): it
        adds up, and the outer phase is not charged for it.
        """
        self._book()
        self._phases.append(name)
        yield
        self._book()
        self._phases.pop()
        self._save()

    def seconds(self, name: str) -> float:
        """Return the seconds that a phase has used so far."""
        self._book()
        return self.facts["phases"][name]["seconds"]

    def _book(self) -> None:
        """Charge the innermost phase with what was used since the last booking."""
        seconds, peak = self._meter.lap()
        if self._phases:
            fresh = {"seconds": 0.0, "peak_memory_bytes": 0}
            phase = self.facts["phases"].setdefault(self._phases[-1], fresh)
            phase["seconds"] = round(phase["seconds"] + seconds, 3)
            phase["peak_memory_bytes"] = max(phase["peak_memory_bytes"], peak)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Leave the record ``finished``, or ``preempted`` (interrupted) or ``failed`` with why."""
        # In this order: while an error waits for what another rank says of it, that rank's end
        # can still close the record.
        with on_end(self._close_from_outside), self._closing():
            yield

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            attend(error)
            interrupted = isinstance(error, KeyboardInterrupt)
            self.facts["error"] = {
                "type": type(error).__name__,
                "message": str(error),
                "phase": self._phases[-1] if self._phases else None,
                "traceback": traceback.format_exc(),
            }
            self._close("preempted" if interrupted else "failed")
            raise
        self._close("finished")

    def _close_from_outside(self, ending: Ending) -> None:
        """Close the record in another thread: another rank's end is this run's."""
        # In C and in one go, so that the main thread changes nothing meanwhile.
        facts = json.loads(json.dumps(self.facts))
        with self._saving:
            writes, self.writes = self.writes, False
        if not writes:
            return
        facts["error"] = {
            "type": ending.type,
            "message": str(ending),
            "phase": self._phases[-1] if self._phases else None,
            "traceback": ending.traceback,
        }
        asked = ending.status in (TRY_AGAIN, INTERRUPTED)
        facts |= {"status": "preempted" if asked else "failed", "ended": _now()}
        write_atomically(self.folder / "run.json", json.dumps(facts, indent=1) + "\n")

    def _close(self, status: str) -> None:
        self.update(status=status, ended=_now())

    def _save(self) -> None:
        with self._saving:
            self.write_json("run.json", self.facts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
