"""What a private sum costs, against plain second computations: exact fractions, every company, composed losses."""

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest

from ternbus.edge.learn.accountant import epsilon, theta
from ternbus.edge.learn.sum_divergence import ORDERS, rates
from ternbus.edge.plan.privacy import SumCost

HALF = Fraction(1, 2)


def sums(shares: Iterable[Fraction]) -> list[Fraction]:
    """The probability of each number of successes among independent draws with these probabilities."""
    found = [Fraction(1)]
    for share in shares:
        longer = [Fraction(0)] * (len(found) + 1)
        for place, probability in enumerate(found):
            longer[place] += (1 - share) * probability
            longer[place + 1] += share * probability
        found = longer
    return found


def divergence(one: list[Fraction], other: list[Fraction], order: int) -> float:
    """Rényi's, at a whole order, in exact numbers but for the logarithm."""
    power = sum(p**order / q ** (order - 1) for p, q in zip(one, other, strict=True))
    return (math.log(power.numerator) - math.log(power.denominator)) / (order - 1)


def exact_rate(levels: int, at: Fraction, y: Fraction, company: tuple[Fraction, ...], order: int) -> float:
    """The larger D/y² of both directions, where the other devices' values are ``company``."""
    others = [HALF + at * each for each in company for _ in range(2 * levels)]
    changed = sums([HALF + at * y] * (2 * levels) + others)
    unchanged = sums([HALF] * (2 * levels) + others)
    return max(divergence(changed, unchanged, order), divergence(unchanged, changed, order)) / float(y) ** 2


@pytest.mark.parametrize(("levels", "at", "honest"), [(1, "1/4", 1), (1, "1/5", 2), (1, "1/20", 3), (2, "1/10", 2)])
def test_no_value_and_no_company_costs_more_than_the_bound(levels: int, at: str, honest: int) -> None:
    """Also company that is neither all high nor all low; and the bound is no more than some percent too high."""
    orders = (2, 3, 6, 17)
    values = [Fraction(each, 2) for each in range(-2, 3)]
    bound = rates(levels, float(Fraction(at)), honest, tuple(map(float, orders)))
    for order, rate in zip(orders, bound, strict=True):
        worst = max(
            exact_rate(levels, Fraction(at), y, company, order)
            for y in (Fraction(each, 16) for each in (1, 3, 7, 12, 15, 16, -5, -16))
            for company in combinations_with_replacement(values, honest - 1)
        )
        assert worst <= rate < (1.02 if order <= 6 else 1.1) * worst


def test_company_at_its_extremes_is_worst() -> None:
    """The bound tries only these, by quasi-convexity; here every mixture of eleven values is tried."""
    values = [Fraction(each, 5) for each in range(-5, 6)]
    companies = list(combinations_with_replacement(values, 2))
    worst = max(companies, key=lambda company: exact_rate(1, Fraction(1, 5), Fraction(1), company, 4))
    assert set(worst) <= {-1, 1}


def plain_rates(levels: int, at: float, honest: int, order: float) -> list[float]:
    """D(y)/y² in floating point by plain loops, at 40 values of y, for the worst company of all high or all low."""
    found = []
    for y in np.linspace(0.025, 1, 40):
        for side in (-1, 1):
            others = [0.5 + side * at] * (2 * levels * (honest - 1))
            pair = []
            for share in (0.5 + at * float(y), 0.5):
                law = np.ones(1)
                for each in [*[share] * (2 * levels), *others]:
                    law = np.append(law * (1 - each), 0) + np.append(0, law * each)
                pair.append(np.log(law))
            for one, other in (pair, pair[::-1]):
                terms = order * one + (1 - order) * other
                power = terms.max() + math.log(math.fsum(np.exp(terms - terms.max())))
                found.append(power / (order - 1) / float(y) ** 2)
    return found


@pytest.mark.parametrize(("levels", "at", "honest"), [(1, 0.05, 10), (1, 0.25, 8), (3, 0.1, 5), (1, 0.1, 50)])
def test_the_bound_is_met_closely_at_every_order_that_matters(levels: int, at: float, honest: int) -> None:
    for order, rate in list(zip(ORDERS, rates(levels, at, honest), strict=True))[::4]:
        worst = max(plain_rates(levels, at, honest, order))
        assert worst <= rate
        assert order > 12 or rate < 1.03 * worst


def test_the_bound_is_not_the_value_at_the_largest_change() -> None:
    """D(y)/y² is not monotone: with few devices and a large order, a small change costs more for its size."""
    found = plain_rates(1, 0.25, 2, 16)
    assert max(found) > 1.1 * max(found[-4:])
    assert rates(1, 0.25, 2, (16.0,))[0] >= max(found)


def test_many_devices_and_small_draws_cost_what_a_gaussian_does() -> None:
    """About r·4kθ²B²/h, that of a Gaussian with z = √(h/8k)/(θB)."""
    for order, rate in zip(ORDERS, rates(1, 0.01, 60), strict=True):
        if order < 20:
            assert rate == pytest.approx(order * 4 * 0.01**2 / 60, rel=0.02)


def test_a_smaller_theta_costs_less_by_its_square_at_least() -> None:
    """Also below the θ under which the bound is scaled, where probabilities differ too little to be computed."""
    thetas = (1e-6, 5e-4, 0.002, 0.05, 0.2)
    found = [np.array(rates(2, each, 4)) / each**2 for each in thetas]
    for less, more in pairwise(found):
        assert (less[:20] <= more[:20] * 1.001).all()


def delta_of(levels: int, at: float, honest: int, elements: int, eps: float) -> float:
    """The exact δ at ε of so many elements of y = 1 in the worst company, by the convolution of privacy losses.

    Koskela et al. 2020, with each loss rounded to the nearest of a grid.
    """
    others = [0.5 - at] * (2 * levels * (honest - 1))
    laws = []
    for share in (0.5 + at, 0.5):
        law = np.ones(1)
        for each in [*[share] * (2 * levels), *others]:
            law = np.append(law * (1 - each), 0) + np.append(0, law * each)
        laws.append(law)
    width, size = 2e-4, 2**20
    deltas = []
    for one, other in (laws, laws[::-1]):
        places = np.round(np.log(one / other) / width).astype(np.int64) % size
        many = np.fft.ifft(np.fft.fft(np.bincount(places, one, size)) ** elements).real
        losses = np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size) * width
        deltas.append(float((many * -np.expm1(np.minimum(0.0, eps - losses))).sum()))
    return max(deltas)


@pytest.mark.parametrize(("levels", "at", "honest", "steps"), [(1, 0.1, 10, 20), (1, 0.05, 3, 30), (2, 0.15, 12, 5)])
def test_epsilon_holds_for_the_exact_composition_of_all_elements_and_updates(
    levels: int, at: float, honest: int, steps: int
) -> None:
    """A change of B² elements of y = 1 in every update: what is charged suffices, and a quarter less would not."""
    squared_norm = 4
    charged = SumCost(levels=levels, theta=at, norm=squared_norm**0.5, honest=honest, steps=steps)
    found = epsilon([charged], 1e-5)
    assert delta_of(levels, at, honest, squared_norm * steps, found) <= 1e-5
    assert delta_of(levels, at, honest, squared_norm * steps, 0.75 * found) > 1e-5


@pytest.mark.parametrize(("honest", "norm", "budget"), [(10, 4.0, 8.0), (2, 1.0, 1.0), (63, 20.0, 0.5)])
def test_the_largest_theta_is_affordable_and_the_next_is_not(honest: int, norm: float, budget: float) -> None:
    planned = SumCost(levels=1, theta=0.0, norm=norm, honest=honest, steps=20)
    found = theta(planned, budget, 1e-5)

    def spent(at: float) -> float:
        return epsilon([SumCost(levels=1, theta=at, norm=norm, honest=honest, steps=20)], 1e-5)

    assert spent(found) <= budget < spent(found * 1.011)
    assert float(f"{found:.3g}") == found
