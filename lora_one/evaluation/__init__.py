"""Evaluation: batched generation, token-weighted loss, and one call that scores a task."""

from importlib import import_module

_HOME = {
    "choice_log_probabilities": "choices",
    "EvaluationResult": "evaluate",
    "evaluate_task": "evaluate",
    "Reply": "generation",
    "generate_replies": "generation",
    "Sampling": "sampling",
    "TokenLoss": "loss",
    "mean_token_loss": "loss",
    "token_loss_sum": "loss",
    "evaluation_mode": "mode",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
