"""Which setting stands for a method, and what is said of the differences."""

import pytest

from lora_one.harness.sweeps.tuning import best
from lora_one.reports.comparison import compare
from lora_one.reports.figures import pareto_front
from lora_one.reports.groups import diverged_runs, group_runs
from lora_one.reports.page_data import chosen_words
from lora_one.reports.records import find_runs
from lora_one.reports.table import excluded


def blocks_of(folder):
    runs = find_runs(folder)
    return compare(group_runs(runs)[0], diverged_runs(runs))


def rows_of(folder):
    (block,) = blocks_of(folder)
    return {row.arm.name: row for row in block.rows}, block


def test_the_validation_loss_chooses_and_the_test_metric_does_not(tmp_path, write_run):
    write_run(tmp_path, "a", rate=1e-3, loss=0.9, score=0.99)
    write_run(tmp_path, "b", rate=2e-3, loss=0.5, score=0.50)
    write_run(tmp_path, "c", rate=4e-3, loss=0.7, score=0.70)
    rows, block = rows_of(tmp_path)
    arm = rows["lora · adamw"].arm
    assert arm.chosen.learning_rate == 2e-3
    assert arm.chosen_by == "validation loss"
    assert arm.grid["model.learning_rate"] == [1e-3, 2e-3, 4e-3]
    assert arm.at_edge == ()
    assert block.warnings == ()


def test_without_validation_losses_the_metric_chooses_and_that_is_said(tmp_path, write_run):
    for name, rate, score in (("a", 1e-3, 0.3), ("b", 2e-3, 0.6), ("c", 3e-3, 0.4)):
        write_run(tmp_path, name, rate=rate, score=score, loss=None)
    rows, block = rows_of(tmp_path)
    assert rows["lora · adamw"].arm.chosen.learning_rate == 2e-3
    assert any("chosen by accuracy on the test rows themselves" in w for w in block.warnings)


def test_a_rate_at_the_edge_of_its_grid_is_warned_of(tmp_path, write_run):
    write_run(tmp_path, "a", rate=1e-3, loss=0.9)
    write_run(tmp_path, "b", rate=2e-3, loss=0.5)
    _, block = rows_of(tmp_path)
    assert block.warnings == (
        "chosen at the edge of the grid that was tried, so that a better one may lie outside: "
        "lora · adamw (learning_rate 0.002)",
    )


def test_unequal_tuning_budgets_are_warned_of(tmp_path, write_run):
    for index, rate in enumerate((1e-3, 2e-3, 4e-3)):
        write_run(tmp_path, f"a{index}", rate=rate, loss=abs(rate - 2e-3))
    write_run(tmp_path, "b", method="pissa")
    _, block = rows_of(tmp_path)
    assert any(warning.startswith("unequal tuning budgets") for warning in block.warnings)


def test_gamma_and_damping_are_tuned_and_rank_makes_another_arm(tmp_path, write_run):
    write_run(tmp_path, "a", method="lora_one", settings={"init.stable_gamma": 16.0}, loss=0.4)
    write_run(tmp_path, "b", method="lora_one", settings={"init.stable_gamma": 64.0}, loss=0.3)
    write_run(tmp_path, "c", method="lora_one", settings={"peft.lora_r": 4}, loss=0.5)
    rows, _ = rows_of(tmp_path)
    assert {name: len(row.arm.groups) for name, row in rows.items()} == {
        "lora_one · adamw · lora_r=8": 2,
        "lora_one · adamw · lora_r=4": 1,
    }
    chosen = rows["lora_one · adamw · lora_r=8"].arm.chosen
    assert chosen.settings["init.stable_gamma"] == 64.0


@pytest.mark.parametrize("best", [16.0, 64.0, "auto"])
def test_a_gamma_that_was_searched_for_is_a_point_of_the_grid(tmp_path, write_run, best):
    for gamma in (16.0, 64.0, "auto"):
        loss = 0.1 if gamma == best else 0.5
        settings = {"init.stable_gamma": gamma}
        write_run(tmp_path, str(gamma), method="lora_one", settings=settings, loss=loss)
    rows, _ = rows_of(tmp_path)
    arm = rows["lora_one · adamw"].arm
    assert arm.grid["init.stable_gamma"] == [16.0, 64.0, "auto"]
    assert arm.at_edge == (() if best == "auto" else ("init.stable_gamma",))
    assert chosen_words(arm) == "lr 0.001, gamma " + (best if best == "auto" else f"{best:g}")


def test_differences_are_paired_over_seeds_and_put_into_words(tmp_path, write_run):
    for seed in range(6):
        base = 0.1 * seed
        jitter = 0.001 * (seed % 2)
        write_run(tmp_path, f"a{seed}", method="lora_one", seed=seed, score=base + 0.2)
        write_run(tmp_path, f"b{seed}", method="lora", seed=seed, score=base + 0.1 + jitter)
        noise = 0.2 + (0.05 if seed % 2 else -0.06)
        write_run(tmp_path, f"c{seed}", method="pissa", seed=seed, score=base + noise)
    rows, block = rows_of(tmp_path)
    assert [row.verdict for row in block.rows] == ["best", "cannot be told from noise", "worse"]
    lora = rows["lora · adamw"]
    # Paired differences are -0.1 and -0.099 in turn, although the scores themselves spread by 0.19.
    assert lora.difference.mean == pytest.approx(-0.0995)
    assert lora.difference.interval[1] < -0.098
    assert rows["pissa · adamw"].is_tie


def test_a_loss_is_better_when_it_is_lower(tmp_path, write_run):
    for name, method, loss in (("a", "lora", 2.0), ("b", "pissa", 1.0)):
        record = {"primary_metric": "validation_loss", "metrics": {"validation_loss": loss, "n": 9}}
        write_run(tmp_path, name, method=method, record=record, loss=loss)
    _, block = rows_of(tmp_path)
    assert not block.higher_is_better
    assert [row.arm.chosen.method for row in block.rows] == ["pissa", "lora"]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"dataset.name": "gsm8k"}},
        {"settings": {"model.name": "other"}},
        {"record": {"data": {"test_row_ids_sha256": "other"}}},
        {"record": {"primary_metric": "pass@1", "metrics": {"pass@1": 0.1, "n": 9}}},
    ],
    ids=["dataset", "model", "test rows", "metric"],
)
def test_what_was_tested_otherwise_is_not_compared(tmp_path, write_run, change):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", method="pissa", **change)
    assert [len(block.rows) for block in blocks_of(tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    ("change", "endings"),
    [
        ({"settings": {"dataset.test_rows": 5}}, ["test_rows None", "test_rows 5"]),
        (
            {"settings": {"model.name": "b/tiny_llama"}},
            ["name data/tiny_llama", "name b/tiny_llama"],
        ),
        ({"settings": {"dataset.path": "b"}}, ["path None", "path b"]),
        ({"record": {"data": {"test_row_ids_sha256": 64 * "f"}}}, ["rows None", "rows ffffffff"]),
    ],
    ids=["number of test rows", "folder of the model", "path of the data", "test rows"],
)
def test_blocks_that_would_share_a_title_and_files_say_what_differs(
    tmp_path, write_run, change, endings
):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", **change)
    titles = [block.title for block in blocks_of(tmp_path)]
    assert [title.endswith(end) for title, end in zip(titles, endings, strict=True)] == [True] * 2


def test_a_copy_of_a_run_is_no_second_seed(tmp_path, write_run):
    for name, seed, score in (("a", 0, 0.1), ("b", 1, 0.3), ("b_copy", 1, 0.3)):
        write_run(tmp_path, name, seed=seed, score=score)
    (group,), repeats = group_runs(find_runs(tmp_path))
    assert group.values("accuracy") == [0.1, 0.3]
    assert excluded(find_runs(tmp_path), repeats) == ["settings and seeds of b once more: b_copy"]


def test_the_same_replies_of_untrained_runs_count_once(tmp_path, write_run):
    untrained = {"settings": {"train": "none"}, "record": {"evaluation": {"replies_sha256": "f"}}}
    for seed in (0, 1):
        write_run(tmp_path, f"a{seed}", seed=seed, **untrained)
    write_run(tmp_path, "other", seed=2, loss=0.9, **untrained)
    (group,), repeats = group_runs(find_runs(tmp_path))
    assert [run.folder.name for run in group.runs] == ["a0", "other"]
    assert excluded(find_runs(tmp_path), repeats) == ["the replies of a0 once more: a1"]


def test_one_path_to_two_adapters_makes_two_rows(tmp_path, write_run):
    for name in ("a", "b"):
        write_run(tmp_path, name, record={"adapter": {"path": "adapter", "sha256": name}})
    assert [len(group.runs) for group in group_runs(find_runs(tmp_path))[0]] == [1, 1]


def test_the_cost_of_an_arm_includes_its_tuning(tmp_path, write_run):
    write_run(tmp_path, "a", rate=1e-3, seconds=10.0, loss=0.5)
    write_run(tmp_path, "b", rate=2e-3, seconds=20.0, loss=0.9)
    rows, _ = rows_of(tmp_path)
    # Two starts of 2 s each (write_run) and both trainings.
    assert rows["lora · adamw"].arm.seconds == 34.0


def test_the_pareto_front_holds_what_nothing_beats_in_both():
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (2.0, 0.6), (4.0, 0.7), (5.0, 0.9)]
    assert pareto_front(points, higher_is_better=True) == [(1.0, 0.5), (2.0, 0.7), (5.0, 0.9)]
    assert pareto_front(points, higher_is_better=False) == [(1.0, 0.5)]


def test_a_metric_that_is_missing_is_not_judged(tmp_path, write_run):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", method="pissa", record={"metrics": {"n": 3}})
    rows, _ = rows_of(tmp_path)
    assert rows["pissa · adamw"].verdict == "not judged: accuracy is missing"


def trial(write_run, folder, name, **facts):
    """A run that asked no test row."""
    settings = {"evaluation.metric": "validation_loss"} | facts.pop("settings", {})
    record = {"primary_metric": "validation_loss", "metrics": {"n": 50}}
    write_run(folder, name, settings=settings, record=record, **facts)


def test_trials_choose_and_final_runs_on_other_seeds_are_judged(tmp_path, write_run):
    for index, (rate, loss) in enumerate(((1e-3, 0.9), (2e-3, 0.5), (4e-3, 0.7))):
        trial(write_run, tmp_path, f"t{index}", rate=rate, loss=loss, seconds=10.0)
        trial(write_run, tmp_path, f"p{index}", method="pissa", rate=rate, loss=loss, seconds=10.0)
    for seed, score in ((1, 0.50), (2, 0.52), (3, 0.54)):
        final = {"settings": {"evaluation.metric": "task"}, "seed": seed, "rate": 2e-3}
        write_run(tmp_path, f"f{seed}", score=score, loss=0.6, seconds=10.0, **final)
        write_run(tmp_path, f"g{seed}", method="pissa", score=score + 0.1, seconds=10.0, **final)
    rows, block = rows_of(tmp_path)
    assert block.metric == "accuracy" and block.warnings == ()
    arm = rows["lora · adamw"].arm
    assert [group.learning_rate for group in arm.tried] == [1e-3, 2e-3, 4e-3]
    assert arm.chosen.values("accuracy") == [0.50, 0.52, 0.54]
    assert arm.grid["model.learning_rate"] == [1e-3, 2e-3, 4e-3] and arm.at_edge == ()
    assert arm.chosen_by == "validation loss"
    assert arm.seconds == 6 * (10.0 + 2.0)  # tuning included
    assert rows["lora · adamw"].difference.n == 3
    assert rows["lora · adamw"].difference.mean == pytest.approx(-0.1)
    assert rows["lora · adamw"].verdict == "worse"


DIVERGED = {"type": "NonFiniteError", "message": "step 3: loss nan"}


def test_a_setting_that_diverged_was_tried_and_has_lost(tmp_path, write_run):
    for rate, loss in ((1e-3, 0.9), (2e-3, 0.5), (4e-3, 0.7)):
        trial(write_run, tmp_path, f"a{rate}", rate=rate, loss=loss)
    for rate, loss in ((1e-3, 0.9), (2e-3, 0.5)):
        trial(write_run, tmp_path, f"b{rate}", method="pissa", rate=rate, loss=loss)
    assert len(blocks_of(tmp_path)[0].warnings) == 2  # unequal budgets, a rate at the edge
    lost = {"method": "pissa", "rate": 4e-3, "status": "failed", "record": {"error": DIVERGED}}
    write_run(tmp_path, "b_lost", settings={"evaluation.metric": "validation_loss"}, **lost)
    rows, block = rows_of(tmp_path)
    assert block.warnings == ()
    assert rows["pissa · adamw"].arm.budget == 3
    assert rows["pissa · adamw"].arm.grid["model.learning_rate"] == [1e-3, 2e-3, 4e-3]


def test_a_mean_without_the_seeds_that_diverged_is_warned_of(tmp_path, write_run):
    for seed in (0, 1):
        write_run(tmp_path, f"a{seed}", seed=seed)
    write_run(tmp_path, "a2", seed=2, status="failed", record={"error": DIVERGED})
    _, block = rows_of(tmp_path)
    assert block.warnings == (
        "runs at the chosen setting that diverged and are in no mean: lora · adamw: 1",
    )


def test_runs_of_several_machines_or_versions_are_warned_of(tmp_path, write_run):
    for name, method, processor in (("a", "lora", "Xeon"), ("b", "pissa", "EPYC")):
        made = {"hardware": {"processor": processor}, "versions": {"torch": "2.13.0"}, "git": None}
        write_run(tmp_path, name, method=method, record={"provenance": made})
    _, block = rows_of(tmp_path)
    assert block.warnings == (
        "the runs differ in more than their settings: processor (2). Seconds and memory do not "
        "compare, and other rounding moves a metric",
    )


def test_means_over_other_seeds_than_the_difference_are_warned_of(tmp_path, write_run):
    for seed, score in ((0, 0.9), (1, 0.5), (2, 0.4)):
        write_run(tmp_path, f"a{seed}", seed=seed, score=score)
    write_run(tmp_path, "b0", method="pissa", seed=0, score=0.65)
    rows, block = rows_of(tmp_path)
    # The best mean is worse with the only seed that both have.
    assert rows["pissa · adamw"].is_best
    assert rows["lora · adamw"].difference.mean == pytest.approx(0.25)
    assert block.warnings == (
        "means over different seeds (lora · adamw: 3, pissa · adamw: 1), which a difference is "
        "not: it is taken over the seeds that both have",
    )


def test_several_replies_to_a_row_are_one_test_row(tmp_path, write_run):
    write_run(tmp_path, "a", settings={"evaluation.samples": 4})  # n = 100 replies (write_run)
    write_run(tmp_path, "b", settings={"evaluation.samples": 1}, record={"metrics": {"n": 25}})
    groups, _ = group_runs(find_runs(tmp_path))
    assert [group.test_rows for group in groups] == [25, 25]


def test_a_loss_over_fewer_rows_is_warned_of(tmp_path, write_run):
    for name, length, rows in (("a", 256, 90), ("b", 512, 100)):
        record = {"primary_metric": "test_loss", "metrics": {"test_loss": 0.5, "n": rows}}
        write_run(tmp_path, name, settings={"model.max_length": length}, record=record)
    _, block = rows_of(tmp_path)
    assert block.warnings == (
        "test_loss was not taken over the same test rows: lora · adamw · max_length=256: 90, "
        "lora · adamw · max_length=512: 100",
    )


def test_of_equal_losses_the_report_and_the_search_choose_the_same(tmp_path, write_run):
    # By name the larger rate comes first.
    rates = {"lr0.0001": 1e-4, "lr5e-05": 5e-5}
    for name, rate in rates.items():
        trial(write_run, tmp_path, name, rate=rate, loss=0.5)
    (rate,) = best({(rate,): 0.5 for rate in rates.values()})
    write_run(tmp_path, "f", rate=rate, seed=1, settings={"evaluation.metric": "task"})
    rows, _ = rows_of(tmp_path)
    assert rows["lora · adamw"].arm.chosen.values("accuracy") == [0.5]


def test_an_arm_whose_final_runs_are_missing_is_not_judged(tmp_path, write_run):
    trial(write_run, tmp_path, "t0", rate=1e-3, loss=0.9)
    trial(write_run, tmp_path, "t1", rate=2e-3, loss=0.5)
    write_run(tmp_path, "f", method="pissa", settings={"evaluation.metric": "task"})
    rows, _ = rows_of(tmp_path)
    assert rows["lora · adamw"].verdict == "not judged: accuracy is missing"


def test_trials_alone_are_compared_by_their_validation_loss(tmp_path, write_run):
    trial(write_run, tmp_path, "t0", rate=1e-3, loss=0.9)
    trial(write_run, tmp_path, "t1", method="pissa", rate=2e-3, loss=0.5)
    rows, block = rows_of(tmp_path)
    assert block.metric == "validation_loss" and not block.higher_is_better
    assert set(rows) == {"lora · adamw", "pissa · adamw"}


def test_an_arm_says_only_what_tells_it_from_others(tmp_path, write_run):
    for name, method, rslora in (
        ("a", "lora", False),
        ("b", "lora", True),
        ("c", "pissa", True),
        ("d", "lora_one", True),
    ):
        write_run(tmp_path, name, method=method, settings={"peft.use_rslora": rslora})
    rows, _ = rows_of(tmp_path)
    assert set(rows) == {
        "lora · adamw · use_rslora=False",
        "lora · adamw · use_rslora=True",
        "pissa · adamw",
        "lora_one · adamw",
    }


def test_a_setting_that_most_do_not_share_is_said_by_all(tmp_path, write_run):
    write_run(tmp_path, "a", method="lora", settings={"peft.lora_r": 16})
    write_run(tmp_path, "b", method="pissa", settings={"peft.lora_r": 8})
    rows, _ = rows_of(tmp_path)
    assert set(rows) == {"lora · adamw · lora_r=16", "pissa · adamw · lora_r=8"}
