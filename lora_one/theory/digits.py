"""Experiment 5, second half: a two-layer network that knows odd digits is fine-tuned on even ones.

LoRA-One's figure 1(c) does this with MNIST; here the 1,797 images of 8 x 8 pixels that come with
scikit-learn take its place, so that nothing is downloaded.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_one.adapters.initialize import initialize
from lora_one.layers import adapted_layers

LAYERS = ("hidden", "out")


class DigitNetwork(nn.Module):
    """64 pixels, a hidden ReLU layer, 10 classes, in fp64; called like a language model."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width, dtype=torch.float64)
        self.out = nn.Linear(width, 10, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            bound = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.0
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean cross entropy as ``loss``."""
        return {"loss": cross_entropy(self.out(self.hidden(pixels).relu()), labels)}


def digit_batch(parity: int) -> dict[str, Tensor]:
    """Return all images whose digit is even (0) or odd (1), pixels in [0, 1]."""
    data = load_digits()
    chosen = data.target % 2 == parity
    pixels = torch.tensor(data.data[chosen] / 16, dtype=torch.float64)
    return {"pixels": pixels, "labels": torch.tensor(data.target[chosen])}


@dataclass(frozen=True)
class DigitRun:
    """A fine-tuning run: the learning rate chosen, losses (t,), shifts (t, n) of all weights."""

    rate: float
    loss: Tensor
    shift: Tensor


def pretrained(width: int, seed: int, steps: int) -> DigitNetwork:
    """Return a network trained on odd digits with full-batch Adam."""
    network, batch = DigitNetwork(width, seed), digit_batch(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        network(**batch)["loss"].backward()
        optimizer.step()
    return network


def fine_tune(
    seed: int,
    *,
    width: int = 64,
    rank: int = 4,
    steps: int = 100,
    pretraining_steps: int = 20,
    rates: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
) -> dict[str, DigitRun]:
    """Fine-tune on even digits by full-batch gradient descent: full, LoRA and LoRA-One.

    Both weights are trained, biases are not. Every method takes the rate with the
    lowest mean logarithm of the loss, so that no descent with outbursts is chosen. LoRA-One's
    γ is the library's ``"auto"``: the lowest loss of the start.
    """
    network, batch = pretrained(width, seed, pretraining_steps), digit_batch(0)
    return {
        label: min(
            (
                _descend(_prepare(network, method, rank, batch, seed), batch, r, steps)
                for r in rates
            ),
            key=lambda run: float(run.loss.log().mean().nan_to_num(torch.inf)),
        )
        for label, method in (("full", None), ("LoRA", "lora"), ("LoRA-One", "lora_one"))
    }


def _prepare(
    network: DigitNetwork, method: str | None, rank: int, batch: dict[str, Tensor], seed: int
) -> nn.Module:
    network = copy.deepcopy(network)
    if method is None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.endswith("weight"))
        return network
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS))
    model = get_peft_model(network, config)
    gamma = "auto" if method == "lora_one" else 1.0
    initialize(model, [batch], method=method, stable_gamma=gamma, seed=seed)
    return model


def _descend(model: nn.Module, batch: dict[str, Tensor], rate: float, steps: int) -> DigitRun:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    base = None if isinstance(model, PeftModel) else [p.detach().clone() for p in trained]
    losses, shifts = [], []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        losses.append(loss.detach())
        shifts.append(_shift(model, trained, base))
        loss.backward()
        optimizer.step()
    return DigitRun(rate, torch.stack(losses), torch.stack(shifts))


@torch.no_grad()
def _shift(model: nn.Module, trained: list[nn.Parameter], base: list[Tensor] | None) -> Tensor:
    """Return how far all weights are from the pre-trained ones, as one vector."""
    if base is None:
        parts = [layer.s * (layer.B @ layer.A) for layer in adapted_layers(model)]
    else:
        parts = [p - start for p, start in zip(trained, base, strict=True)]
    return torch.cat([part.flatten().double() for part in parts])


@dataclass(frozen=True)
class Plane:
    """Descents in the plane of their two leading directions, with the loss on it.

    Attributes:
        x: (n,) grid.
        y: (n,) grid.
        loss: (n, n), rows along y.
        paths: label -> (t, 2).
        share: of the paths' squared distance from the pre-trained weights that the plane holds.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    paths: dict[str, Tensor]
    share: float


@torch.no_grad()
def plane_of(
    runs: dict[str, DigitRun],
    seed: int,
    *,
    width: int = 64,
    pretraining_steps: int = 20,
    grid: int = 40,
    margin: float = 0.25,
) -> Plane:
    """Project the runs of ``fine_tune`` onto their common principal plane through W.

    The loss is that of the pre-trained weights plus a shift in the plane.
    """
    network, batch = pretrained_without_grad(width, seed, pretraining_steps), digit_batch(0)
    points = torch.cat([run.shift for run in runs.values()])
    axes = torch.linalg.svd(points, full_matrices=False).Vh[:2]
    # Signs of singular vectors are free: let full fine-tuning end to the upper right.
    axes = axes * torch.where(axes @ runs["full"].shift[-1] < 0, -1.0, 1.0)[:, None]
    flat = points @ axes.T
    low, high = flat.amin(0), flat.amax(0)
    pad = margin * (high - low)
    x = torch.linspace(float(low[0] - pad[0]), float(high[0] + pad[0]), grid, dtype=torch.float64)
    y = torch.linspace(float(low[1] - pad[1]), float(high[1] + pad[1]), grid, dtype=torch.float64)
    weights = [network.hidden.weight, network.out.weight]
    base = [weight.clone() for weight in weights]
    loss = torch.empty(grid, grid, dtype=torch.float64)
    for i in range(grid):
        for j in range(grid):
            shift = (x[j] * axes[0] + y[i] * axes[1]).split([w.numel() for w in weights])
            for weight, start, part in zip(weights, base, shift, strict=True):
                weight.copy_(start + part.view_as(start))
            loss[i, j] = network(**batch)["loss"]
    share = float(flat.square().sum() / points.square().sum())
    return Plane(x, y, loss, {label: run.shift @ axes.T for label, run in runs.items()}, share)


def pretrained_without_grad(width: int, seed: int, steps: int) -> DigitNetwork:
    """Return the pre-trained network for measuring only."""
    with torch.enable_grad():
        network = pretrained(width, seed, steps)
    return network.requires_grad_(False)
