"""The official metrics of GLUE and SuperGLUE, computed by scikit-learn and scipy without network.

A prediction that could not be read (None) counts as wrong as it can be: as the other class of two
(as in the T5 code), as no class of several, as the end of a scale that is farther from the gold
score. Nothing here is ever NaN: where a metric is not defined because all predictions or all gold
answers are equal, it is 0, and ``constant`` is 1.
"""

from collections.abc import Callable, Sequence
from typing import Literal

Metric = Literal["matthews", "f1", "macro_f1", "correlation"]


def official_metrics(
    metric: Metric,
    gold: Sequence[str],
    predicted: Sequence[str | None],
    *,
    labels: Sequence[str] = (),
    score_range: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Compute a benchmark's metric over all rows.

    Args:
        metric: ``matthews`` (CoLA), ``f1`` of the second label (MRPC, QQP), ``macro_f1``, the mean
            over the labels (CB), or ``correlation``, Pearson's and Spearman's (STS-B).
        gold: Gold label words, or gold scores.
        predicted: What was read from the replies.
        labels: The label words by class index.
        score_range: The ends of the scale of a score.

    Returns:
        The named metric, or ``pearson`` and ``spearman``; and ``constant``, 1.0 where the gold
        answers or the predictions do not vary, else 0.0.
    """
    compute: dict[str, Callable[[], dict[str, float]]] = {
        "matthews": lambda: _binary(gold, predicted, labels, "matthews"),
        "f1": lambda: _binary(gold, predicted, labels, "f1"),
        "macro_f1": lambda: _macro_f1(gold, predicted, labels),
        "correlation": lambda: _correlation(gold, predicted, score_range),
    }
    return compute[metric]()


def _binary(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str], metric: str
) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth = [labels.index(word) for word in gold]
    guess = [
        1 - true if word is None else labels.index(word)
        for true, word in zip(truth, predicted, strict=True)
    ]
    value = (
        matthews_corrcoef(truth, guess)
        if metric == "matthews"
        else f1_score(truth, guess, zero_division=0)
    )
    return {metric: float(value), "constant": float(_is_constant(truth) or _is_constant(guess))}


def _macro_f1(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> dict[str, float]:
    from sklearn.metrics import f1_score

    truth = [labels.index(word) for word in gold]
    guess = [-1 if word is None else labels.index(word) for word in predicted]
    classes = list(range(len(labels)))
    value = f1_score(truth, guess, labels=classes, average="macro", zero_division=0)
    return {"macro_f1": float(value), "constant": float(_is_constant(truth) or _is_constant(guess))}


def _correlation(
    gold: Sequence[str], predicted: Sequence[str | None], score_range: tuple[float, float] | None
) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    low, high = score_range or (0.0, 1.0)
    truth = [float(score) for score in gold]
    guess = [
        (low if true - low > high - true else high) if score is None else float(score)
        for true, score in zip(truth, predicted, strict=True)
    ]
    if _is_constant(truth) or _is_constant(guess):
        return {"pearson": 0.0, "spearman": 0.0, "constant": 1.0}
    return {
        "pearson": float(pearsonr(truth, guess).statistic),
        "spearman": float(spearmanr(truth, guess).statistic),
        "constant": 0.0,
    }


def _is_constant(values: Sequence[float]) -> bool:
    return len(set(values)) == 1
