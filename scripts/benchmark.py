"""Measure initialisation and preconditioning against plain PyTorch, PEFT and the published code.

    python scripts/benchmark.py init                         # 29.5 M Llama, 8 x 256 tokens, r = 8
    python scripts/benchmark.py init --width 256,512 --layers 4,8         # growth
    python scripts/benchmark.py init --model llama --tokens 1024 --dtype bfloat16 --device cuda
    torchrun --nproc-per-node 2 scripts/benchmark.py ranks   # the rows shared by two processes
    python scripts/benchmark.py optimizer                    # Llama-2-7B adapter shapes, r = 8

Needs torch, transformers and peft only. Contestants take turns, so that a busy machine slows all
of them; times are medians. Peak memory is that of a fresh process per contestant over what the
loaded model takes: the resident set on a CPU, the allocator's peak on a GPU.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora_one

PUBLISHED_LLAMA = {"ffn": 11008, "heads": 32}
AXES = ("width", "layers", "tokens", "rows", "rank", "vocabulary")
Setting = dict[str, Any]
Work = Callable[[], Any]


def build(setting: Setting) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a Llama with random weights and one batch of random tokens."""
    torch.manual_seed(0)
    width = setting["width"]
    config = transformers.LlamaConfig(
        vocab_size=setting["vocabulary"],
        hidden_size=width,
        intermediate_size=setting["ffn"] or (width * 43 // 16),
        num_hidden_layers=setting["layers"],
        num_attention_heads=setting["heads"] or max(width // 64, 1),
        max_position_embeddings=max(2048, setting["tokens"]),
    )
    device, dtype = torch.device(setting["device"]), getattr(torch, setting["dtype"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(1)
    shape = (setting["rows"], setting["tokens"])
    ids = torch.randint(0, setting["vocabulary"], shape, generator=generator).to(device)
    return model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def targets(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer but the head."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"}


def single_rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Cut a batch into micro-batches of one row."""
    rows = len(batch["input_ids"])
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(rows)]


def lora_config(setting: Setting, **options: Any) -> LoraConfig:
    """Return the adapter of the published runs: every linear layer, alpha 16, rsLoRA."""
    return LoraConfig(
        r=setting["rank"], lora_alpha=16, use_rslora=True, target_modules="all-linear", **options
    )


def plain(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """Forward and backward with the target weights' gradients, nothing else."""
    weights = [module.weight for module in targets(model).values()]
    model.requires_grad_(False).train()
    for weight in weights:
        weight.requires_grad_(True)

    def work() -> None:
        model(**batch, use_cache=False).loss.backward()
        for weight in weights:
            weight.grad = None

    return work


def adapter(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """PEFT's creation of the adapter, which every method needs and none of ours includes."""
    return lambda: get_peft_model(model, lora_config(setting))


def ours(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """``lora_one.initialize``, without the extra forward pass for the loss after."""
    adapted = get_peft_model(model, lora_config(setting))
    return lambda: lora_one.initialize(adapted, [batch], method="lora_one", measure_loss=False)


def ours_micro(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """The same with one row per micro-batch, no gradients held (joined, checkpointed)."""
    adapted = get_peft_model(model, lora_config(setting))
    options = {"method": "lora_one", "measure_loss": False, "strategy": "join"}
    return lambda: lora_one.initialize(adapted, single_rows(batch), **options)


def pefts(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """PEFT's ``preprocess_loraga`` and its ``lora_ga`` start, which includes the adapter."""
    config = lora_config(setting, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    config.target_modules = list({name.rpartition(".")[2] for name in targets(model)})

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()

    def work() -> None:
        preprocess_loraga(model, config, step)
        get_peft_model(model, config)

    return work


def published(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """The published algorithm: every parameter's hook collects all gradients so far.

    Re-implemented from its description: all parameters require gradients, each one's hook walks
    over all parameters, adds up on the CPU what has arrived and frees it; micro-batches of one
    row (the published ``bsz: 1``); then ``svd_lowrank(q=512, niter=16)`` per target layer.
    """
    return lambda: _published(model, batch, setting)


def _published(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> None:
    collected: dict[str, Tensor] = {}
    model.requires_grad_(True).train()

    def collect(grad: Tensor) -> Tensor:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                gradient = parameter.grad.detach().cpu()
                collected[name] = collected[name] + gradient if name in collected else gradient
                parameter.grad = None
        return grad

    handles = [parameter.register_hook(collect) for parameter in model.parameters()]
    for row in single_rows(batch):
        model(**row, use_cache=False).loss.backward()
        collect(torch.zeros(()))
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    for name, module in targets(model).items():
        gradient = collected[f"{name}.weight"].to(module.weight.device).float() / setting["rows"]
        torch.svd_lowrank(gradient, q=min(512, *gradient.shape), niter=16)


def lora_step(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Work:
    """One LoRA training step on the same rows: the bar for peak memory."""
    adapted = get_peft_model(model, lora_config(setting)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def work() -> None:
        adapted(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return work


# Each contestant prepares what is there before the clock starts and returns the work to measure.
INIT: dict[str, Callable[[nn.Module, dict[str, Tensor], Setting], Work]] = {
    "forward + backward": plain,
    "lora_one.initialize": ours,
    "lora_one.initialize, micro-batches of 1": ours_micro,
    "PEFT preprocess_loraga and start": pefts,
    "published algorithm": published,
    "PEFT get_peft_model, plain LoRA": adapter,
    "LoRA training step": lora_step,
}


def time_init(setting: Setting, repeats: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Return wall and processor seconds per contestant, medians of interleaved repeats."""
    model, batch = build(setting)
    # Warms up the allocator and the thread pool.
    INIT[names[0]](copy.deepcopy(model), batch, setting)()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            subject = copy.deepcopy(model)
            work = INIT[name](subject, batch, setting)
            synchronise(setting)
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            synchronise(setting)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            del subject, work
            gc.collect()
    medians = {}
    for name, pairs in seconds.items():
        walls, cpus = zip(*pairs, strict=True)
        medians[name] = {
            "seconds": statistics.median(walls),
            "cpu_seconds": statistics.median(cpus),
        }
    return medians


def peak_memory(setting: Setting, name: str) -> float:
    """Return MiB over the model, run in this process."""
    model, batch = build(setting)
    work = INIT[name](model, batch, setting)
    gc.collect()
    if setting["device"] == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    work()
    return _resident("VmHWM") - before


def accuracy(setting: Setting) -> dict[str, float]:
    """Return the largest error of the start over layers, against LAPACK in fp64.

    Relative Frobenius error of ``B A``, put back to the size of -G's rank-r part, where
    ``σ_r / σ_(r+1) > 1.05``; and over all layers.
    """
    model, batch = build(setting)
    gradients = {}
    weights = {name: module.weight for name, module in targets(model).items()}
    model.requires_grad_(False).train()
    for weight in weights.values():
        weight.requires_grad_(True)
    model(**batch, use_cache=False).loss.backward()
    for name, weight in weights.items():
        gradients[name], weight.grad = weight.grad.float(), None
    adapted = get_peft_model(model, lora_config(setting))
    options = {"scale": "unit", "measure_loss": False}
    lora_one.initialize(adapted, [batch], method="lora_one", **options)
    clear, every, r = [0.0], [0.0], setting["rank"]
    for name, G in gradients.items():
        U, S, Vh = torch.linalg.svd(-G.double(), full_matrices=False)
        best = (U[:, :r] * S[:r]) @ Vh[:r] / S[0]
        layer = adapted.get_base_model().get_submodule(name)
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        error = float((B.detach().double() @ A.detach().double() - best).norm() / best.norm())
        every.append(error)
        if float(S[r - 1] / S[r]) > 1.05:
            clear.append(error)
    return {"clear_gap": max(clear), "all_layers": max(every)}


def run_init(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every setting; print a table each."""
    records = []
    for setting in settings(arguments):
        if arguments.memory_of:
            print(json.dumps(peak_memory(setting, arguments.memory_of)))
            return []
        names = [name for name in INIT if name not in arguments.skip]
        table = time_init(setting, arguments.repeats, names)
        gc.collect()
        torch.cuda.empty_cache()  # what this process keeps of a GPU's memory, others would lack
        for name in names:
            table[name]["mib"] = _in_fresh_process(setting, name)
        errors = {} if arguments.no_error else accuracy(setting)
        print(f"\n{_describe(setting)}")
        base = table.get("forward + backward", {"seconds": math.nan, "cpu_seconds": math.nan})
        header = ("", "wall s", "x fwd+bwd", "cpu s", "x fwd+bwd", "peak MiB")
        print("{:40s} {:>8s} {:>10s} {:>8s} {:>10s} {:>9s}".format(*header))
        for name, row in table.items():
            wall, cpu, mib = row["seconds"], row["cpu_seconds"], row["mib"]
            print(
                f"{name:40s} {wall:8.2f} {wall / base['seconds']:10.2f} "
                f"{cpu:8.2f} {cpu / base['cpu_seconds']:10.2f} {mib:9.0f}"
            )
        if errors:
            print(
                "error of the rank-r part: {clear_gap:.1e} where the gap is clear, "
                "{all_layers:.1e} over all layers".format(**errors)
            )
        records.append({"setting": setting, "table": table, "errors": errors})
    return records


def run_ranks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure ``initialize`` with the rows shared by the ranks that torchrun started.

    Communication is what a rank hands to collective operations, against all full gradients.
    """
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    records = []
    for setting in settings(arguments):
        model, batch = build(setting)
        share = {key: value[rank::ranks] for key, value in batch.items()}
        gradients = sum(4 * module.weight.numel() for module in targets(model).values())
        table: dict[str, dict[str, float]] = {}
        for name in ("forward + backward", "lora_one.initialize"):
            times = []
            for _ in range(arguments.repeats):
                work = INIT[name](copy.deepcopy(model), share, setting)
                synchronise(setting)
                dist.barrier()
                began = time.perf_counter()
                with _counted() as sent:
                    work()
                synchronise(setting)
                dist.barrier()
                times.append(time.perf_counter() - began)
            table[name] = {"seconds": statistics.median(times), "sent_mib": sent[0] / 2**20}
        records.append({"setting": setting, "ranks": ranks, "table": table})
        if rank == 0:
            plain_s, ours_s = (row["seconds"] for row in table.values())
            sent_mib = table["lora_one.initialize"]["sent_mib"]
            print(f"\n{_describe(setting)}, shared by {ranks} ranks")
            print(
                f"forward + backward {plain_s:.2f} s, lora_one.initialize {ours_s:.2f} s, "
                f"{ours_s / plain_s:.2f} x; communicated {sent_mib:.1f} MiB, all gradients are "
                f"{gradients / 2**20:.1f} MiB"
            )
    dist.destroy_process_group()
    return records


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the bytes of tensors that are reduced or broadcast, in the list's only entry."""
    sent, operations = [0], {"all_reduce": dist.all_reduce, "broadcast": dist.broadcast}

    def count(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            sent[0] += tensor.numel() * tensor.element_size()
            return operation(tensor, *arguments, **options)

        return counted

    for name, operation in operations.items():
        setattr(dist, name, count(operation))
    try:
        yield sent
    finally:
        for name, operation in operations.items():
            setattr(dist, name, operation)


def adapter_pairs(setting: Setting) -> nn.Module:
    """Return lora_A/lora_B of a whole Llama, with gradients, without the base model."""
    torch.manual_seed(0)
    width, ffn, r = setting["width"], setting["ffn"] or setting["width"] * 43 // 16, setting["rank"]
    shapes = [(width, width)] * 4 + [(ffn, width)] * 2 + [(width, ffn)]
    root = nn.Module()
    device = torch.device(setting["device"])
    for index, (m, n) in enumerate(shapes * setting["layers"]):
        layer = nn.Module()
        layer.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False, device=device)})
        layer.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False, device=device)})
        root.add_module(f"layer{index}", layer)
    for parameter in root.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return root


class PublishedLoop(torch.optim.AdamW):
    """AdamW after a loop over the pairs with explicit inverses, as the published optimizer."""

    pairs: list[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Precondition pair by pair, then step."""
        for A, B in self.pairs:
            eye = torch.eye(A.shape[0], device=A.device)
            A.grad = torch.linalg.inv(B.T @ B + 1e-6 * eye) @ A.grad
            B.grad = B.grad @ torch.linalg.inv(A @ A.T + 1e-6 * eye)
        super().step()


def optimizers(setting: Setting) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each optimizer's step."""
    adamw = {"lr": 1e-6, "fused": True}
    root = adapter_pairs(setting)
    yield "AdamW, fused", torch.optim.AdamW(root.parameters(), **adamw).step
    make = lora_one.create_preconditioned_optimizer
    yield "lora_one", make(adapter_pairs(setting), torch.optim.AdamW, reg=1e-6, **adamw).step
    theirs = create_riemannian_optimizer(
        adapter_pairs(setting), torch.optim.AdamW, reg=1e-6, **adamw
    )
    yield "PEFT Riemannian", theirs.step
    root = adapter_pairs(setting)
    loop = PublishedLoop(root.parameters(), **adamw)
    loop.pairs = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in root.children()]
    yield "published loop", loop.step


def run_optimizer(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a step of every optimizer; print a table per setting."""
    records = []
    for setting in settings(arguments):
        steps = dict(optimizers(setting))
        first, times = {}, {name: [] for name in steps}
        for round_ in range(arguments.repeats + 1):
            for name, step in steps.items():
                synchronise(setting)
                began, cpu = time.perf_counter(), time.process_time()
                step()
                synchronise(setting)
                now = (1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - cpu))
                if round_ == 0:
                    first[name] = now[0]
                else:
                    times[name].append(now)
        print(f"\n{7 * setting['layers']} pairs, width {setting['width']}, r = {setting['rank']}")
        header = ("", "step ms", "added ms", "added cpu ms", "first step ms")
        print("{:20s} {:>9s} {:>9s} {:>13s} {:>14s}".format(*header))
        table, base = {}, None
        for name, pairs in times.items():
            wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
            base = base or (wall, cpu)
            table[name] = {"ms": wall, "added_ms": wall - base[0], "added_cpu_ms": cpu - base[1]}
            print(
                f"{name:20s} {wall:9.1f} {wall - base[0]:9.1f} {cpu - base[1]:13.1f} "
                f"{first[name]:14.1f}"
            )
        records.append({"setting": setting, "table": table})
    return records


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Yield every combination of the comma-separated sizes."""
    fixed = {"ffn": 0, "heads": 0}
    if arguments.model == "llama":
        fixed = PUBLISHED_LLAMA
        arguments.width, arguments.layers, arguments.vocabulary = "4096", "32", "32000"
    for values in itertools.product(*(getattr(arguments, name).split(",") for name in AXES)):
        sizes = dict(zip(AXES, map(int, values), strict=True))
        yield {**fixed, **sizes, "device": arguments.device, "dtype": arguments.dtype}


def synchronise(setting: Setting) -> None:
    """Wait for the device."""
    if setting["device"] == "cuda":
        torch.cuda.synchronize()


def environment() -> str:
    """Return one line: processor or GPU, threads, versions, date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    date = time.strftime("%Y-%m-%d")
    return (
        f"{device or platform.machine()}, {torch.get_num_threads()} threads, {versions}, "
        f"peft {peft.__version__}, {date}"
    )


def _in_fresh_process(setting: Setting, name: str) -> float:
    model = "llama" if setting["ffn"] else "small"
    sizes = [f"--{key}={setting[key]}" for key in AXES]
    place = [f"--device={setting['device']}", f"--dtype={setting['dtype']}", f"--model={model}"]
    command = [sys.executable, __file__, "init", f"--memory-of={name}", *sizes, *place]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"memory of '{name}': {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _describe(setting: Setting) -> str:
    return (
        "Llama, width {width}, {layers} layers, {rows} x {tokens} tokens, r = {rank}, vocabulary "
        "{vocabulary}, {dtype} on {device}".format(**setting)
    )


BENCHMARKS = {"init": run_init, "ranks": run_ranks, "optimizer": run_optimizer}


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--model", choices=["small", "llama"], default="small")
    parser.add_argument("--width", help="comma-separated; 512, or 4096 for the optimizer")
    parser.add_argument("--layers", help="comma-separated; 8, or 32 for the optimizer")
    parser.add_argument("--tokens", default="256", help="per row, comma-separated")
    parser.add_argument("--rows", default="8", help="comma-separated")
    parser.add_argument("--rank", default="8", help="comma-separated")
    parser.add_argument("--vocabulary", default="4096", help="comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", action="append", default=[], choices=list(INIT))
    parser.add_argument("--no-error", action="store_true", help="skip the exact SVDs")
    parser.add_argument("--memory-of", choices=list(INIT), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    of_optimizer = arguments.benchmark == "optimizer"
    if of_optimizer and arguments.width is None:
        arguments.model = "llama"
    arguments.width = arguments.width or "512"
    arguments.layers = arguments.layers or "8"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.memory_of and os.environ.get("RANK", "0") == "0":
        print(environment())
    records = BENCHMARKS[arguments.benchmark](arguments)
    if arguments.json:
        content = {"environment": environment(), "records": records}
        arguments.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
