"""Measure evaluation: the sandbox on HumanEval's own solutions.

    python scripts/benchmark_evaluation.py sandbox path/to/human_eval

Judges the 164 canonical solutions, which must all pass, and then the same programs with every
function's body replaced by ``pass`` and by one that returns a wrong result, of which none may pass.
Exit status 1 if it is otherwise.
"""

import argparse
import ast
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lora_one.evaluation.sandbox import isolation
from lora_one.tasks import create_task
from lora_one.tasks.base import Example


def canonical(example: Example) -> str:
    """Return the benchmark's own solution."""
    return example.target


def body_pass(example: Example) -> str:
    """Return a body that does nothing."""
    return "    pass\n"


def wrong_result(example: Example) -> str:
    """Return a body that computes the right result and returns another."""
    function = ast.parse(example.prompt).body[-1]  # a prompt ends in the function to complete
    names = ", ".join(node.arg for node in ast.walk(function) if isinstance(node, ast.arg))
    right = textwrap.indent(example.target.rstrip(), "    ")
    return f"    def right({names}):\n{right}\n    return ['wrong', right({names})]\n"


CONTESTANTS: dict[str, tuple[Callable[[Example], str], bool]] = {
    "canonical solutions": (canonical, True),
    "bodies replaced by pass": (body_pass, False),
    "results spoilt": (wrong_result, False),
}


def run_sandbox(arguments: argparse.Namespace) -> int:
    """Judge every contestant; print a table; return the exit status."""
    found = isolation()
    cores = len(os.sched_getaffinity(0))
    print(f"isolation: {found.level}; {cores} cores")
    for level, reason in found.refused.items():
        print(f"  {level} was refused: {reason}")
    task = create_task("human_eval", path=arguments.path)
    examples = task.load("test")
    print(f"\n| {'programs':<24} | judged | passed | seconds | verdicts")
    status = 0
    for name, (reply, right) in CONTESTANTS.items():
        start = time.perf_counter()
        rows = task.judge([reply(example) for example in examples], examples)
        seconds = time.perf_counter() - start
        reasons = Counter(row["tests"]["reason"] for row in rows)
        passed = reasons.pop("passed", 0)
        rest = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"| {name:<24} | {len(rows):>6} | {passed:>6} | {seconds:>7.1f} | {rest}")
        if passed != (len(rows) if right else 0):
            status = 1
    return status


def main() -> int:
    """Read the command line and run one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    sandbox = commands.add_parser("sandbox", help="HumanEval's solutions, right and spoilt")
    sandbox.add_argument("path", type=Path, help="HumanEval.jsonl.gz or its folder")
    sandbox.set_defaults(run=run_sandbox)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
