"""Refuse outputs that are not numbers: their argmax is the first token or class, a made-up answer.

NaN compares as larger than everything in ``torch.argmax`` and as nothing in Python's ``max``, so
that a broken model would be scored as one that always gives the same answer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from lora_one.errors import NonFiniteError

ADVICE = "Its weights, or its arithmetic in this dtype, have overflowed: try model.bf16=false."


def require_numbers(values: Sequence[float], row: str) -> None:
    """Refuse the outputs for one row if they have no largest number.

    -inf is a number here, the logarithm of a probability of 0, as long as not all are.

    Args:
        values: Logits or log-probabilities; none of them is fine.
        row: Names the row in the message.

    Raises:
        NonFiniteError: One is NaN or +inf, or all are -inf.
    """
    if values and (any(map(math.isnan, values)) or math.isinf(max(values))):
        raise NonFiniteError(f"row {row}: the model gives {list(values)}. {ADVICE}")


class RequireNumbers(LogitsProcessor):
    """Stops decoding at the first token of a row whose logits have no largest number.

    Args:
        rows: Name of each row of the batch.
        limits: Tokens of each row that count; what is decoded beyond is cut.
        ends: Ids after which a row has ended and is decoded only because others go on.
    """

    def __init__(self, rows: Sequence[str], limits: Sequence[int], ends: Sequence[int]) -> None:
        self._rows = rows
        self._limits = limits
        self._ends = ends
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are.

        Raises:
            NonFiniteError: Those of a row that has not ended are NaN, +inf, or all -inf.
        """
        generated = input_ids[:, input_ids.shape[1] - self._step :]
        self._step += 1
        # The largest is NaN where one is.
        broken = ~scores.amax(dim=-1).isfinite()
        if broken.any():
            ends = torch.tensor(self._ends, device=generated.device)
            broken &= ~torch.isin(generated, ends).any(dim=-1)
            for row, limit, is_broken in zip(
                self._rows, self._limits, broken.tolist(), strict=True
            ):
                if is_broken and self._step <= limit:
                    raise NonFiniteError(
                        f"{row}: the model's logits for token {self._step} of the reply have no "
                        f"largest number. {ADVICE}"
                    )
        return scores
