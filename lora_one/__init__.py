"""LoRA-One and its relatives: how a LoRA adapter starts, and how it is preconditioned.

The library works on a plain ``peft.PeftModel``::

    report = lora_one.initialize(model, batches, method="lora_one", stable_gamma=128)
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=2e-4)
    ...
    lora_one.export_adapter(model, "adapter/")  # plain LoRA for the untouched base

Everything named here is imported on first use, so that ``import lora_one`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_one.adapters.allocation import RankAllocation, allocate_ranks, alpha_pattern
    from lora_one.adapters.export import ExportReport, export_adapter
    from lora_one.adapters.initialize import initialize, initialize_adapters
    from lora_one.adapters.report import InitReport
    from lora_one.errors import InputError, NonFiniteError
    from lora_one.gradients.estimate import estimate_gradients
    from lora_one.numerics.angles import principal_angles
    from lora_one.optimizers import create_preconditioned_optimizer

__version__ = "0.1.0"

_HOME = {
    "ExportReport": "lora_one.adapters.export",
    "InitReport": "lora_one.adapters.report",
    "InputError": "lora_one.errors",
    "NonFiniteError": "lora_one.errors",
    "RankAllocation": "lora_one.adapters.allocation",
    "allocate_ranks": "lora_one.adapters.allocation",
    "alpha_pattern": "lora_one.adapters.allocation",
    "create_preconditioned_optimizer": "lora_one.optimizers",
    "estimate_gradients": "lora_one.gradients.estimate",
    "export_adapter": "lora_one.adapters.export",
    "initialize": "lora_one.adapters.initialize",
    "initialize_adapters": "lora_one.adapters.initialize",
    "principal_angles": "lora_one.numerics.angles",
}

__all__ = [
    "ExportReport",
    "InitReport",
    "InputError",
    "NonFiniteError",
    "RankAllocation",
    "allocate_ranks",
    "alpha_pattern",
    "create_preconditioned_optimizer",
    "estimate_gradients",
    "export_adapter",
    "initialize",
    "initialize_adapters",
    "principal_angles",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
