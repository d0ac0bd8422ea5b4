"""Run every GPU check and figure of the project and print one table.

    python scripts/gpu_check.py              # under ten minutes on a data-centre GPU
    python scripts/gpu_check.py --json gpu.json

Llama-2-7B's shapes with random weights in bf16, r = 8; adapters in fp32. The start is timed on
8 x 1024 tokens and compared with a LoRA training step on 4 x 1024, because one on 8 may not fit the
80 GB that this is written for. Needs torch, transformers, peft and pytest. Exit status 1 if a
target is missed or a check could not be made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import INIT

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = [sys.executable, str(ROOT / "scripts" / "benchmark.py")]
GPU = ["--device", "cuda"]
PASS, STEP = "forward + backward", "LoRA training step"
OWN, JOINED = "lora_one.initialize", "lora_one.initialize, micro-batches of 1"


@dataclass
class Check:
    """One line of the table."""

    what: str
    measured: str
    target: str
    passed: bool


def main() -> int:
    """Run the checks, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table and all numbers here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check", file=sys.stderr)
        return 1
    checks, numbers = [], {}
    for part in (tests, initialisation, accuracy, preconditioner):
        try:
            found, numbers[part.__name__] = part()
        except subprocess.CalledProcessError as error:
            found = [Check(part.__name__, f"failed: {last_line(error)}", "runs", False)]
        checks += found
    width = max(len(check.what) for check in checks)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for check in checks:
        mark = "ok" if check.passed else "MISSED"
        print(f"{check.what:{width}s}  {check.measured:>24s}  target {check.target:26s} {mark}")
    if arguments.json:
        content = {"checks": [asdict(check) for check in checks], "numbers": numbers}
        arguments.json.write_text(json.dumps(content, indent=2))
    return 0 if all(check.passed for check in checks) else 1


def tests() -> tuple[list[Check], Any]:
    """Run the tests marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/core"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return [Check("tests marked gpu", summary[:24], "all pass", done.returncode == 0)], summary


def initialisation() -> tuple[list[Check], Any]:
    """Initialise Llama-2-7B: time, and memory against a LoRA training step."""
    llama = ["--model", "llama", "--tokens", "1024", "--dtype", "bfloat16"]
    llama += ["--no-error", "--repeats", "2"]
    whole = init([OWN, JOINED], "--rows", "8", *llama)["table"]
    half = init([PASS, OWN, JOINED, STEP], "--rows", "4", *llama)["table"]
    seconds, ratio = whole[OWN]["seconds"], half[OWN]["seconds"] / half[PASS]["seconds"]
    bar = half[STEP]["mib"]
    target = f"<= {bar / 1024:.1f} GiB (LoRA step)"
    checks = [
        Check("initialise Llama-2-7B, 8 rows", f"{seconds:.2f} s", "<= 10 s", seconds <= 10),
        Check("... peak over the model", gib(whole[OWN]), "reported", True),
        Check("... joined, checkpointed", gib(whole[JOINED]), "reported", True),
        Check("4 rows over a forward + backward", f"{ratio:.2f} x", "reported", True),
        Check("... peak over the model", gib(half[OWN]), target, half[OWN]["mib"] <= bar),
        Check("... joined, checkpointed", gib(half[JOINED]), target, half[JOINED]["mib"] <= bar),
    ]
    return checks, {"8 rows": whole, "4 rows": half}


def accuracy() -> tuple[list[Check], Any]:
    """Compare one 4096-wide layer's start with LAPACK in fp64."""
    errors = init([PASS], "--width", "4096", "--layers", "1", "--repeats", "1")["errors"]
    error = errors["clear_gap"]
    return [Check("rank-r part against LAPACK", f"{error:.1e}", "<= 1e-3", error <= 1e-3)], errors


def preconditioner() -> tuple[list[Check], Any]:
    """Step 224 pairs of Llama-2-7B."""
    table = measure(["optimizer", "--repeats", "30"])["table"]
    added, theirs = table["lora_one"]["added_ms"], table["PEFT Riemannian"]["added_ms"]
    checks = [
        Check("preconditioner adds", f"{added:.2f} ms", "<= 2 ms", added <= 2),
        Check("... PEFT's over ours", f"{theirs / added:.1f} x", ">= 5 x", theirs >= 5 * added),
    ]
    return checks, table


def init(contestants: list[str], *arguments: str) -> dict[str, Any]:
    """Measure some of the benchmark's contestants."""
    skip = [word for name in INIT if name not in contestants for word in ("--skip", name)]
    return measure(["init", *skip, *arguments])


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run the benchmark script on the GPU and return its single record."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.json"
        command = [*BENCHMARK, *arguments, *GPU, "--json", str(file)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(file.read_text())["records"][0]


def gib(row: dict[str, float]) -> str:
    """Return a row's peak memory in words."""
    return f"{row['mib'] / 1024:.1f} GiB"


def last_line(error: subprocess.CalledProcessError) -> str:
    """Return what a failed command said last."""
    return (error.stderr.strip().splitlines() or ["no message"])[-1][:60]


if __name__ == "__main__":
    sys.exit(main())
