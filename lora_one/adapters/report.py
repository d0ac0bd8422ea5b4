"""What an initialisation did, ready for JSON and for one line on a terminal."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """One layer's start.

    Attributes:
        name: of the layer in the base model.
        shape: of W, (out, in).
        rank: of the adapter.
        singular_values: of what the method decomposes (G, W, its inputs X or W C), those the
            factors use; empty for methods that decompose nothing.
        next_singular_value: the largest one left out.
        svd_error: estimated sine of the angle to the exact singular subspaces, root mean square
            over the triplets; 0 where LAPACK's full decomposition was used.
        captured_energy: share of the squared Frobenius norm in ``singular_values``; where no
            process held the whole G, of an estimate of it, see ``truncated_svd``.
        norm_ratio: ``||s B0 A0||_F / ||W||_F``; None where W is packed, or cut up by FSDP1 or
            ZeRO-3.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    singular_values: list[float] = field(default_factory=list)
    next_singular_value: float | None = None
    svd_error: float | None = None
    captured_energy: float | None = None
    norm_ratio: float | None = None


@dataclass
class InitReport:
    """An initialisation: the equation that was followed, and its effect layer by layer.

    Attributes:
        method: as in ``lora_one.numerics.methods.METHODS``.
        equation: what was computed.
        source: where the equation comes from.
        offset: whether ``s B0 A0`` was taken from the base weights.
        scale: the rule for the factors' size; None where the method has none.
        stable_gamma: the value used, also when it was searched; None where it has no effect.
        norm_clip: whether factors were clipped to the weight's size.
        seed: of random numbers.
        adapter_name: which adapter was written.
        tokens: supervised tokens in the init batch.
        strategy: how the gradient was taken, see ``lora_one.gradients.plan``.
        loss_before: of the init batch, with the base model; None without batches.
        loss_after: of the init batch, with the adapter as it starts.
        gamma_search: ``{"stable_gamma": ..., "loss": ...}`` per candidate of ``"auto"``.
        seconds: duration of gradient, factors and writing; the loss after is not included.
        cached: whether the start was computed by an earlier run and loaded.
        layers: one entry per written layer.
        left_to_peft: adapted layers that keep PEFT's own start.
        warnings: what a user should know.
    """

    method: str
    equation: str
    source: str
    offset: bool
    scale: str | None
    stable_gamma: float | None
    norm_clip: bool
    seed: int
    adapter_name: str
    tokens: int | None = None
    strategy: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    gamma_search: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    cached: bool = False
    layers: list[LayerReport] = field(default_factory=list)
    left_to_peft: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and strings, ready for JSON."""
        report = asdict(self)
        for layer in report["layers"]:
            layer["shape"] = list(layer["shape"])
        return report

    def summary(self) -> str:
        """Return one line: method, layers, loss before and after, captured energy, time."""
        parts = [f"{self.method}: {len(self.layers)} layers"]
        if self.stable_gamma is not None:
            parts.append(f"gamma {self.stable_gamma:g}")
        if self.loss_before is not None and self.loss_after is not None:
            parts.append(f"init loss {self.loss_before:.4f} -> {self.loss_after:.4f}")
        energies = [x.captured_energy for x in self.layers if x.captured_energy is not None]
        if energies:
            parts.append(f"captured energy {100 * sum(energies) / len(energies):.0f} %")
        parts.append(f"{self.seconds:.1f} s")
        return ", ".join(parts)
