"""Measure evaluation: the sandbox on HumanEval's own solutions, and batched generation.

    python scripts/benchmark_evaluation.py sandbox path/to/human_eval
    python scripts/benchmark_evaluation.py generation          # the embedded model and test rows

``sandbox`` judges the 164 canonical solutions, which must all pass, and then the same programs with
every function's body replaced by ``pass`` and by one that returns a wrong result, of which none may
pass. ``generation`` answers the same rows one prompt at a time and in batches, which must give the
same answers. Exit status 1 if it is otherwise.
"""

import argparse
import ast
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lora_one.evaluation import generate_replies
from lora_one.evaluation.sandbox import isolation
from lora_one.tasks import create_task
from lora_one.tasks.base import Example

ROOT = Path(__file__).resolve().parent.parent


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


def one_at_a_time(
    model: Any, tokenizer: Any, prompts: Sequence[str], stop_strings: Sequence[str], limit: int
) -> list[str]:
    """Answer as the published code does: greedily, a prompt after the other, with a cache."""
    replies = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=limit,
            stop_strings=list(stop_strings),
            tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id,
        )
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ends = [text.find(stop) for stop in stop_strings if stop in text]
        replies.append(text[: min(ends)] if ends else text)
    return replies


def run_generation(arguments: argparse.Namespace) -> int:
    """Answer the same test rows both ways; print answers per second; return the exit status."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    task = create_task("arithmetic")
    prompts = [example.prompt for example in task.load("test")][: arguments.rows]
    few, limit = prompts[: arguments.single], arguments.max_new_tokens

    def batched(some: Sequence[str], batch_size: Any) -> list[str]:
        replies = generate_replies(
            model,
            tokenizer,
            some,
            architecture="causal",
            batch_size=batch_size,
            max_new_tokens=limit,
            stop_strings=task.stop_strings,
        )
        return [reply.text for reply in replies]

    batched(few[:2], 2)  # the first call of a process also sets up threads and kernels
    start = time.perf_counter()
    with torch.no_grad():
        expected = one_at_a_time(model, tokenizer, few, task.stop_strings, limit)
    single = len(few) / (time.perf_counter() - start)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"\n| {'decoding':<20} | answers | answers/s | ratio | same answers")
    print(f"| {'one at a time':<20} | {len(few):>7} | {single:>9.1f} | {1:>5.1f} |")
    status = 0
    for size in (1, 8, 32, 128, "auto"):
        some = few if size == 1 else prompts
        start = time.perf_counter()
        replies = batched(some, size)
        rate = len(some) / (time.perf_counter() - start)
        same = sum(a == b for a, b in zip(replies, expected, strict=False))
        print(
            f"| {f'batch size {size}':<20} | {len(some):>7} | {rate:>9.1f} | {rate / single:>5.1f} "
            f"| {same} of {len(expected)}"
        )
        status |= same != len(expected)
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
    generation = commands.add_parser("generation", help="batches against one prompt at a time")
    generation.add_argument("--model", default=str(ROOT / "data" / "tiny_llama"))
    generation.add_argument("--adapter", help="a PEFT adapter of it, such as a run's adapter/")
    generation.add_argument("--rows", type=int, default=500, help="test rows for the batches")
    generation.add_argument("--single", type=int, default=100, help="of them, one at a time")
    generation.add_argument("--max-new-tokens", type=int, default=48)
    generation.set_defaults(run=run_generation)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
