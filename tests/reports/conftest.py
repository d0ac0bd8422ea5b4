"""Run folders written by hand, and a browser to look at a report with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DIRECTIONS = {"lora": "LoRA", "pissa": "PiSSA", "lora_ga": "LoRA-GA", "lora_one": "LoRA-One"}


@pytest.fixture(scope="session")
def write_run():
    """Write one run folder; every argument changes one fact of it."""

    def write(
        root,
        name,
        *,
        method="lora",
        optimiser="adamw",
        rate=1e-3,
        seed=0,
        score=0.5,
        loss=1.0,
        status="finished",
        settings=(),
        record=(),
        log=None,
        init=None,
        predictions=None,
        seconds=30.0,
        memory=2 * 10**9,
    ):
        folder = Path(root) / name
        folder.mkdir(parents=True)
        flat = {
            "seed": seed,
            "train": "full",
            "dataset.name": "arithmetic",
            "dataset.path": None,
            "dataset.test_rows": None,
            "dataset.seed": seed,
            "model.name": "data/tiny_llama",
            "model.learning_rate": rate,
            "model.epochs": 1.0,
            "model.seed": seed,
            "peft.use_peft": True,
            "peft.lora_r": 8,
            "init.direction": DIRECTIONS.get(method, method),
            "init.seed": seed,
            "optimizer.name": optimiser,
            "evaluate.adapter": None,
            "output_dir": str(root),
        } | dict(settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(_nested(flat)), encoding="utf-8")
        facts = {
            "run_id": name,
            "status": status,
            "method": method,
            "seed": seed,
            "primary_metric": "accuracy",
            "metrics": {"accuracy": score, "n": 100},
            "losses": {"validation": loss, "base_validation": 3.0},
            "phases": {
                "init": {"seconds": 2.0, "peak_memory_bytes": 10**9},
                "train": {"seconds": seconds, "peak_memory_bytes": memory},
            },
            "ended": "2026-11-20T10:00:00+00:00",
        } | dict(record)
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        if log is not None:
            lines = "".join(json.dumps(line) + "\n" for line in log)
            (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        if init is not None:
            (folder / "init.json").write_text(json.dumps(init), encoding="utf-8")
        if predictions is not None:
            lines = "".join(json.dumps(row) + "\n" for row in predictions)
            (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
        return folder

    return write


def _nested(flat):
    nested = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


@pytest.fixture(scope="session")
def headless():
    """The module that drives Chromium; skips where it cannot be had."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import headless as module
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    pytest.importorskip("selenium")
    if not _has_browser(module):
        _install_browser()
    if not _has_browser(module):
        pytest.skip("there is no chromium with chromedriver, and none could be installed")
    return module


def _has_browser(module):
    return any(map(shutil.which, module.BROWSERS)) and shutil.which("chromedriver")


def _install_browser():
    """Install Debian's packages where that needs no permission: as root, in a container or CI."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    for command in (["update", "-qq"], ["install", "-y", "-qq", "chromium", "chromium-driver"]):
        try:
            subprocess.run(
                ["apt-get", *command],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                timeout=240,
                check=True,
            )
        except (subprocess.SubprocessError, OSError):
            return
