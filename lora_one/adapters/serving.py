"""What vLLM and llama.cpp need of an adapter, and whether a stored one has it.

As of November 2026. vLLM takes the factors and refuses what else an adapter holds. It reads ``r``,
``lora_alpha`` and ``use_rslora``; most releases do not read ``rank_pattern`` and ``alpha_pattern``,
and multiply every layer's product by the s of these three. llama.cpp's
``convert_lora_to_gguf.py`` takes the factors and ``lora_alpha``; a layer's product is multiplied by
``lora_alpha`` over the rank of its own B.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from lora_one.adapters.stored import StoredAdapter, scaling

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``max_lora_rank``."""

_EXPORT = "python -m lora_one.adapters export ADAPTER OUT"
_MERGE = "python -m lora_one.adapters merge ADAPTER OUT"


@dataclass(frozen=True)
class Verdict:
    """Whether a program can use an adapter.

    Attributes:
        program: Its name.
        obstacles: What it would refuse or compute wrongly, each with what to do.
        command: How to use the adapter, once there is no obstacle.
    """

    program: str
    obstacles: list[str]
    command: str


def vllm_rank(rank: int) -> int | None:
    """Return the smallest ``max_lora_rank`` that vLLM takes and a rank fits into, if any."""
    return next((choice for choice in VLLM_RANKS if choice >= rank), None)


def check_vllm(adapter: StoredAdapter) -> Verdict:
    """Say whether vLLM can serve a stored adapter."""
    rank = max(layer.r for layer in adapter.layers)
    obstacles = _common_obstacles(adapter)
    if vllm_rank(rank) is None:
        obstacles.append(
            f"rank {rank} is more than {VLLM_RANKS[-1]}; cut it: {_EXPORT} --rank {VLLM_RANKS[-1]}"
        )
    config = adapter.config
    s = scaling(config["lora_alpha"], config["r"], use_rslora=bool(config.get("use_rslora")))
    if any(not math.isclose(layer.s, s) for layer in adapter.layers):
        obstacles.append(
            f"rank_pattern, alpha_pattern: most releases multiply every layer by {s:.4g}; give all "
            f"layers one rank and alpha: {_EXPORT} --uniform"
        )
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        obstacles.append(
            "task_type SEQ_2_SEQ_LM: vLLM serves LoRA for decoder-only language models; use the "
            "adapter with PEFT"
        )
    if config.get("alora_invocation_tokens"):
        obstacles.append("alora_invocation_tokens: not read; use the adapter with PEFT")
    command = (
        f"vllm serve {shlex.quote(_base(adapter))} --enable-lora --max-lora-rank "
        f"{vllm_rank(rank)} --lora-modules {shlex.quote(f'NAME={adapter.path}')}"
    )
    return Verdict("vLLM", obstacles, command)


def check_llama_cpp(adapter: StoredAdapter) -> Verdict:
    """Say whether llama.cpp's converter makes a right GGUF file of a stored adapter."""
    obstacles = _common_obstacles(adapter)
    alpha = adapter.config["lora_alpha"]
    if any(not math.isclose(layer.s, alpha / layer.r) for layer in adapter.layers):
        uniform = len({(layer.r, layer.alpha) for layer in adapter.layers}) == 1
        options = [] if uniform else ["--uniform"]
        options += ["--fold-rslora"] if adapter.config.get("use_rslora") else []
        obstacles.append(
            "rsLoRA or alpha_pattern: a layer is multiplied by lora_alpha / r; say the same with "
            f"another alpha: {_EXPORT} {' '.join(options)}"
        )
    command = (
        f"python convert_lora_to_gguf.py {shlex.quote(str(adapter.path))} "
        "--base FOLDER_OF_THE_BASE --outfile adapter.gguf; "
        "llama-cli -m base.gguf --lora adapter.gguf"
    )
    return Verdict("llama.cpp", obstacles, command)


def _common_obstacles(adapter: StoredAdapter) -> list[str]:
    """Return what neither program can use."""
    config = adapter.config
    obstacles = []
    if adapter.changes_base:
        obstacles.append(
            f"init_lora_weights='{config['init_lora_weights']}': the factors are for a base that "
            "PEFT changes when it loads them; convert the adapter first, by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.get("use_dora"):
        obstacles.append(f"DoRA: the magnitudes are not read; merge it: {_MERGE}")
    if config.get("modules_to_save"):
        names = ", ".join(config["modules_to_save"])
        obstacles.append(f"modules_to_save ({names}): not read; merge the adapter: {_MERGE}")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        obstacles.append(f"biases: not read; merge the adapter: {_MERGE}")
    if config.get("layer_replication"):
        obstacles.append("layer_replication: the base has other layers; use the adapter with PEFT")
    convolutions = [layer.name for layer in adapter.layers if layer.kind == "convolution"]
    if convolutions:
        obstacles.append(f"convolutions ({convolutions[0]}): not read; merge the adapter: {_MERGE}")
    if adapter.others and not obstacles:
        first = next(iter(adapter.others))
        obstacles.append(f"'{first}' is no lora_A or lora_B; merge the adapter: {_MERGE}")
    return obstacles


def render(verdicts: Sequence[Verdict]) -> str:
    """Lay verdicts out for a terminal: yes and the command, or no and the obstacles."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.program}: {'no' if verdict.obstacles else 'yes'}")
        lines += [f"  - {text}" for text in verdict.obstacles] or [f"  {verdict.command}"]
    return "\n".join(lines)


def _base(adapter: StoredAdapter) -> str:
    return adapter.config.get("base_model_name_or_path") or "BASE"
