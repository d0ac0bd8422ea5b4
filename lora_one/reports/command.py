"""``python -m lora_one.reports <output_dir>``: print the table, write the report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_one.errors import InputError
from lora_one.harness.exit_status import BAD_INPUT, DONE
from lora_one.reports.records import find_runs
from lora_one.reports.table import render, summarise


def report(arguments: Sequence[str]) -> int:
    """Print the table of all runs in a folder and write tables, plots and a page beside them.

    Returns:
        0, or 2 where there is no run, no such published table, or nowhere to write.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lora_one.reports",
        description="Print the table of all runs in a folder; write tables, plots and report.html.",
        epilog="python -m lora_one.reports status OUTPUT_DIR says how far they are.",
    )
    parser.add_argument("output_dir", type=Path, help="the folder that holds the run folders")
    parser.add_argument(
        "--paper",
        metavar="TABLE",
        help="a published table to stand beside ours, such as lora_one/table2",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes; default OUTPUT_DIR/report"
    )
    options = parser.parse_args(arguments)
    runs = find_runs(options.output_dir)
    if not runs:
        return _refuse(f"no run folder (with a run.json) in {options.output_dir}")
    render(summarise(runs))
    # matplotlib takes a second to import, which a folder without runs should not cost.
    from lora_one.reports.build import build_report

    folder = options.out or options.output_dir / "report"
    try:
        written = build_report(runs, folder, title=_title(options.output_dir), paper=options.paper)
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"the report cannot be written to {folder}: {error.strerror or error}")
    print(
        f"report: {written.folder / 'report.html'} ({written.page_bytes / 1e6:.1f} MB), "
        f"{len(written.files) - 1} tables and plots, {written.seconds:.1f} s"
    )
    return DONE


def _title(output_dir: Path) -> str:
    return f"LoRA-One Lab: {output_dir.resolve().name}"


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT
