"""The real command line around a run that computes nothing; it imports no torch.

Its losses are a valley: each method has a best learning rate and gamma of its own, and a seed adds
a little noise. The folder TUNED_RUNS tells it what to do beside: a file ``fail`` makes every
final run fail, ``diverge`` every trial with a rate above 0.01, ``diverge_at_last`` every final run.
"""

import json
import math
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

from lora_one.errors import NonFiniteError
from lora_one.harness.cli import launch
from lora_one.harness.config.schema import Config
from lora_one.harness.records.folder import run_id, write_atomically
from lora_one.harness.records.lease import TOKEN_VARIABLE, acquire, lease_folder

ROOT = Path(__file__).parents[2]
TOLD = Path(os.environ["TUNED_RUNS"])
BEST_RATE = {"lora": 2e-3, "lora_one": 5e-4}


def loss_of(config: Config) -> float:
    """Quadratic in log rate and log gamma, plus 0.01 per seed."""
    valley = math.log(config.model.learning_rate / BEST_RATE[config.method]) ** 2
    gamma = config.init.stable_gamma
    valley += 0 if gamma is None else math.log(gamma / 32) ** 2
    return 1 + valley + 0.01 * config.seed


def run(config: Config) -> None:
    """Write the record that a run with these settings would leave."""
    name, loss = run_id(config), loss_of(config)
    trial = config.evaluation.metric == "validation_loss"
    with acquire(lease_folder(config.output_dir, name), token=os.environ.pop(TOKEN_VARIABLE, None)):
        with (TOLD / "starts").open("a") as file:
            file.write(f"{name}\n")
        folder = Path(config.output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(config.model_dump()))
        phase = {"seconds": 2.0, "peak_memory_bytes": 10**6}
        error = None
        if trial and config.model.learning_rate > 0.01 and (TOLD / "diverge").exists():
            error = NonFiniteError("the loss is nan")
        if not trial and (TOLD / "diverge_at_last").exists():
            error = NonFiniteError("the loss is nan")
        if not trial and (TOLD / "fail").exists():
            error = RuntimeError("told to fail")
        record = {
            "status": "finished" if error is None else "failed",
            "method": config.method,
            "metrics": {"n": 10, **({} if trial else {"accuracy": 1 / loss})},
            "primary_metric": "validation_loss" if trial else "accuracy",
            "losses": {"validation": loss},
            "phases": {"init": phase, "train": phase},
        }
        if error is not None:
            record["error"] = {"type": type(error).__name__, "message": str(error)}
        write_atomically(folder / "run.json", json.dumps(record))
        if error is not None:
            raise error


if __name__ == "__main__":
    sys.exit(launch(run, ROOT / "conf", __file__))
