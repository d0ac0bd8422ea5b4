"""The real command line, sweep and lease around a run that only sleeps; it imports no torch.

What a run is to do beyond that is told by files in the folder LIGHT_RUNS, which also holds the log
of starts, one line each.
"""

import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from lora_one.errors import PreemptedError
from lora_one.harness.cli import launch
from lora_one.harness.config.schema import Config
from lora_one.harness.records.folder import run_id, write_atomically
from lora_one.harness.records.lease import TOKEN_VARIABLE, Lease, acquire, lease_folder
from lora_one.harness.sweeps.sweep import SWEEP_VARIABLE

ROOT = Path(__file__).parents[2]
TOLD = Path(os.environ["LIGHT_RUNS"])


def run(config: Config) -> None:
    name = run_id(config)
    token = os.environ.pop(TOKEN_VARIABLE, None)
    with acquire(lease_folder(config.output_dir, name), token=token) as lease:
        with (TOLD / "starts").open("a") as file:
            file.write(f"{config.seed} {name} {os.getpid()} {os.environ.get(SWEEP_VARIABLE)}\n")
        folder = Path(config.output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(config.model_dump()))
        _record(folder, config, "running")
        try:
            _work(config.seed, lease)
        except PreemptedError:
            _record(folder, config, "preempted")
            raise
        except RuntimeError:
            _record(folder, config, "failed")
            raise
        _record(folder, config, "finished")


def _work(seed: int, lease: Lease) -> None:
    def stop(number: int, _: object) -> None:
        raise PreemptedError(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    print(f"running {seed}", flush=True)
    until = time.monotonic() + 0.2
    while time.monotonic() < until or (TOLD / f"hold-{seed}").exists():
        time.sleep(0.02)
        lease.verify()
    if (TOLD / f"fail-{seed}").exists():
        raise RuntimeError("told to fail")


def _record(folder: Path, config: Config, status: str) -> None:
    phase = {"seconds": 0.1, "peak_memory_bytes": 10**6}
    record = {
        "status": status,
        "method": config.method,
        "process": {"host": platform.node(), "pid": os.getpid()},
        "metrics": {"accuracy": 0.5, "n": 1},
        "primary_metric": "accuracy",
        "losses": {"validation": 1.0},
        "phases": {"init": phase, "train": phase},
    }
    write_atomically(folder / "run.json", json.dumps(record))


if __name__ == "__main__":
    sys.exit(launch(run, ROOT / "conf", __file__))
