"""The run folder: one directory that describes one run, complete at every moment.

``run.json`` is replaced atomically, so a reader never sees half of it; ``metrics.jsonl`` grows by
whole lines, and is cut back to the length that it had at the checkpoint that a run goes on from.
Under several ranks only rank 0 writes.
"""

import json
import os
import platform
import shutil
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf

from lora_one.errors import InputError, PreemptedError, RunHeldError
from lora_one.evaluation.journal import is_part
from lora_one.harness.config.schema import Config
from lora_one.harness.distributed.peers import Ending, attend, on_end, share
from lora_one.harness.exit_status import INTERRUPTED, TRY_AGAIN
from lora_one.harness.records.attempts import earlier_attempts, new_attempt, now, require_progress
from lora_one.harness.records.folder import (
    finished_record,
    read_record,
    run_id,
    sync,
    write_atomically,
)
from lora_one.harness.records.lease import TOKEN_VARIABLE, Lease, acquire, lease_folder
from lora_one.harness.records.meter import Meter
from lora_one.harness.records.storage import as_storage_error
from lora_one.harness.resuming import checkpoint as checkpoints
from lora_one.harness.resuming import preemption
from lora_one.harness.resuming.checkpoint import Checkpoint

METRICS = "metrics.jsonl"
# What a resumed run keeps; the rest is made again.
KEPT = {checkpoints.FOLDER, METRICS, "init.json", "run.json", "wandb"}
# What the record knows when a checkpoint is written, in that checkpoint.
KNOWN, KNOWN_FACTS = "record.json", ("losses", "init", "diagnostics", "phases")


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
        self._lease: Lease | None = None
        self.resumed: Checkpoint | None = None
        self._meter = Meter()
        self._phases: list[str] = []
        self._saving = threading.Lock()
        self.facts: dict[str, Any] = {
            "run_id": self.run_id,
            "status": "running",
            "method": config.method,
            "seed": config.seed,
            "process": {"host": platform.node(), "pid": os.getpid()},
            "started": now(),
            "metrics": {},
            "phases": {},
            "attempts": [new_attempt(0)],
        }

    @property
    def finished(self) -> dict[str, Any] | None:
        """The record of an earlier, finished run of the same configuration, as rank 0 sees it."""
        return share(finished_record(self.config))

    def acquire(self) -> AbstractContextManager[Any] | None:
        """Take the run for this command: no other may write into its folder meanwhile.

        Returns:
            What gives the run back when it is left; hold it until the record is closed. None if
            another process has finished the run since this one looked.

        Raises:
            RunHeldError: on every rank, if another process is doing the run.
            InputError: if the output folder cannot be written.
        """
        refusal, finished = None, False
        if self.writes:
            # A sweep has taken the lease for its point already.
            token = os.environ.pop(TOKEN_VARIABLE, None)
            try:
                folder = lease_folder(self.config.output_dir, self.run_id)
                self._lease = acquire(folder, token=token)
                finished = finished_record(self.config) is not None
            except RunHeldError as error:
                refusal = str(error)
            except OSError as error:
                raise self._cannot_be_written(error) from error
        refusal, finished = share([refusal, finished])
        if refusal is not None:
            raise RunHeldError(refusal)
        lease = self._lease or nullcontext()
        if not finished:
            return lease
        with lease:
            return None

    def _cannot_be_written(self, error: OSError) -> InputError:
        return InputError(
            f"output_dir={self.config.output_dir} cannot be written: "
            f"{error.strerror or error}. Choose another with output_dir=<folder>."
        )

    def open(self, checkpoint: Checkpoint | None = None) -> Self:
        """Create the folder, or go back to what it was when a checkpoint was written.

        What an unfinished earlier attempt did after that goes. Replies that it had made stay: the
        evaluation sees whether they can still be used.

        Args:
            checkpoint: What the run goes on from; None: from the start.

        Raises:
            InputError: if the folder cannot be written, or the last attempts made no progress.
        """
        self.resumed = checkpoint
        if checkpoint is not None:
            self.facts.update(checkpoint.read_json(KNOWN))
        if not self.writes:
            return self
        attempts = earlier_attempts(read_record(self.folder), self.folder)
        require_progress(attempts, self.config.preemption.max_attempts, self.folder)
        attempt = new_attempt(0 if checkpoint is None else checkpoint.step)
        self.facts["attempts"] = [*attempts, attempt]
        try:
            for entry in self.folder.iterdir() if self.folder.exists() else ():
                kept = checkpoint is not None and entry.name in KEPT
                # The record goes last: it says how many attempts there were.
                if not (kept or is_part(entry) or entry.name == "run.json"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if checkpoint is not None:
                checkpoints.drop_others(self.folder, checkpoint)
                for name, length in checkpoint.lengths.items():
                    os.truncate(self.folder / name, length)
            self.folder.mkdir(parents=True, exist_ok=True)
            settings = OmegaConf.to_yaml(OmegaConf.create(self.config.model_dump()))
            write_atomically(self.folder / "config.yaml", settings)
            self._save()
        except OSError as error:
            raise self._cannot_be_written(error) from error
        return self

    def update(self, **facts: Any) -> None:
        """Add facts to ``run.json``."""
        self.facts.update(facts)
        self._save()

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        if not self._may_write():
            return
        path = self.folder / METRICS
        length = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError:
            # A disk that is full may have taken half of the line.
            with suppress(OSError):
                os.truncate(path, length)
            raise

    def keep(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write the checkpoint of a step: what ``fill`` writes, and what the record knows."""
        if not self._may_write():
            return
        metrics = self.folder / METRICS
        metrics.touch()
        sync(metrics)
        self._book()

        def fill_all(folder: Path) -> None:
            fill(folder)
            known = {name: self.facts[name] for name in KNOWN_FACTS if name in self.facts}
            (folder / KNOWN).write_text(json.dumps(known) + "\n", encoding="utf-8")

        checkpoints.write_checkpoint(
            self.folder,
            step,
            fill_all,
            lengths={METRICS: metrics.stat().st_size},
            keep=self.config.checkpoints.keep,
        )
        self._attempt["step"] = step
        self._save()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``<folder>/<name>``."""
        if self._may_write():
            write_atomically(self.folder / name, json.dumps(value, indent=1) + "\n")

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``<folder>/<name>`` as one JSON object per line."""
        if self._may_write():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(self.folder / name, lines)

    def _may_write(self) -> bool:
        """Tell whether this rank writes; the process ends here if the run is no longer its."""
        if self.writes and self._lease is not None:
            self._lease.verify()
        return self.writes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds and the peak memory of one phase of the run.

        A phase may come more than once, and inside another (a validation during training): it
        adds up, and the outer phase is not charged for it. Only the end of an outer phase is
        written down: that takes longer than a short inner one.

        Raises:
            PreemptedError: the run was asked to stop, and that did not get through.
        """
        preemption.heed()
        self._book()
        if not self._phases:
            self._attempt["phase"] = name
            self._attempt["phases_entered"] += 1
            self._save()
        self._phases.append(name)
        yield
        self._book()
        self._phases.pop()
        if not self._phases:
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
        """Leave the record ``finished``, or ``preempted`` (interrupted) or ``failed`` with why.

        Raises:
            StorageError: in place of an error that means that the folder cannot be written.
        """
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
            preemption.leave_in_peace()
            storage = as_storage_error(error, self.folder)
            phase = self._phases[-1] if self._phases else self._attempt["phase"]
            if isinstance(error, PreemptedError):
                reason = {"reason": str(error), "requeues": error.requeues}
                self.facts["preempted"] = reason | {"phase": phase}
            else:
                self.facts["error"] = {
                    "type": type(error).__name__,
                    "message": str(storage or error),
                    "phase": phase,
                    "traceback": traceback.format_exc(),
                }
            stopped = isinstance(error, PreemptedError | KeyboardInterrupt)
            # Where the folder cannot be written, the message must do.
            with suppress(OSError) if storage else nullcontext():
                self._close("preempted" if stopped else "failed")
            if storage is not None:
                raise storage from error
            raise
        self._close("finished")
        if self.writes:
            shutil.rmtree(self.folder / checkpoints.FOLDER, ignore_errors=True)

    def _close_from_outside(self, ending: Ending) -> None:
        """Close the record in another thread: another rank's end is this run's."""
        # In C and in one go, so that the main thread changes nothing meanwhile.
        facts = json.loads(json.dumps(self.facts))
        with self._saving:
            writes, self.writes = self.writes, False
        if not writes:
            return
        phase = self._phases[-1] if self._phases else None
        if ending.type == PreemptedError.__name__:
            # Nobody is left to requeue the job.
            facts["preempted"] = {"reason": ending.message, "requeues": False, "phase": phase}
        else:
            facts["error"] = {
                "type": ending.type,
                "message": str(ending),
                "phase": phase,
                "traceback": ending.traceback,
            }
        asked = ending.status in (TRY_AGAIN, INTERRUPTED)
        facts |= {"status": "preempted" if asked else "failed", "ended": now()}
        write_atomically(self.folder / "run.json", json.dumps(facts, indent=1) + "\n")
        if self._lease is not None:
            self._lease.release()

    def _close(self, status: str) -> None:
        self._book()
        self._attempt.update({"status": status, "ended": now()})
        self.update(status=status, ended=now())

    @property
    def _attempt(self) -> dict[str, Any]:
        return self.facts["attempts"][-1]

    def _save(self) -> None:
        with self._saving:
            self.write_json("run.json", self.facts)
