"""pass@k: the chance that at least one of k replies is right."""

from collections.abc import Iterable

from lora_one.errors import InputError


def pass_at_k(samples: int, correct: int, k: int) -> float:
    r"""Estimate pass@k of one problem without bias.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, arXiv:2107.03374, equation 1): one minus the
    chance that k of the n replies, drawn without putting back, are all wrong. As a product,
    ``1 - prod_{i = n-c+1}^{n} (1 - k / i)``.

    Args:
        samples: Replies judged, n.
        correct: Those that passed, c.
        k: Replies that a user may look at, at most n.

    Raises:
        InputError: k is not between 1 and n, or c not between 0 and n.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise InputError(
            f"pass@{k} of {correct} correct among {samples} replies; expected "
            "1 <= k <= replies and 0 <= correct <= replies"
        )
    if samples - correct < k:
        return 1.0
    all_wrong = 1.0
    for i in range(samples - correct + 1, samples + 1):
        all_wrong *= 1 - k / i
    return 1 - all_wrong


def mean_pass_at_k(counts: Iterable[tuple[int, int]], k: int) -> float:
    """Average ``pass_at_k`` over problems, given as pairs (replies, correct)."""
    values = [pass_at_k(samples, correct, k) for samples, correct in counts]
    if not values:
        raise InputError(f"pass@{k} over no problem is not a number")
    return sum(values) / len(values)
