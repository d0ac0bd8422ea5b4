"""A matrix known by the outer products it is the sum of, multiplied without being formed."""

import torch
from torch import Tensor


class OuterProducts:
    """``M = c Σ_t g_t x_tᵀ`` (m, n), known by its T pairs of vectors.

    A linear layer's gradient is such a sum, over tokens. A product with b vectors costs
    ``2 T (m + n) b`` operations this way and ``2 m n b`` with M at hand, but forming M costs
    ``2 T m n``: as much as products with ``m n / (m + n)`` vectors, whatever T is. A truncated
    decomposition takes fewer than that of all but small matrices, see ``truncated_svd``.
    """

    def __init__(self, g: Tensor, x: Tensor, factor: float = 1.0) -> None:
        """Take the vectors as rows: ``g`` (T, m) and ``x`` (T, n), of one dtype, fp32 or fp64."""
        self.g, self.x, self.factor = g, x, factor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.g.shape[1], self.x.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The vectors'."""
        return self.g.dtype

    @property
    def device(self) -> torch.device:
        """The vectors'."""
        return self.g.device

    @property
    def mT(self) -> "OuterProducts":  # noqa: N802 - as tensors have it
        """The transpose."""
        return OuterProducts(self.x, self.g, self.factor)

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return ``M X`` (m, b), column-major, for a thin X (n, b)."""
        # Both products read their large operand along its rows: BLAS takes twice as long for
        # ``gᵀ (x X)``.
        y = self.x @ X
        return torch.addmm(y.new_zeros(()), y.mT, self.g, beta=0, alpha=self.factor).mT

    def __truediv__(self, divisor: float) -> "OuterProducts":
        """Return ``M / divisor``."""
        return OuterProducts(self.g, self.x, self.factor / divisor)

    def form(self) -> Tensor:
        """Return M."""
        zero = self.g.new_zeros(())
        return torch.addmm(zero, self.g.mT, self.x, beta=0, alpha=self.factor)
