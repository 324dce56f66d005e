"""Quantiles against printed tables."""

import math

import pytest

from posttrain.evaluation.distributions import normal_quantile, t_probability, t_quantile


@pytest.mark.parametrize(
    ("level", "df", "expected"),
    [  # standard t tables, two-sided
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 3, 3.1824),
        (0.95, 4, 2.7764),
        (0.95, 9, 2.2622),
        (0.95, 10, 2.2281),
        (0.95, 29, 2.0452),
        (0.95, 30, 2.0423),
        (0.95, 120, 1.9799),
        (0.90, 5, 2.0150),
        (0.99, 1, 63.6567),
        (0.99, 15, 2.9467),
        (0.999, 20, 3.8495),
    ],
)
def test_t_quantile_agrees_with_tables(level: float, df: int, expected: float):
    assert t_quantile(level, df) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("level", "expected"), [(0.90, 1.644854), (0.95, 1.959964), (0.99, 2.575829)])
def test_normal_quantile_agrees_with_tables(level: float, expected: float):
    assert normal_quantile(level) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("df", [5, 6, 101, 1000])
def test_t_probability_agrees_with_integration_of_the_density(df: int):
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    steps, end = 20_000, 1.7
    density = [scale * (1 + (end * i / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = 2 * end / steps * (sum(density) - (density[0] + density[-1]) / 2)
    assert t_probability(end, df) == pytest.approx(area, abs=1e-8)


def test_t_approaches_the_normal():
    assert t_quantile(0.95, 50_000) == pytest.approx(normal_quantile(0.95), abs=1e-4)


@pytest.mark.parametrize(("level", "df"), [(0.95, 0), (0.0, 5), (1.0, 5)])
def test_no_quantile_outside_the_domain(level: float, df: int):
    with pytest.raises(ValueError, match="df >= 1"):
        t_quantile(level, df)
