"""``python -m lora_one.reports [status] <output_dir>``: all runs in a folder, or how far they are.

The table and the report of the finished runs are ``python -m lora_one.reports <output_dir>``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_one.reports import status
from lora_one.reports.command import report


def main(arguments: Sequence[str]) -> int:
    """Do what was asked for; exit status 2 where there is no run."""
    # A folder called status is ./status.
    asks_for_status = list(arguments[:1]) == ["status"]
    return _show_status(arguments[1:]) if asks_for_status else report(arguments)


def _show_status(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_one.reports status",
        description="Say which runs are done, running, stale, preempted, failed and to go.",
    )
    parser.add_argument("output_dir", type=Path, help="the folder that holds the run folders")
    parser.add_argument("--json", action="store_true", help="for other programs")
    options = parser.parse_args(arguments)
    try:
        standings = status.survey(options.output_dir)
    except OSError as error:
        print(f"error: {options.output_dir}: {error.strerror or error}", file=sys.stderr)
        return 2
    if not standings:
        print(f"error: no run and no sweep in {options.output_dir}", file=sys.stderr)
        return 2
    if options.json:
        print(status.to_json(standings))
    else:
        status.render(standings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
