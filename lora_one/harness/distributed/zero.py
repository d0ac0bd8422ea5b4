"""``parallelism=zero2`` and ``zero3``: DeepSpeed does the training, from its start to its end.

ZeRO-2 shares out the gradients and the optimiser's state, ZeRO-3 the weights as well. The model is
whole on every rank before the training, so that every method can start it, and again afterwards,
so that ranks evaluate and export by themselves: ZeRO-3 saves memory only while it trains.
"""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

STAGES = {"zero2": 2, "zero3": 3}


def deepspeed_arguments(parallelism: str) -> dict[str, Any]:
    """Return what TrainingArguments have to be told; in "auto" the Trainer puts what it knows.

    The process group is there already, and accelerate is to take it as it is: on a CPU it would
    not find DeepSpeed by itself.
    """
    if parallelism not in STAGES:
        return {}
    PartialState().distributed_type = DistributedType.DEEPSPEED
    settings = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": STAGES[parallelism]},
    }
    return {"deepspeed": settings, "accelerator_config": {"use_configured_state": True}}


@torch.no_grad()
def make_whole(model: nn.Module, engine: Any) -> None:
    """Take a trained model out of DeepSpeed's hands: every rank gets all weights, and no hooks.

    Args:
        model: The model that was trained.
        engine: DeepSpeed's wrapper of it.
    """
    # While transformers knows of ZeRO-3, it cuts up every model that it loads.
    unset_hf_deepspeed_config()
    if engine.zero_optimization_stage() < 3:
        engine.destroy()
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        values = [parameter.detach().clone() for parameter in parameters]
    engine.destroy()
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
        parameter.ds_status = ZeroParamStatus.AVAILABLE
