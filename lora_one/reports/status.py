"""How far things are: ``python -m lora_one.reports status <output_dir>``.

It reads files and decides nothing: a run that looks ``stale`` here is one whose process gives no
sign of life, by the clock of this machine and the times of the files. Whoever takes such a run
over judges by its own clock alone (``lora_one.harness.records.lease``).
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lora_one.harness.console import make_console
from lora_one.harness.records.lease import Sight, lease_folder, look

STATES = ("done", "running", "stale", "preempted", "failed", "unreadable", "to go")
# A reason and a step are near the end of files that can be long.
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Standing:
    """How far one run is.

    Attributes:
        run_id: Which run.
        state: One of ``STATES``. ``stale``: it says that it is running, and nobody is at it.
        where: Host, process and job, while somebody is or was at it.
        since: When that began, by the clock there.
        heartbeat_age: Seconds since the last sign of life, by the clock here.
        step: The last optimiser step of which something was logged.
        reason: Why it failed, stopped or cannot be read, in one line.
    """

    run_id: str
    state: str
    where: str | None = None
    since: str | None = None
    heartbeat_age: float | None = None
    step: int | None = None
    reason: str | None = None


def survey(output_dir: Path) -> list[Standing]:
    """Look at every run that has a folder, a lease, or a place in a sweep.

    Raises:
        OSError: if ``output_dir`` cannot be read.
    """
    names = {entry.name for entry in output_dir.iterdir() if _is_run_folder(entry)}
    names |= {entry.name for entry in _entries(output_dir / "leases")}
    planned, broken = _planned(output_dir / "sweeps")
    standings = [_judge(output_dir, name, name in planned) for name in sorted(names | planned)]
    return [standing for standing in standings if standing is not None] + broken


def _is_run_folder(entry: Path) -> bool:
    return any((entry / name).is_file() for name in ("run.json", "config.yaml", "metrics.jsonl"))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _planned(sweeps: Path) -> tuple[set[str], list[Standing]]:
    """Return the runs that sweeps have to do, and the lists that cannot be read."""
    planned: set[str] = set()
    broken = []
    for file in _entries(sweeps):
        if file.suffix != ".json":
            continue
        try:
            points = json.loads(file.read_text(encoding="utf-8"))["points"]
            planned |= {str(point["run_id"]) for point in points}
        except (OSError, ValueError, LookupError, TypeError) as error:
            name = f"{sweeps.name}/{file.name}"
            broken.append(Standing(name, "unreadable", reason=_one_line(error)))
    return planned, broken


def _judge(output_dir: Path, name: str, is_planned: bool) -> Standing | None:
    """Say how far a run is; None if there is nothing of it but a lease that was given back."""
    folder = output_dir / name
    sight, record, problem = Sight(0, None, None, None), {}, None
    try:
        sight = look(lease_folder(output_dir, name))
        record = _read_record(folder / "run.json")
    except (OSError, ValueError) as error:
        problem = f"{type(error).__name__}: {_one_line(error)}"
    status = record.get("status")
    if status == "finished":
        return Standing(name, "done")
    if sight.holder is not None:
        return _held(name, sight, _last_step(folder))
    if problem is not None:
        return Standing(name, "unreadable", reason=problem)
    if status in ("failed", "preempted"):
        return Standing(
            name,
            status,
            where=_where(record),
            since=_text(record.get("started")),
            step=_last_step(folder),
            reason=_reason(record),
        )
    if status == "running":
        reason = "says that it is running, and no process holds it"
        where, since = _where(record), _text(record.get("started"))
        return Standing(name, "stale", where, since, step=_last_step(folder), reason=reason)
    if status is not None:
        return Standing(name, "unreadable", reason=f"run.json has status {status!r}")
    if _is_run_folder(folder):
        return Standing(name, "unreadable", reason="there is no run.json in its folder")
    return Standing(name, "to go") if is_planned else None


def _held(name: str, sight: Sight, step: int | None) -> Standing:
    holder, age = sight.holder, sight.beat_age
    job = f" job {holder.job}" if holder.job else ""
    where = f"{holder.host or 'unknown'} process {holder.pid or 'unknown'}{job}"
    state, reason = "running", None
    if holder.is_gone:
        state, reason = "stale", "its process has ended without a word"
    elif age is not None and age > holder.expiry:
        state, reason = "stale", f"no heartbeat for more than {holder.expiry:g} s"
    return Standing(name, state, where, holder.since, age, step, reason)


def _read_record(file: Path) -> dict[str, Any]:
    """Return a record, empty where there is none.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(record, dict):
        raise ValueError(f"run.json holds a {type(record).__name__}, expected an object")
    return record


def _where(record: dict[str, Any]) -> str | None:
    process = record.get("process")
    if not isinstance(process, dict):
        return None
    return f"{process.get('host', 'unknown')} process {process.get('pid', 'unknown')}"


def _reason(record: dict[str, Any]) -> str | None:
    """Return why a run ended, as its record says in one of two places."""
    for key in ("preempted", "error"):
        told = record.get(key)
        if isinstance(told, dict):
            message = _first_line(told.get("reason") or told.get("message"))
            parts = [_text(told.get("type")), message]
            phase = told.get("phase")
            return ": ".join(filter(None, parts)) + (f" (in {phase})" if phase else "")
    return None


def _last_step(folder: Path) -> int | None:
    """Return the last step in ``metrics.jsonl``; half a line at its end is none yet."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    return next(_steps(reversed(lines)), None)


def _steps(lines: Iterator[bytes]) -> Iterator[int]:
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values["step"]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _first_line(value: Any) -> str:
    return next(iter(str(value or "").splitlines()), "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def render(standings: Sequence[Standing]) -> None:
    """Print the counts, and a line for each run that is not done."""
    counts = Counter(standing.state for standing in standings)
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    runs = "1 run" if len(standings) == 1 else f"{len(standings)} runs"
    print(f"{runs}: {', '.join(parts)}")
    # The done ones have a table of their own: python -m lora_one.reports <output_dir>.
    rest = [standing for standing in standings if standing.state != "done"]
    if not rest:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("state", "run", "where", "since", "heartbeat", "step", "reason"):
        table.add_column(column, overflow="fold", no_wrap=column == "state")
    for standing in sorted(rest, key=lambda standing: STATES.index(standing.state)):
        cells = [standing.state, standing.run_id, standing.where, standing.since]
        cells += [_age(standing.heartbeat_age), _text(standing.step), standing.reason]
        table.add_row(*(Text(cell or "") for cell in cells))
    make_console().print(table)


def _age(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def to_json(standings: Sequence[Standing]) -> str:
    """Return everything as JSON, for other programs."""
    counts = Counter(standing.state for standing in standings)
    content = {
        "counts": {state: counts[state] for state in STATES},
        "runs": [asdict(standing) for standing in standings],
    }
    return json.dumps(content, indent=1)
