"""Curves keep what matters of what was logged, and say what they left out."""

import json
import math

import numpy as np
import pytest

from lora_one.reports.details import LEVELS, Detail, sample_replies
from lora_one.reports.traces import Points, curve, median_over_layers, read_trace


def points(x, y):
    return Points(np.asarray(x, dtype=float), np.asarray(y, dtype=float))


def test_few_points_are_kept_exactly():
    drawn = curve([points([1, 2, 5], [3.0, 1.0, 2.0])], 10)
    assert (drawn.x, drawn.y) == ([1, 2, 5], [3.0, 1.0, 2.0])
    assert drawn.low == drawn.high == drawn.y
    assert drawn.is_exact


def test_seeds_are_averaged_where_they_were_logged():
    drawn = curve([points([1, 2], [1.0, 4.0]), points([1, 2], [3.0, 2.0])], 10)
    assert drawn.y == [2.0, 3.0]
    assert (drawn.low, drawn.high) == ([1.0, 2.0], [3.0, 4.0])
    assert drawn.points == 4


def test_a_spike_survives_in_fifty_thousand_steps():
    steps = np.arange(50_000)
    loss = np.full(50_000, 0.5)
    loss[31_234], loss[7] = 99.0, -1.0
    drawn = curve([points(steps, loss)], 200)
    assert len(drawn.x) == 200
    assert max(drawn.high) == 99.0
    assert min(drawn.low) == -1.0
    # 250 steps in each of 200 buckets of equal width: the mean of means is the mean of all.
    assert np.mean(drawn.y) == pytest.approx(loss.mean())
    assert drawn.points == 50_000
    assert not drawn.is_exact


def test_nothing_logged_is_an_empty_curve():
    assert curve([], 10).x == curve([points([], [])], 10).x == []


def test_a_log_is_read_by_kind(tmp_path):
    lines = [
        {"step": 0, "base_validation_loss": 9.0},
        {"step": 0, "epoch": 0.0, "validation_loss": 3.0},
        {"step": 1, "loss": 2.0, "epoch": 0.5, "learning_rate": 0.1},
        {"step": 2, "loss": 1.0, "epoch": 1.0, "principal_angle_B/layer.0": 30.0},
        {"step": 2, "epoch": 1.0, "validation_loss": 1.5},
        {"step": 2, "accuracy": 0.25, "n": 8},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trace = read_trace(tmp_path, "accuracy")
    assert (trace.loss.x.tolist(), trace.loss.y.tolist()) == ([1, 2], [2.0, 1.0])
    assert (trace.validation.x.tolist(), trace.validation.y.tolist()) == ([0, 1], [3.0, 1.5])
    assert (trace.metric.x.tolist(), trace.metric.y.tolist()) == ([1.0], [0.25])
    assert trace.angles["B"]["layer.0"].y.tolist() == [30.0]
    assert (trace.lines, trace.skipped) == (6, 0)


def test_what_was_logged_per_layer_is_read_and_what_is_undefined_left_out(tmp_path):
    lines = [
        {"step": 0, "principal_angle_B/q": None, "update_singular_values/q": [0.0, 0.0]},
        {"step": 1, "principal_angle_B/q": 20.0, "update_singular_values/q": [2.0, 1.0]},
        {"step": 1, "update_norm/q": math.hypot(2, 1), "update_singular_values/v": [3.0, None]},
        {"step": 1, "principal_angle_A/q": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trace = read_trace(tmp_path, "accuracy")
    assert (trace.angles["B"]["q"].x.tolist(), list(trace.angles)) == ([1], ["B"])
    assert trace.update_norms["q"].y.tolist() == [math.hypot(2, 1)]
    assert trace.update_spectra == {"q": [2.0, 1.0]}  # the last that is one


def test_torn_lines_and_losses_that_are_no_numbers_are_counted(tmp_path):
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n[3]\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    trace = read_trace(tmp_path, "accuracy")
    assert trace.loss.y.tolist() == [2.0]
    assert (trace.lines, trace.skipped, trace.not_finite) == (2, 2, 1)


def test_layers_are_joined_step_by_step():
    layers = {
        "a": points([10, 20], [1.0, 4.0]),
        "b": points([20, 10], [6.0, 3.0]),
        "c": points([10], [8.0]),
    }
    steps, middle, low, high = median_over_layers(layers)
    assert steps.tolist() == [10, 20]
    assert middle.tolist() == [3.0, 5.0]
    assert low.tolist() == [1.0, 4.0]
    assert high.tolist() == [8.0, 6.0]


@pytest.mark.parametrize("metric", ["accuracy", "validation_loss", ""])
def test_both_ways_of_reading_a_log_agree(tmp_path, metric):
    lines = [{"step": 0, "epoch": 0.0, "validation_loss": 3}]
    lines += [
        {"step": s, "loss": 1 / s, "epoch": s / 9, "note": "x", "more": {}} for s in range(1, 9)
    ]
    lines += [{"step": 9, "accuracy": 1}, {"epoch": 2.0, "loss": 1.0}, {"step": 10, "loss": None}]
    text = "\n".join(map(json.dumps, lines)) + "\n"
    for name, more in (("fast", ""), ("slow", "torn")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text + more)
    fast, slow = (read_trace(tmp_path / name, metric) for name in ("fast", "slow"))
    for kind in ("loss", "validation", "metric"):
        one, other = getattr(fast, kind), getattr(slow, kind)
        assert one.x.tolist() == other.x.tolist()
        assert one.y.tolist() == other.y.tolist()
    assert (fast.lines, fast.skipped, fast.not_finite) == (12, 0, 0)
    assert (slow.lines, slow.skipped, slow.not_finite) == (12, 1, 0)
    assert len(fast.metric) == (metric == "accuracy")


def test_a_missing_log_is_empty(tmp_path):
    assert len(read_trace(tmp_path, "accuracy").loss) == 0


def row(index, *, right):
    verdict = {"parsed": str(index), "correct": right}
    return {"row_id": index, "reply": "r", "prompt": "p", "scores": {"strict": verdict}}


def test_sample_replies_are_as_many_right_as_wrong(tmp_path):
    rows = [row(index, right=index % 5 == 0) for index in range(60)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    detail = Detail(buckets=10, replies=6, characters=100, layers=1)
    sample = sample_replies(tmp_path, detail)
    assert [reply["right"] for reply in sample["rows"]].count(True) == 3
    assert [reply["id"] for reply in sample["rows"]] == ["0", "1", "2", "3", "5", "10"]


def test_where_all_are_wrong_all_samples_are(tmp_path):
    rows = [row(index, right=False) for index in range(9)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n")
    sample = sample_replies(tmp_path, LEVELS[1])
    assert len(sample["rows"]) == 9
    assert (sample["of"], sample["skipped"]) == (10, 1)


def test_long_replies_are_cut_and_that_is_said(tmp_path):
    long = row(0, right=True) | {"reply": "x" * 5000}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(long))
    (reply,) = sample_replies(tmp_path, LEVELS[0])["rows"]
    assert reply["reply"].endswith("x … (1,000 characters more)")
