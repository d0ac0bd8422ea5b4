"""Experiment 6, a language model: where adapters turn while training, and one step alone."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one.adapters.initialize import initialize
from lora_one.evaluation.evaluate import evaluate_task
from lora_one.evaluation.loss import mean_token_loss
from lora_one.gradients.estimate import estimate_gradients
from lora_one.layers import adapted_layers
from lora_one.numerics.angles import principal_angles
from lora_one.numerics.svd import truncated_svd
from lora_one.tasks.arithmetic import Arithmetic
from lora_one.tasks.encoding import Collator, encode, padding_id

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "data" / "tiny_llama"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LanguageProblem:
    """A model's folder, its tokenizer and the word problems as batches.

    Attributes:
        folder: of the model.
        tokenizer: of the model.
        train: one batch per training step.
        large: the batches of the «full» gradient, with more rows.
        small: the batch of LoRA-One's start, 8 rows.
        validation: batches.
    """

    folder: Path
    tokenizer: Any
    train: list[Batch]
    large: list[Batch]
    small: list[Batch]
    validation: list[Batch]

    def model(self) -> nn.Module:
        """Load the model in fp32."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def adapted(self, rank: int, seed: int) -> PeftModel:
        """Load the model with LoRA (s = alpha / sqrt(r), alpha = 2 r) on every linear layer."""
        torch.manual_seed(seed)  # PEFT draws lora_A from the global generator
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, use_rslora=True, target_modules="all-linear"
        )
        return get_peft_model(self.model(), config)

    def loss(self, model: nn.Module) -> float:
        """Return the validation loss in nats per supervised token."""
        return mean_token_loss(model, self.validation, "causal").mean


def language_problem(
    folder: str | Path = EMBEDDED_MODEL,
    *,
    steps: int,
    batch_rows: int = 16,
    large_rows: int = 256,
    validation_rows: int = 100,
) -> LanguageProblem:
    """Encode the embedded word problems for a model.

    The rows of a training step, of the large and of the small gradient batch are taken in file
    order, starting with the first row each.

    Args:
        folder: of a causal model and its tokenizer.
        steps: how many training batches.
        batch_rows: rows of each.
        large_rows: rows of the «full» gradient.
        validation_rows: rows of the validation loss.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = Arithmetic()
    collate = Collator(padding_id(tokenizer), "causal")

    def batches(split: str, rows: int, size: int) -> list[Batch]:
        examples = task.load(split)
        if rows > len(examples):
            raise ValueError(f"{rows} rows of '{split}' asked for, {len(examples)} are there.")
        kept = encode(examples[:rows], tokenizer, max_length=512, architecture="causal").rows
        return [collate(kept[i : i + size]) for i in range(0, len(kept), size)]

    return LanguageProblem(
        Path(folder),
        tokenizer,
        train=batches("train", steps * batch_rows, batch_rows),
        large=batches("train", large_rows, 32),
        small=batches("train", 8, 8),
        validation=batches("validation", validation_rows, 50),
    )


@dataclass(frozen=True)
class AngleRow:
    """Angles of one layer's factors to its one-step gradient's singular spaces, at one step.

    Attributes:
        step: of training.
        kind: the layer's last name, such as ``q_proj``.
        A: mean sine of the principal angles between A's and G's leading input directions.
        B: the same for B and G's output directions; 1 where B is zero.
        A_largest: sine of the largest of the angles.
        B_largest: likewise.
    """

    step: int
    kind: str
    A: float
    B: float
    A_largest: float
    B_largest: float


@dataclass(frozen=True)
class TrainedRun:
    """What a training left: angles, validation losses by step, and the model."""

    angles: list[AngleRow]
    losses: dict[int, float]
    model: PeftModel


def follow(
    problem: LanguageProblem,
    method: str,
    *,
    rank: int = 8,
    directions: int = 4,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    rate: float = 6e-3,
    shrink: float = 1.0,
    looks: Sequence[int] = (0, 1, 2, 5, 10, 20, 50, 100),
    stable_gamma: float | str = 128.0,
    seed: int = 0,
) -> TrainedRun:
    """Train at a constant rate, gradient norms clipped at 1; measure angles and validation loss.

    The one-step gradient is that of the base model on ``problem.large``.

    Args:
        problem: the model and its batches; one batch per step.
        method: ``lora`` or ``lora_one``, which starts from ``problem.small``.
        rank: r.
        directions: how many leading directions of A, B and G are compared. Theorem 3.2 wants
            half the rank or fewer.
        optimizer: AdamW or SGD, both without weight decay.
        rate: learning rate.
        shrink: multiplies A at the start; LoRA-One's theorem 3.2 is about small A.
        looks: at which steps to measure; training ends with the last.
        stable_gamma: as in ``lora_one.initialize``.
        seed: of A.
    """
    model = problem.adapted(rank, seed)
    gradients = estimate_gradients(model, problem.large)
    spaces = {name: truncated_svd(G, directions) for name, G in gradients.items()}
    options = {} if method == "lora" else {"stable_gamma": stable_gamma}
    initialize(model, problem.small, method=method, seed=seed, measure_loss=False, **options)
    for layer in adapted_layers(model):
        layer.A.data.mul_(shrink)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = optimizer(trained, lr=rate, weight_decay=0.0)
    angles: list[AngleRow] = []
    losses: dict[int, float] = {}
    for step in range(max(looks) + 1):
        if step in looks:
            losses[step] = problem.loss(model)
            angles += _angle_rows(model, spaces, step, directions)
        if step == max(looks):
            break
        steps.zero_grad()
        model(**problem.train[step]).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        steps.step()
    return TrainedRun(angles, losses, model)


@torch.no_grad()
def _angle_rows(
    model: PeftModel, spaces: Mapping[str, Any], step: int, directions: int
) -> Iterator[AngleRow]:
    for layer in adapted_layers(model):
        target = spaces[layer.name]
        A = _sines(layer.A.mT, target.Vh.mT, directions)
        B = _sines(layer.B, target.U, directions)
        kind = layer.name.rsplit(".", 1)[-1]
        yield AngleRow(step, kind, float(A.mean()), float(B.mean()), float(A[-1]), float(B[-1]))


def _sines(factor: Tensor, space: Tensor, directions: int) -> Tensor:
    if not factor.any():
        return torch.ones(directions)
    return principal_angles(truncated_svd(factor, directions).U, space).sin()


def by_kind(rows: Sequence[AngleRow], name: str) -> dict[str, dict[int, float]]:
    """Return kind of layer -> step -> the mean over layers of the attribute ``name``."""
    grouped: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[row.kind][row.step].append(getattr(row, name))
    return {
        kind: {step: sum(values) / len(values) for step, values in series.items()}
        for kind, series in grouped.items()
    }


@contextmanager
def shifted(model: nn.Module, shifts: Mapping[str, Tensor], scale: float) -> Iterator[None]:
    """Add ``scale`` times the shifts to the named layers' weights for a while."""
    weights = {name: model.get_submodule(name).weight for name in shifts}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.add_(shifts[name].to(weight), alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


@dataclass(frozen=True)
class OneStepLosses:
    """Validation losses of the base model after one step of size η, without any training.

    Attributes:
        base: the untouched model's loss.
        losses: label -> η -> loss.
        best: label -> the shift that has the lowest loss, times its η, by layer.
    """

    base: float
    losses: dict[str, dict[float, float]]
    best: dict[str, dict[str, Tensor]]


def one_step_losses(
    problem: LanguageProblem, *, rates: Sequence[float], rank: int = 8
) -> OneStepLosses:
    """Evaluate ``W - η G_B`` and ``W - η P_r(G_b)`` (LoRA-One, section 6.1).

    B is ``problem.large``, b is ``problem.small``. A third step is Algorithm 1's: every layer's
    ``P_r(G_b)`` divided by its largest singular value, so that η is the norm of each layer's step.
    """
    model = problem.model()
    full = estimate_gradients(model, problem.large)
    small = estimate_gradients(model, problem.small)
    low_rank, normalised = {}, {}
    for name, G in small.items():
        svd = truncated_svd(G, rank)
        low_rank[name] = (svd.U * svd.S) @ svd.Vh
        normalised[name] = low_rank[name] / svd.S[0]
    steps = {"full": full, f"rank {rank}": low_rank, f"rank {rank}, per layer": normalised}
    losses: dict[str, dict[float, float]] = {}
    best = {}
    for label, gradient in steps.items():
        losses[label] = {}
        for rate in rates:
            with shifted(model, gradient, -rate):
                losses[label][rate] = problem.loss(model)
        eta = min(losses[label], key=losses[label].__getitem__)
        best[label] = {name: -eta * G for name, G in gradient.items()}
    return OneStepLosses(problem.loss(model), losses, best)


def accuracy(problem: LanguageProblem, model: nn.Module, rows: int) -> float:
    """Return the share of the first test problems that greedy decoding answers rightly."""
    task = Arithmetic()
    result = evaluate_task(
        model,
        problem.tokenizer,
        task,
        task.load("test")[:rows],
        architecture="causal",
        batch_size=rows,
        max_new_tokens=48,
    )
    return result.metrics["accuracy"]


def outcomes(
    problem: LanguageProblem,
    step: OneStepLosses,
    trained: Mapping[str, TrainedRun],
    test_rows: int,
) -> list[dict[str, Any]]:
    """Return validation loss and test accuracy of the base model, of each step and each run."""
    base = problem.model()
    rows = [_outcome(problem, "base", base, test_rows)]
    for label, shift in step.best.items():
        with shifted(base, shift, 1.0):
            rows.append(_outcome(problem, f"one step, {label}", base, test_rows))
    for label, run in trained.items():
        label = f"{label}, {max(run.losses)} steps"
        rows.append(_outcome(problem, label, run.model, test_rows))
    return rows


def _outcome(
    problem: LanguageProblem, label: str, model: nn.Module, test_rows: int
) -> dict[str, Any]:
    return {
        "model": label,
        "validation loss": problem.loss(model),
        "test accuracy": accuracy(problem, model, test_rows),
    }
