"""The schedules of rk.losses against loops over Python numbers."""

import math

import pytest

from reparam_kernels import losses

pytestmark = pytest.mark.usefixtures("says_where")


def test_linear_beta_and_capacity():
    assert [losses.linear_beta(t, 10, 4.0) for t in (0, 5, 10, 1000)] == [0.0, 2.0, 4.0, 4.0]
    assert [losses.capacity(t, 10, 25.0) for t in (0, 4, 10, 1000)] == [0.0, 10.0, 25.0, 25.0]


def test_cyclical_beta_starts_again_each_cycle():
    steps, cycles, ratio = 1000, 5, 0.4
    weights = [losses.cyclical_beta(t, steps, cycles, ratio, beta=3.0) for t in range(steps)]
    for t, w in enumerate(weights):
        assert w == pytest.approx(3 * min(1.0, (t % 200) / 80))
    assert losses.cyclical_beta(steps, steps) == losses.cyclical_beta(5 * steps, steps) == 1.0
    uneven = [losses.cyclical_beta(t, 10, 3, 1.0) for t in range(10)]
    assert [t for t in range(1, 10) if uneven[t] < uneven[t - 1]] == [4, 7]


def test_a_rise_of_length_zero_is_over():
    for step in (0, 3):
        assert losses.linear_beta(step, 0, 4.0) == losses.cyclical_beta(step, 0, beta=4.0) == 4.0
        assert losses.cyclical_beta(step, 10, ratio=0.0, beta=4.0) == losses.capacity(step, 0, 4.0) == 4.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: losses.linear_beta(1, -1), "steps must not be negative; got -1"),
        (lambda: losses.linear_beta(1, math.nan), "steps must not be negative; got nan"),
        (lambda: losses.capacity(1, -1, 2.0), "steps must not be negative; got -1"),
        (lambda: losses.cyclical_beta(1, 10, cycles=0), "cycles must be positive; got 0"),
        (lambda: losses.cyclical_beta(1, 10, ratio=-0.1), "ratio must not be negative; got -0.1"),
    ],
)
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call()
