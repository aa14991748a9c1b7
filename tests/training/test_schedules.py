"""Learning-rate schedules."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.training.schedules import SCHEDULES, factor

STEPS, WARMUP = 110, 10


def test_warm_up_reaches_the_peak_and_does_no_step_at_rate_zero():
    rates = [factor("cosine", step, STEPS, WARMUP) for step in range(WARMUP + 1)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 60, 1.0),
        ("constant", 109, 1.0),
        ("linear", 60, 0.5),
        ("linear", 85, 0.25),
        ("cosine", 60, 0.5),
        ("cosine", 35, 0.5 * (1 + math.sqrt(0.5))),
        ("wsd", 60, 1.0),
        ("wsd", 100, 1.0),
        ("wsd", 105, 1 - math.sqrt(0.5)),
    ],
)
def test_values(name, step, expected):
    assert factor(name, step, STEPS, WARMUP) == pytest.approx(expected)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 50),
    floor=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_stays_between_floor_and_peak_and_never_rises_after_the_warm_up(name, steps, warmup, floor):
    rates = [factor(name, step, steps, warmup, floor) for step in range(warmup, warmup + steps + 5)]
    assert all(floor - 1e-12 <= rate <= 1 + 1e-12 for rate in rates)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rates, rates[1:], strict=False))
    if name != "constant" and steps > warmup:
        assert factor(name, steps, steps, warmup, floor) == pytest.approx(floor)


def test_unknown_schedule():
    with pytest.raises(ErnieError, match="lr_scheduler_type.*'cosin'.*cosine"):
        factor("cosin", 0, 10)
