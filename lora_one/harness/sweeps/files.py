"""What a sweep leaves in ``<output_dir>/sweeps``: the list of its runs, and their table."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lora_one.harness.config.compose import Point
from lora_one.harness.console import say
from lora_one.harness.records.folder import run_id, write_atomically


class SweepFiles:
    """The runs of a sweep, and the files about all of them.

    Attributes:
        runs: Run folder -> point; points that differ in what nothing reads are one run.
        digest: Names the sweep, by its runs.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.runs: dict[Path, Point] = {}
        for point in points:
            self.runs.setdefault(Path(point.config.output_dir) / run_id(point.config), point)
        names = "\n".join(folder.name for folder in self.runs)
        self.digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        self._stem = Path(points[0].config.output_dir) / "sweeps" / self.digest

    def announce(self) -> None:
        """Write down what there is to do, for whoever asks how far it is."""
        file = self._stem.with_suffix(".json")
        here = {
            folder.name: list(point.overrides)
            for folder, point in self.runs.items()
            if folder.parent == file.parent.parent
        }
        points = [{"run_id": name, "overrides": overrides} for name, overrides in here.items()]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"points": points}, indent=1) + "\n")
        except OSError as error:
            say(f"warning: what this sweep has to do could not be written to {file}: {error}")

    def show_table(self) -> None:
        """Print the table of the runs, and keep it."""
        from lora_one.reports.records import load_runs
        from lora_one.reports.table import render, summarise, to_csv, to_markdown

        table = summarise(load_runs(self.runs))
        render(table)
        try:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._stem.with_suffix(".md"), to_markdown(table))
            write_atomically(self._stem.with_suffix(".csv"), to_csv(table))
        except OSError as error:
            say(f"warning: the table could not be written to {self._stem.parent}: {error}")
        else:
            say(f"table: {self._stem}.md and .csv")
