"""What training has added to a layer's weight, from its factors alone."""

import torch
from torch import Tensor


def update_singular_values(
    B: Tensor, A: Tensor, s: float, start: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return the singular values of ``s (B A - B0 A0)``, descending, without forming the matrix.

    ``B A - B0 A0 = [B - B0, B0] [A; A - A0] = L Mᵀ`` has the singular values of ``R_L R_Mᵀ``, where
    ``L = Q_L R_L`` and ``M = Q_M R_M``: (m + n) r² operations. Written with differences of factors
    and not of products, an update that is small beside the start keeps its precision.

    Args:
        B: (m, r), now.
        A: (r, n), now.
        s: the layer's scaling.
        start: (B0, A0); None for a start at ``B0 A0 = 0``.

    Returns:
        ``min(m, n, 2r)`` values (without a start r), in at least fp32.
    """
    dtype = torch.promote_types(B.dtype, torch.float32)
    L, M = B.to(dtype), A.to(dtype).mT
    if start is not None:
        B0, A0 = start[0].to(L), start[1].to(M)
        L, M = torch.cat([L - B0, B0], dim=1), torch.cat([M, M - A0.mT], dim=1)
    R_L, R_M = (torch.linalg.qr(side, mode="r").R for side in (L, M))
    return s * torch.linalg.svdvals(R_L @ R_M.mT)
