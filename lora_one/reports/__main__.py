"""``python -m lora_one.reports <output_dir>``: the table and the report of all runs in a folder."""

import sys
from collections.abc import Sequence

from lora_one.reports.command import report


def main(arguments: Sequence[str]) -> int:
    """Do what was asked for; exit status 2 where there is no run."""
    return report(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
