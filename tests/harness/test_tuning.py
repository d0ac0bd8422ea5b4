"""The search for a method's settings: the same number of trials whatever it finds."""

import itertools
import math
import random

import pytest

from lora_one.harness.sweeps.tuning import best, search

RATES = [1e-3, 3e-3, 9e-3]
GAMMAS = [16.0, 64.0, 256.0]
DAMPINGS = [1e-6, 1e-3]


def run(loss, axes, start, trials):
    """Search to the end; return everything that was tried, and the batches."""
    one = search(axes, start, trials)
    batch, tried, batches = next(one), {}, []
    while True:
        batches.append(batch)
        results = {setting: loss(setting) for setting in batch}
        tried |= results
        try:
            batch = one.send(results)
        except StopIteration:
            return tried, batches


@pytest.mark.parametrize("trials", [3, 4, 8, 13, 50])
@pytest.mark.parametrize("axes", [[RATES], [RATES, GAMMAS], [RATES, GAMMAS, DAMPINGS]])
def test_every_search_makes_exactly_its_trials_each_once(axes, trials):
    start = (1e-3, 128.0, 1e-6)[: len(axes)]
    for seed in range(20):
        draw = random.Random(seed)
        diverges = draw.random() < 0.3
        memory = {}

        def loss(setting, draw=draw, memory=memory, diverges=diverges):
            value = math.inf if diverges and draw.random() < 0.7 else draw.random()
            return memory.setdefault(setting, value)

        tried, batches = run(loss, axes, start, trials)
        assert len(tried) == trials == sum(map(len, batches))


def test_all_diverged_goes_to_lower_rates():
    tried, _ = run(lambda _: math.inf, [RATES], (1e-3,), 6)
    assert min(tried)[0] < 1e-4


@pytest.mark.parametrize("optimum", [1e-5, 2e-4, 2.2e-3, 5e-3, 4e-2, 0.7])
def test_a_valley_is_found_also_outside_of_the_grid(optimum):
    tried, _ = run(lambda s: math.log(s[0] / optimum) ** 2, [RATES], (1e-3,), 12)
    assert best(tried)[0] == pytest.approx(optimum, rel=0.35)


def test_the_best_rate_has_a_worse_neighbour_on_both_sides_where_the_trials_allow():
    tried, _ = run(lambda s: math.log(s[0] / 0.2) ** 2, [RATES], (1e-3,), 8)
    rates = sorted(setting[0] for setting in tried)
    assert rates[0] < best(tried)[0] < rates[-1]


def test_further_settings_are_tried_in_turn_at_the_best_of_those_before():
    def loss(setting):
        rate, gamma, damping = setting
        return (
            math.log(rate / 3e-3) ** 2 + math.log(gamma / 64) ** 2 + math.log(damping / 1e-3) ** 2
        )

    tried, batches = run(loss, [RATES, GAMMAS, DAMPINGS], (1e-3, 128.0, 1e-6), 9)
    assert batches[0] == [(rate, 128.0, 1e-6) for rate in RATES]
    assert batches[1] == [(3e-3, gamma, 1e-6) for gamma in GAMMAS]
    assert batches[2] == [(3e-3, 64.0, 1e-3)]
    assert {setting[1:] for batch in batches[3:] for setting in batch} == {(64.0, 1e-3)}
    assert best(tried) == (3e-3, 64.0, 1e-3)


def test_what_a_method_lacks_in_settings_it_gets_in_rates():
    tried, _ = run(lambda s: math.log(s[0] / 4e-3) ** 2, [RATES], (1e-3,), 8)
    others, _ = run(lambda s: math.log(s[0] / 4e-3) ** 2 + s[1], [RATES, GAMMAS], (1e-3, 128.0), 8)
    rates = [{setting[0] for setting in one} for one in (tried, others)]
    assert len(rates[0]) == 8 > len(rates[1]) and len(tried) == len(others)


def test_the_same_losses_give_the_same_search():
    def loss(setting):
        return hash(setting) % 1000

    first, second = (run(loss, [RATES, GAMMAS], (1e-3, 128.0), 10)[1] for _ in range(2))
    assert first == second


def test_refined_rates_are_written_with_three_digits_while_they_differ():
    _, batches = run(lambda s: math.log(s[0] / 4e-3) ** 2, [RATES], (1e-3,), 8)
    for rate, *_ in itertools.chain.from_iterable(batches):
        assert rate == float(f"{rate:.3g}")
