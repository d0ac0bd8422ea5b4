"""Time the report of many run folders, and its first paint in a headless Chromium.

    python scripts/benchmark_reports.py --runs 1000 --steps 2000

writes synthetic folders (made-up losses and scores, the files of a real run), builds the report
from them and prints a table for ``docs/benchmarks.md``. Where there is
no browser, its time is left out.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from headless import NoBrowserError, open_page

from lora_one.reports.build import build_report
from lora_one.reports.records import find_runs

METHODS = {"lora": "LoRA", "pissa": "PiSSA", "lora_ga": "LoRA-GA", "lora_one": "LoRA-One"}
OPTIMISERS = ("adamw", "preconditioned_adamw")
LAYERS = [
    f"model.layers.{block}.{part}"
    for block in range(4)
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
SKILL = {"lora": 0.0, "pissa": 0.02, "lora_ga": 0.03, "lora_one": 0.05}
BEST_RATE = {"lora": 4e-3, "pissa": 2e-3, "lora_ga": 1e-3, "lora_one": 3e-3}


def write_runs(folder: Path, count: int, steps: int, *, seeds: int = 3) -> None:
    """Write ``count`` synthetic run folders; about one in forty is failed, preempted or torn."""
    arms = [(method, optimiser) for method in METHODS for optimiser in OPTIMISERS]
    rates = math.ceil(count / len(arms) / seeds)
    made = 0
    for index in range(rates):
        rate = float(f"{5e-4 * 40 ** (index / max(rates - 1, 1)):.3g}")
        for method, optimiser in arms:
            for seed in range(seeds):
                if made < count:
                    _write_run(folder, method, optimiser, rate, seed, steps, made)
                    made += 1


def _write_run(
    root: Path, method: str, optimiser: str, rate: float, seed: int, steps: int, index: int
) -> None:
    dice = random.Random(f"{method} {optimiser} {rate} {seed}")
    folder = root / f"arithmetic-tiny_llama-{method}-r8-{optimiser}-lr{rate:g}-s{seed}-{index:08x}"
    folder.mkdir(parents=True)
    off = abs(math.log(rate / BEST_RATE[method]))
    if optimiser != "adamw":
        off *= 0.7
    level = 0.11 * (1 + 0.4 * off * off) * math.exp(dice.gauss(0, 0.03)) - SKILL[method] / 3
    score = max(0.0, min(1.0, 0.62 + SKILL[method] - 0.11 * off * off + dice.gauss(0, 0.015)))
    status = "finished"
    if index % 40 == 17:
        status = ("failed", "preempted", "running")[index // 40 % 3]
    (folder / "config.yaml").write_text(
        yaml.safe_dump(_settings(root, method, optimiser, rate, seed), sort_keys=False)
    )
    (folder / "metrics.jsonl").write_text("".join(_log(dice, steps, rate, level)))
    (folder / "init.json").write_text(json.dumps(_init(dice, method), indent=1))
    (folder / "predictions.jsonl").write_text("".join(_predictions(dice, score)))
    record = _record(folder.name, method, optimiser, seed, status, score, level, steps, dice)
    text = json.dumps(record, indent=1)
    # One torn record, as a full disk leaves it.
    (folder / "run.json").write_text(text[:200] if index % 400 == 250 else text)


def _settings(
    root: Path, method: str, optimiser: str, rate: float, seed: int
) -> dict[str, dict[str, Any] | Any]:
    uses_gradient = method in ("lora_ga", "lora_one")
    return {
        "seed": seed,
        "train": "full",
        "dataset": {"name": "arithmetic", "path": None, "train_rows": 4096, "test_rows": None}
        | {"validation_rows": 250, "loss_on": "response", "max_new_tokens": 48, "seed": seed},
        "model": {"name": "data/tiny_llama", "type": "auto", "epochs": 1.0, "max_steps": None}
        | {"learning_rate": rate, "weight_decay": 0.0, "max_grad_norm": 1.0, "schedule": "cosine"}
        | {"warmup_steps": 0.05, "per_device_batch_size": 32, "real_batch_size": 32, "seed": seed},
        "peft": {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "use_rslora": True}
        | {"lora_dropout": 0.0, "lora_target_modules": "all", "dora": False, "adalora": False},
        "init": {"direction": METHODS[method], "dtype": "fp32", "seed": seed}
        | {"scale": "stable" if uses_gradient else None}
        | {"stable_gamma": {"lora_ga": 16.0, "lora_one": 128.0}.get(method)},
        "optimizer": {"name": optimiser, "betas": [0.9, 0.999], "eps": 1e-08}
        | ({"damping": 1e-6} if optimiser == "preconditioned_adamw" else {}),
        "evaluate": {"adapter": None},
        "output_dir": str(root),
    }


def _record(
    name: str,
    method: str,
    optimiser: str,
    seed: int,
    status: str,
    score: float,
    level: float,
    steps: int,
    dice: random.Random,
) -> dict[str, Any]:
    seconds = 20 + (6 if optimiser != "adamw" else 0) + dice.random()
    record: dict[str, Any] = {
        "run_id": name,
        "status": status,
        "method": method,
        "seed": seed,
        "started": "2026-11-20T10:00:00+00:00",
        "metrics": {},
        "phases": {
            "load": {"seconds": 0.3, "peak_memory_bytes": 500_000_000},
            "init": {"seconds": 0.2, "peak_memory_bytes": 610_000_000},
            "train": {
                "seconds": round(seconds, 3),
                "peak_memory_bytes": 850_000_000 + (40_000_000 if optimiser != "adamw" else 0),
            },
        },
        "command": f"python run_exp.py init={method} optimizer={optimiser} seed={seed}",
        "data": {"rows": {"train": 4096, "test": 500}, "test_row_ids_sha256": "0" * 64},
        "provenance": {
            "git": {"commit": "0" * 40, "dirty": False},
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            "hardware": {"processor": "synthetic", "cores": 2, "threads": 1, "gpus": []},
        },
    }
    if status != "finished":
        error = {"type": "NonFiniteError", "message": f"step {steps // 2}: loss nan"}
        return record | ({"error": error | {"phase": "train"}} if status == "failed" else {})
    correct = round(score * 500) / 500
    return record | {
        "ended": "2026-11-20T10:01:00+00:00",
        "primary_metric": "accuracy",
        "metrics": {"validation_loss": level, "n": 500, "accuracy": correct, "unparsed": 0.01},
        "losses": {
            "base_validation": 3.8,
            "start_validation": 3.1 if method == "lora_one" else 3.8,
            "train": level * 0.9,
            "validation": level,
        },
        "init": {"seconds": 0.2, "cached": False},
        "train": {"steps": steps, "tokens": steps * 1600, "tokens_per_second": 1600 * steps / 20},
    }


def _log(dice: random.Random, steps: int, rate: float, level: float) -> list[str]:
    lines = ['{"step": 0, "epoch": 0.0, "validation_loss": 3.8}\n']
    for step in range(1, steps + 1):
        epoch = step / steps
        loss = level + 3.6 * math.exp(-12 * epoch) + dice.gauss(0, 0.03 * (0.2 + level))
        lines.append(
            f'{{"step": {step}, "loss": {max(loss, 1e-3)}, "grad_norm": {dice.random()}, '
            f'"learning_rate": {rate * (1 - epoch)}, "epoch": {epoch}, '
            f'"num_input_tokens_seen": {1600 * step}, "train_runtime": {0.01 * step:.3f}}}\n'
        )
        if step % max(steps // 8, 1) == 0:
            valid = level + 3.6 * math.exp(-12 * epoch)
            lines.append(f'{{"step": {step}, "epoch": {epoch}, "validation_loss": {valid}}}\n')
    return lines


def _init(dice: random.Random, method: str) -> dict[str, Any]:
    decay = {"pissa": 0.12}.get(method, 0.45)
    layers = []
    for name in LAYERS:
        scale = math.exp(dice.gauss(-1, 0.5))
        values = [scale * math.exp(-decay * at) * (1 - 0.1 * dice.random()) for at in range(9)]
        values = [] if method == "lora" else sorted(values, reverse=True)
        layers.append(
            {
                "name": name,
                "shape": [128, 128],
                "rank": 8,
                "singular_values": values[:8],
                "next_singular_value": values[8] if values else None,
                "svd_error": 0.0 if values else None,
                "captured_energy": 0.9 + 0.09 * dice.random() if values else None,
                "norm_ratio": 0.0 if method == "lora" else 0.004 * (1 + dice.random()),
            }
        )
    return {
        "method": method,
        "equation": "synthetic",
        "source": "scripts/benchmark_reports.py",
        "seconds": 0.2,
        "summary": f"{method}: {len(layers)} layers",
        "warnings": [],
        "layers": layers,
    }


def _predictions(dice: random.Random, score: float) -> list[str]:
    lines = []
    for index in range(60):
        a, b = dice.randint(2, 90), dice.randint(2, 9)
        right = dice.random() < score
        answer = a * b if right else a * b + dice.choice((-10, -1, 1, 10))
        verdict = {"parsed": str(answer), "correct": right}
        row = {
            "row_id": f"test/{index}",
            "sample": 0,
            "prompt": f"Q: A shelf holds {a} books. How many do {b} shelves hold?\nA: ",
            "reply": f"{a} * {b} = {answer}\n#### {answer}",
            "reference": str(a * b),
            "scores": {"strict": verdict, "flexible": verdict},
            "stop_reason": "eos",
            "tokens": 14,
        }
        lines.append(json.dumps(row) + "\n")
    return lines


# Each answers with the milliseconds until the browser has laid out what it shows then.
ACTIONS = {
    "sort by a header, all rows shown": """
        document.querySelector('#all-runs .more').click();
        document.body.offsetHeight;
        const began = performance.now();
        document.querySelector('#all-runs thead th:nth-child(7) button').click();
        document.body.offsetHeight;
        return performance.now() - began;
        """,
    "filter by a word": """
        const query = document.querySelector('#query');
        query.value = 'pissa';
        const began = performance.now();
        query.dispatchEvent(new Event('input'));
        document.body.offsetHeight;
        return performance.now() - began;
        """,
    "open a run": """
        const began = performance.now();
        document.querySelector('#all-runs tbody a').click();
        while (!document.querySelector('article.run')) await new Promise(requestAnimationFrame);
        document.body.offsetHeight;
        return performance.now() - began;
        """,
}


def measure_page(page: Path, repeats: int) -> dict[str, float]:
    """Return median seconds of the first contentful paint and of each action, fresh browsers."""
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        with open_page(page) as browser:
            paint = browser.wait_for(
                "return (performance.getEntriesByName('first-contentful-paint')[0] || {}).startTime"
            )
            seconds.setdefault("first contentful paint", []).append(paint / 1000)
            for name, script in ACTIONS.items():
                took = browser.run(f"return (async () => {{ {script} }})()")
                seconds.setdefault(name, []).append(took / 1000)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(arguments: Sequence[str]) -> int:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3, help="of the browser")
    parser.add_argument("--keep", type=Path, help="write the folders here and keep them")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        write_runs(folder, options.runs, options.steps)
        began, used = time.perf_counter(), time.process_time()
        runs = find_runs(folder)
        written = build_report(runs, folder / "report", title="Synthetic runs")
        seconds, busy = time.perf_counter() - began, time.process_time() - used
        name = f"report of {options.runs:,} runs x {options.steps:,} steps"
        print(f"| {name} | {seconds:.1f} s, {busy:.1f} s of processor time |")
        print(f"| report.html | {written.page_bytes / 1e6:.1f} MB |")
        try:
            measured = measure_page(folder / "report" / "report.html", options.repeats)
        except NoBrowserError as reason:
            print(f"| first contentful paint | not measured: {reason} |")
        else:
            for name, value in measured.items():
                print(f"| {name} | {value:.2f} s |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
