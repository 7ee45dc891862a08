"""A training with minutes ends its schedule with them, whatever happens to its speed."""

import itertools
import math

import pytest

from ds_deberta.horizon import Horizon
from ds_deberta.optim import OptimConfig, lr_factor, warmup_steps

OPTIM = OptimConfig(warmup=10_000, lr_end=0.1)


def run(horizon: Horizon, seconds_of_step, *, step: int = 0, used: float = 0.0, until: int = 0):
    """Steps with a talk after each; returns the learning rate of each, and where it ended."""
    factors = []
    while step < (until or horizon.total_steps):
        fitted = horizon.fitted(OPTIM)
        factors.append(lr_factor(step, config=fitted, total_steps=horizon.total_steps))
        used += seconds_of_step(step)
        step += 1
        horizon.fit(step, used)
    return factors, step, used


SPEEDS = {
    "steady": lambda _: 0.5,
    "slow at first, as compiling is": lambda step: 60.0 if step == 0 else 0.5,
    "slower and slower": lambda step: 0.5 + 0.005 * step,
    "faster": lambda step: 2.0 if step < 100 else 0.25,
    "with evaluations": lambda step: 20.0 if step % 100 == 99 else 0.3,
}


@pytest.mark.parametrize("name", SPEEDS)
def test_the_learning_rate_ends_with_the_minutes(name):
    horizon = Horizon(1_000_000, max_minutes=10)
    factors, step, used = run(horizon, SPEEDS[name])
    assert 600 <= used < 620 + 1
    assert horizon.total_steps == step
    peak = factors.index(max(factors))
    assert max(factors) > 0.9
    assert 0.1 <= factors[-1] < 0.1 + 0.05
    assert peak < step / 2
    after = factors[peak:]
    assert all(b <= a + 0.01 for a, b in itertools.pairwise(after))


def test_steps_end_it_where_they_come_first():
    horizon = Horizon(100, max_minutes=10)
    _, step, used = run(horizon, lambda _: 0.5)
    assert (step, used) == (100, 50)


def test_a_resume_counts_what_was_used_and_goes_on_with_the_same_schedule():
    first = Horizon(1_000_000, max_minutes=10)
    before, step, used = run(first, lambda _: 0.5, until=700)
    again = Horizon(1_000_000, max_minutes=10)
    again.resume(step, used)
    after, step, used = run(again, lambda _: 0.5, step=step, used=used)
    assert after[0] == pytest.approx(before[-1], abs=0.005)
    assert (step, used) == (1200, 600)
    finished = Horizon(1_000_000, max_minutes=10)
    finished.resume(step, used)
    assert finished.total_steps == step


def test_without_minutes_nothing_changes():
    horizon = Horizon(50)
    horizon.resume(20, 1e9)
    assert horizon.total_steps == 50
    assert horizon.fitted(OPTIM) is OPTIM
    assert horizon.longest_warmup == math.inf


def test_a_warmup_lasts_a_quarter_of_the_run_at_most():
    horizon = Horizon(1_000_000, max_minutes=10)
    run(horizon, lambda _: 0.5, until=100)
    assert warmup_steps(horizon.fitted(OPTIM), horizon.total_steps) == 300
    short = OptimConfig(warmup=20)
    assert warmup_steps(horizon.fitted(short), horizon.total_steps) == 20
