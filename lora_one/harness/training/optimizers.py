"""The optimiser that ``optimizer=`` names, over whatever the model trains."""

import torch
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from torch import nn

from lora_one import create_preconditioned_optimizer
from lora_one.harness.config.schema import Config
from lora_one.harness.models.adapter import trainable_parameters


def create_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser; every choice is AdamW in the end, on differently treated gradients."""
    settings = config.optimizer
    adamw = {
        "lr": config.model.learning_rate,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": config.model.weight_decay,
    }
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(trainable_parameters(model), fused=True, **adamw)
        case "preconditioned_adamw":
            return create_preconditioned_optimizer(
                model, torch.optim.AdamW, reg=settings.damping, fused=True, **adamw
            )
        case "riemannian":
            return create_riemannian_optimizer(
                model, torch.optim.AdamW, reg=settings.damping, fused=True, **adamw
            )
        case "loraplus":
            return create_loraplus_optimizer(
                model,
                torch.optim.AdamW,
                loraplus_lr_ratio=settings.lr_ratio,
                loraplus_weight_decay=config.model.weight_decay,
                **adamw,
            )
        case "lorafa":
            optimizer = create_lorafa_optimizer(
                model,
                r=config.peft.lora_r,
                lora_alpha=config.peft.lora_alpha,
                lr=config.model.learning_rate,
                weight_decay=config.model.weight_decay,
            )
            for group in optimizer.param_groups:
                group.update(betas=tuple(settings.betas), eps=settings.eps)
            return optimizer
    raise AssertionError(settings.name)
