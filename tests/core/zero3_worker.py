"""One rank of test_zero3: the gradient and the start on a base that DeepSpeed has cut up."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lora_one
from lora_one.layers import adapted_layers
from tests.core.tiny import batches_for, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
ROWS = (2, 3)


def main(file: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    share = [batches_for(rows=ROWS)[dist.get_rank()]]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    base = tiny_llama()
    base.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=base, config=settings)
    assert base.model.layers[0].self_attn.q_proj.weight.numel() == 0
    results = {
        "gradients": lora_one.estimate_gradients(engine.module, share, target_modules=TARGETS)
    }
    adapted = get_peft_model(engine.module, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    lora_one.initialize(adapted, share, method="lora_one")
    results["products"] = {
        layer.name: (layer.B @ layer.A).detach() for layer in adapted_layers(adapted)
    }
    if dist.get_rank() == 0:
        torch.save(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
