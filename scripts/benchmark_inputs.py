"""Measure the starts from a layer's inputs, EVA and CorDA, against PEFT's own.

    python scripts/benchmark_inputs.py              # Llama, width 512, 4 layers, 8 x 256 tokens
    python scripts/benchmark_inputs.py --tokens 64

One row at a time for all, as CorDA's code and PEFT want it. Contestants take turns, each on a copy
of the model; times are medians, and stand beside a forward pass over the same rows.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from benchmark import Work, build, environment, lora_config, single_rows, targets
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

import lora_one

Rows = list[dict[str, Tensor]]
Contestant = Callable[[nn.Module, Rows, int], Work]


def forward(model: nn.Module, rows: Rows, rank: int) -> Work:
    """One forward pass per row, nothing else."""

    def work() -> None:
        with torch.no_grad():
            for row in rows:
                model(**row, use_cache=False)

    return work


def ours(method: str) -> Contestant:
    """``lora_one.initialize`` on an adapter that is there."""

    def contestant(model: nn.Module, rows: Rows, rank: int) -> Work:
        adapted = get_peft_model(model, lora_config({"rank": rank}))
        return lambda: lora_one.initialize(adapted, rows, method=method, measure_loss=False)

    return contestant


def peft_eva(model: nn.Module, rows: Rows, rank: int) -> Work:
    """PEFT's EVA with equal ranks, on an adapter that is there."""
    options = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    adapted = get_peft_model(model, lora_config({"rank": rank}, **options))
    return lambda: initialize_lora_eva_weights(adapted, rows, show_progress_bar=False)


def peft_corda(model: nn.Module, rows: Rows, rank: int) -> Work:
    """PEFT's CorDA, which includes the adapter."""
    options = {"init_lora_weights": "corda", "corda_config": CordaConfig()}
    config = lora_config({"rank": rank}, **options)
    config.target_modules = list({name.rpartition(".")[2] for name in targets(model)})

    def work() -> None:
        preprocess_corda(model, config, run_model=forward(model, rows, rank))
        get_peft_model(model, config)

    return work


CONTESTANTS = {
    "forward": forward,
    "lora_one, eva": ours("eva"),
    "PEFT, eva": peft_eva,
    "lora_one, corda": ours("corda"),
    "PEFT, corda": peft_corda,
}


def main() -> None:
    """Parse the command line, take turns, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 512, "layers": 4, "tokens": 256, "rows": 8, "rank": 8, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    setting = {"vocabulary": 4096, "ffn": 0, "heads": 0, "device": "cpu", "dtype": "float32"}
    model, batch = build({**setting, **vars(arguments)})
    rows = single_rows(batch)
    forward(model, rows, arguments.rank)()  # warms up the allocator and the thread pool
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.repeats):
        for name, contestant in CONTESTANTS.items():
            work = contestant(copy.deepcopy(model), rows, arguments.rank)
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    print(environment())
    print(f"\n{'':20s} {'seconds':>9s} {'x forward':>10s}")
    base = statistics.median(seconds["forward"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:20s} {median:9.2f} {median / base:10.2f}")


if __name__ == "__main__":
    main()
