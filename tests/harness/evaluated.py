"""What an evaluation leaves in its run folder."""

import json
from pathlib import Path


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def untimed(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if k not in ("seconds", "answers_per_second")}
