"""Which ``parallelism=`` goes with what; imports no torch.

``ddp`` (the default) keeps everything on every rank; ``fsdp2`` cuts the frozen base up
(``fsdp.py``); ``zero2`` and ``zero3`` hand the training to DeepSpeed (``zero.py``). A run's result
does not depend on it, but for the order in which numbers are added up.
"""

import os
from importlib.util import find_spec
from typing import Any

from lora_one.errors import InputError
from lora_one.harness.config.schema import Config
from lora_one.harness.distributed.ranks import world_size

DEEPSPEED = ("zero2", "zero3")
# Where a rank cannot run the model while another does something else.
FORWARD_TAKES_ALL_RANKS = ("fsdp2", "zero3")
# What `accelerate launch` puts into the environment where its own file asks for a plugin.
PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# And where it asks for other arithmetic, which only the Trainer would use.
ARITHMETIC = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "model.bf16 decides here"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no model is compiled here"),
}


def check_parallelism(config: Config) -> None:
    """Refuse settings that exclude each other.

    Raises:
        InputError: the choice shards what the run needs whole.
    """
    chosen, peft = config.parallelism, config.peft
    if chosen == "ddp" or config.evaluate.adapter is not None:
        return
    if not peft.use_peft and chosen == "fsdp2":
        raise InputError(
            "parallelism=fsdp2 cuts a frozen base up, and peft=full_ft trains all of it. Give "
            "parallelism=zero2, or ddp."
        )
    if chosen not in DEEPSPEED or not config.trains:
        return
    if not peft.use_peft and config.model.bf16:
        raise InputError(
            f"parallelism={chosen}: DeepSpeed would round the weights that it trains to bfloat16, "
            "and peft=full_ft keeps them in float32. Give model.bf16=false, or parallelism=ddp."
        )
    if peft.adalora:
        raise InputError(
            f"parallelism={chosen} keeps the gradients to DeepSpeed, and peft=adalora ranks its "
            "directions by them. Give parallelism=ddp or fsdp2."
        )
    if config.optimizer.name != "adamw":
        raise InputError(
            f"parallelism={chosen} hands DeepSpeed flat pieces of the factors, and "
            f"optimizer={config.optimizer.name} needs lora_A and lora_B whole. Give "
            "parallelism=fsdp2 (adapters stay whole), or optimizer=adamw."
        )


def require_plain_launcher(config: Config) -> None:
    """Refuse a launcher that has asked accelerate for a plugin or an arithmetic of its own.

    Raises:
        InputError: it names the variable that says so.
    """
    for variable, plugin in PLUGINS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise InputError(
                f"the launcher asks accelerate for {plugin} ({variable} is set), and "
                f"parallelism={config.parallelism} decides here. Take it out of accelerate's "
                "configuration (accelerate_config.yaml shows one), and give parallelism=ddp, "
                "fsdp2, zero2 or zero3."
            )
    for variable, (setting, why) in ARITHMETIC.items():
        value = os.environ.get(variable, "no").lower()
        if value != "no":
            raise InputError(
                f"the launcher asks accelerate for {setting}={value} ({variable} is set), and "
                f"{why}. Start with accelerate launch --{setting} no, or with "
                "accelerate_config.yaml."
            )


def require_launcher(config: Config) -> None:
    """Refuse a launch that contradicts ``parallelism``, before anything is loaded.

    Raises:
        InputError: as ``require_plain_launcher``; or one rank has nobody to share with, or
            DeepSpeed is not installed.
    """
    require_plain_launcher(config)
    chosen = config.parallelism
    if chosen == "ddp":
        return
    if world_size() == 1:
        raise InputError(
            f"parallelism={chosen} spreads a run over ranks, and there is one. Start several "
            "(torchrun, accelerate launch), or give parallelism=ddp."
        )
    if chosen in DEEPSPEED and find_spec("deepspeed") is None:
        raise InputError(
            f"parallelism={chosen} needs DeepSpeed, which is not installed: pip install "
            "deepspeed. parallelism=fsdp2 needs nothing more than torch."
        )


def require_whole_weights(config: Config, adapter: Any) -> None:
    """Refuse an adapter whose start or forward pass reads whole weights outside of their layer.

    Raises:
        InputError: DoRA on a base that is cut up.
    """
    if config.parallelism in FORWARD_TAKES_ALL_RANKS and getattr(adapter, "use_dora", False):
        raise InputError(
            f"parallelism={config.parallelism} cuts the base up, and DoRA's magnitudes are norms "
            "of whole rows of it. Give parallelism=ddp, or an adapter without DoRA."
        )
