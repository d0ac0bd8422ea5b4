"""The figures of a block: which there are, and what each shows."""

from collections.abc import Callable, Sequence

from lora_one.reports.arms import LEARNING_RATE, Arm
from lora_one.reports.comparison import Block
from lora_one.reports.figure import Evidence, Figure, Series
from lora_one.reports.groups import Group
from lora_one.reports.layer_figures import layer_figures
from lora_one.reports.statistics import mean, mean_of, sd
from lora_one.reports.traces import Curve, Points, Trace, curve

BUCKETS = 200


def shown_runs(blocks: Sequence[Block]) -> set[str]:
    """Return the names of the runs whose curves are drawn: the chosen point of each arm."""
    return {
        run.folder.name for block in blocks for row in block.rows for run in row.arm.chosen.runs
    }


def make_figures(block: Block, evidence: Evidence) -> list[Figure]:
    """Return the figures of a block for which there is anything to show."""
    arms = [row.arm for row in block.rows]
    candidates = [
        _training_loss(arms, evidence),
        _by_epoch(arms, evidence, "validation-loss", "Validation loss", lambda t: t.validation),
        _by_epoch(arms, evidence, "metric", block.metric, lambda t: t.metric),
        _against_rate(arms, "learning-rate", block.metric, lambda g: g.values(block.metric)),
        _against_rate(
            arms, "learning-rate-loss", "validation loss", lambda group: group.validation_losses
        ),
        _differences(block),
        _pareto(block, "time", "start and training, seconds", _seconds),
        _pareto(block, "memory", "peak memory, GB", lambda group: group.peak_memory / 1e9),
        *layer_figures(arms, evidence),
    ]
    return [figure for figure in candidates if figure is not None]


def _line(arm: Arm, drawn: Curve) -> Series:
    chosen = arm.chosen
    return Series(
        arm.name, chosen.method, chosen.optimiser, "line", drawn.x, drawn.y, drawn.low, drawn.high
    )


def _training_loss(arms: Sequence[Arm], evidence: Evidence) -> Figure | None:
    series, points, seeds = [], 0, 0
    for arm in arms:
        traces = evidence.traces_of(arm.chosen)
        drawn = curve([trace.loss for trace in traces], BUCKETS)
        if drawn.x:
            series.append(_line(arm, drawn))
            points, seeds = max(points, drawn.points), max(seeds, len(traces))
    if not series:
        return None
    reduced = (
        f" {points:,} logged values per line are shown as {BUCKETS} means; the bands keep the "
        "smallest and the largest value of each."
        if points > BUCKETS
        else ""
    )
    return Figure(
        "training-loss",
        "Training loss",
        "step",
        "training loss",
        f"{_chosen_words(seeds)} Line: mean; band: smallest to largest.{reduced}",
        tuple(series),
        y_log=_is_wide(series),
    )


def _by_epoch(
    arms: Sequence[Arm],
    evidence: Evidence,
    key: str,
    title: str,
    points_of: Callable[[Trace], Points],
) -> Figure | None:
    series, seeds = [], 0
    for arm in arms:
        traces = evidence.traces_of(arm.chosen)
        drawn = curve([points_of(trace) for trace in traces], BUCKETS)
        if len(drawn.x) > 1:
            series.append(_line(arm, drawn))
            seeds = max(seeds, len(traces))
    if not series:
        return None
    caption = f"{_chosen_words(seeds)} Line: mean over seeds; band: smallest to largest."
    name = title[0].upper() + title[1:]
    is_loss = key == "validation-loss"
    wide = is_loss and _is_wide(series)
    y_label = title.lower() if is_loss else title
    return Figure(key, f"{name} per epoch", "epoch", y_label, caption, tuple(series), y_log=wide)


def _chosen_words(seeds: int) -> str:
    of = f", all its seeds (up to {seeds})" if seeds > 1 else ""
    return f"The chosen setting of each method and optimiser{of}."


def _is_wide(series: Sequence[Series]) -> bool:
    """Tell whether positive values span so much that a linear axis would hide most of them."""
    values = [value for one in series for value in one.y]
    return min(values) > 0 and max(values) / min(values) > 12


def _against_rate(
    arms: Sequence[Arm], key: str, name: str, values_of: Callable[[Group], Sequence[float | None]]
) -> Figure | None:
    series = []
    for arm in arms:
        best_at = _best_by_rate(arm)
        scored = {rate: values_of(group) for rate, group in best_at.items()}
        scored = {rate: values for rate, values in scored.items() if mean_of(values) is not None}
        if len(scored) < 2:
            continue
        rates = sorted(scored)
        means = [mean(scored[rate]) for rate in rates]
        spreads = [sd(scored[rate]) or 0.0 for rate in rates]
        chosen = arm.chosen
        series.append(
            Series(
                arm.name,
                chosen.method,
                chosen.optimiser,
                "line",
                rates,
                means,
                [centre - spread for centre, spread in zip(means, spreads, strict=True)],
                [centre + spread for centre, spread in zip(means, spreads, strict=True)],
                [f"{len(scored[rate])} seeds" for rate in rates],
            )
        )
        seeds = [(rate, value) for rate in rates for value in scored[rate]]
        series.append(
            Series(
                arm.name,
                chosen.method,
                chosen.optimiser,
                "points",
                [rate for rate, _ in seeds],
                [value for _, value in seeds],
                faint=True,
            )
        )
    if not series:
        return None
    caption = (
        "Line: mean over seeds; band: ± 1 sd; dots: single runs. Where other settings were tuned "
        "as well, the one with the lowest validation loss stands for each rate."
    )
    return Figure(
        key,
        f"{name[0].upper() + name[1:]} against learning rate",
        "learning rate",
        name,
        caption,
        tuple(series),
        x_log=True,
    )


def _best_by_rate(arm: Arm) -> dict[float, Group]:
    """At each learning rate, the setting with the lowest validation loss."""
    best: dict[float, Group] = {}
    for group in arm.tried:
        rate = group.settings.get(LEARNING_RATE)
        if not group.is_trained or not isinstance(rate, int | float):
            continue
        if rate not in best or _loss(group) < _loss(best[rate]):
            best[rate] = group
    return best


def _loss(group: Group) -> float:
    loss = mean_of(group.validation_losses)
    return float("inf") if loss is None else loss


def _differences(block: Block) -> Figure | None:
    judged = [row for row in block.rows if row.difference is not None and row.difference.interval]
    if not judged:
        return None
    series = [
        Series(
            row.arm.name,
            row.arm.chosen.method,
            row.arm.chosen.optimiser,
            "points",
            [row.difference.mean],
            [float(index)],
            [row.difference.interval[0]],
            [row.difference.interval[1]],
        )
        for index, row in enumerate(judged)
    ]
    best = block.rows[0].arm.name
    return Figure(
        "differences",
        f"Difference to the best ({best})",
        f"difference of {block.metric}, paired over seeds",
        "",
        "Point: mean difference over seeds; bar: 95 % interval. A bar that crosses 0 is a "
        "difference that cannot be told from noise.",
        tuple(series),
        rows=tuple(row.arm.name for row in judged),
    )


def _seconds(group: Group) -> float:
    return mean(group.init_seconds) + mean(group.train_seconds)


def _pareto(block: Block, key: str, x_label: str, cost: Callable[[Group], float]) -> Figure | None:
    scored = [g for g in block.groups if mean_of(g.values(block.metric)) is not None]
    if not scored:
        return None
    series = []
    costs = {id(group): cost(group) for group in scored}
    scores = {id(group): mean(group.values(block.metric)) for group in scored}
    for row in block.rows:
        arm, members = row.arm, [group for group in row.arm.groups if id(group) in costs]
        others = [group for group in members if group is not arm.chosen]
        for groups, faint in ((others, True), ([arm.chosen], False)):
            groups = [group for group in groups if id(group) in costs]
            if groups:
                series.append(
                    Series(
                        arm.name,
                        arm.chosen.method,
                        arm.chosen.optimiser,
                        "points",
                        [costs[id(group)] for group in groups],
                        [scores[id(group)] for group in groups],
                        labels=[_describe(group) for group in groups],
                        faint=faint,
                    )
                )
    front = pareto_front(
        [(costs[id(group)], scores[id(group)]) for group in scored], block.higher_is_better
    )
    xs, ys = [x for x, _ in front], [y for _, y in front]
    series.append(Series("Pareto front", "", "", "front", xs, ys))
    # Where all is equal there is nothing to trade.
    if len(set(costs.values())) < 2:
        return None
    return Figure(
        key,
        f"{block.metric[0].upper() + block.metric[1:]} against {key}",
        x_label,
        block.metric,
        "One point per setting, mean over seeds; large: the chosen setting of each method and "
        "optimiser. Dashed: settings that no other beats in both. "
        "Times of runs that shared a machine compare poorly.",
        tuple(series),
    )


def pareto_front(
    points: Sequence[tuple[float, float]], higher_is_better: bool
) -> list[tuple[float, float]]:
    """Return the (cost, score) points that no other equals or beats in both, by rising cost."""
    sign = -1 if higher_is_better else 1
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * score < sign * front[-1][1]:
            front.append((cost, score))
    return front


def _describe(group: Group) -> str:
    rate = "" if group.learning_rate is None else f", lr {group.learning_rate:g}"
    return f"{group.method} · {group.optimiser}{rate}, {len(group.runs)} seeds"
