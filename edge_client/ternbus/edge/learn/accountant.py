"""Privacy accounting with Google's dp-accounting: the epsilon of a cost, and the noise for a budget.

dp-accounting needs no torch, unlike Opacus' accountants: a device with device-level privacy may have no torch.
Gaussian mechanisms without sampling have an exact epsilon. For the others two upper bounds are computed, Rényi DP and
privacy loss distributions (PLD), and the smaller one counts: PLD is 8 to 15 % smaller for the plans of a device, but
slow for a large epsilon, and not accurate for a tiny delta. Updates in sums have a bound by Rényi DP alone
(`sum_divergence.py`). An account holds mechanisms instead of an epsilon, so one that began with another computation
stays valid. The library is loaded at the first use.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.plan_keys import THETA_MAX
from ternbus.edge.learn.sum_divergence import ORDERS, rates
from ternbus.edge.plan.privacy import Charge, Cost, SumCost

DIGITS: Final = 3  # decimals of a computed noise multiplier
NOISE_MAX: Final = 1e6  # the largest noise multiplier that a plan may have
NOISE_MIN: Final = 1e-3  # with less, a single step costs more than any budget that a plan may have
EPSILON_MAX: Final = 1e6  # the largest budget that a plan may have
THETA_DIGITS: Final = 3  # significant digits of a computed θ
THETA_MIN: Final = 1e-6

PLD_INTERVAL: Final = 1e-4  # of the privacy loss, as a share of epsilon; its rounding is pessimistic
PLD_INTERVALS: Final = (1e-5, 1e-3)  # the least and the largest
PLD_POINTS: Final = 2e5  # of one step's losses
PLD_EPSILON_MAX: Final = 100.0
PLD_DELTA_MIN: Final = 1e-10  # below it the rounding errors of the convolutions would matter
PLD_NOISE_MIN: Final = 0.3
PLD_STEPS_MAX: Final = 10**6


def epsilon(spent: Iterable[Charge], delta: float) -> float:
    """The epsilon, at this delta, of all costs together; 0 for none, infinite beyond every budget.

    Infinite, too, for updates in sums together with sampled Gaussians, which protect something else.

    Exact for Gaussian mechanisms alone: Balle & Wang 2018, theorem 8; T of them with noise z are one with z / sqrt(T).
    Otherwise the smaller of two bounds. RDP of the Poisson-sampled Gaussian: Mironov, Talwar & Zhang 2019, section 3.3,
    and from RDP to (epsilon, delta) Canonne, Kamath & Steinke 2020, proposition 12. PLD: Koskela et al. 2020, with the
    pessimistic discretization of Doroshenko et al. 2022. Two data sets are neighbours if one is the other without one
    protected unit: a device's update, or a sample. Raises `ConfigError` if the library is missing.
    """
    return _epsilon(tuple(spent), delta)


@lru_cache(maxsize=256)  # devices of a simulation have equal costs
def _epsilon(charged: tuple[Charge, ...], delta: float) -> float:
    library = _library()
    sums = [cost for cost in charged if isinstance(cost, SumCost)]
    spent = [cost for cost in charged if isinstance(cost, Cost)]
    if not charged:
        return 0.0
    if any(cost.noise < NOISE_MIN for cost in spent):
        return math.inf
    if sums:
        return math.inf if any(cost.rate < 1 for cost in spent) else _of_sums(library, sums, spent, delta)
    if all(cost.rate == 1 for cost in spent):
        return _gaussian(library, spent, delta)
    bound = _composed(library.rdp.RdpAccountant(), spent, delta)
    if not bound <= PLD_EPSILON_MAX or not _suits_pld(spent, delta):
        return bound
    interval = max(PLD_INTERVAL * bound, _loss_range(spent[0]) / PLD_POINTS, PLD_INTERVALS[0])
    interval = min(interval, PLD_INTERVALS[1])
    accountant = library.pld.PLDAccountant(value_discretization_interval=interval)
    try:
        return min(bound, _composed(accountant, spent, delta))
    except (ArithmeticError, ValueError):  # of the library, in its search, at a rate just below 1
        return bound


def _gaussian(library: Any, spent: Sequence[Cost], delta: float) -> float:
    mu = math.sqrt(math.fsum(cost.steps / cost.noise**2 for cost in spent))
    if mu * mu / 2 > EPSILON_MAX:  # epsilon is above that for every delta below 1/2
        return math.inf
    with np.errstate(divide="ignore"):  # the search tries epsilons so large that delta is 0
        return float(library.get_epsilon_gaussian(1 / mu, delta))


def _of_sums(library: Any, sums: Sequence[SumCost], gaussians: Sequence[Cost], delta: float) -> float:
    """By Rényi DP, of which each order adds up: T Gaussians with noise z have T·order / (2z²) (Mironov 2017)."""
    slope = math.fsum(cost.steps / (2 * cost.noise**2) for cost in gaussians)
    total = np.array(ORDERS) * slope
    for cost in sums:
        total += cost.steps * cost.norm**2 * np.array(rates(cost.levels, cost.theta, cost.honest))
    spent, _ = library.rdp.compute_epsilon(ORDERS, total, delta)
    return float(spent) if spent <= EPSILON_MAX else math.inf


def _suits_pld(spent: Sequence[Cost], delta: float) -> bool:
    """Whether PLD is accurate and valid; it is not for several mechanisms.

    An aggregator chooses each plan by what it has seen. RDP holds under that (Feldman & Zrnic 2021), and so does the
    exact epsilon of Gaussians (Smith & Thakurta 2022). For PLD it is not proven.
    """
    first = spent[0]
    accurate = delta >= PLD_DELTA_MIN and first.noise >= PLD_NOISE_MIN and first.steps <= PLD_STEPS_MAX
    return accurate and len(spent) == 1


def _loss_range(cost: Cost) -> float:
    """How far the privacy loss of one step reaches: (2x - 1) / (2z²) for x up to 10 z above 1."""
    return 1 / (2 * cost.noise**2) + 10 / cost.noise


def _composed(accountant: Any, spent: Sequence[Cost], delta: float) -> float:
    for cost in spent:
        accountant.compose(_event(cost))
    return float(accountant.get_epsilon(delta))


def noise(planned: Cost, budget: float, delta: float) -> float:
    """The smallest noise multiplier, to `DIGITS` decimals, with which the planned steps cost at most this epsilon.

    `planned.noise` is ignored. Raises `ConfigError` if no noise multiplier that a plan may have is enough.
    """
    library = _library()
    unit = 10**DIGITS

    def cheap(tried: int, bound: Callable[[tuple[Cost], float], float]) -> bool:
        return bound((replace(planned, noise=tried / unit),), delta) <= budget

    def by_rdp(spent: tuple[Cost], delta: float) -> float:
        return _composed(library.rdp.RdpAccountant(), spent, delta)

    # RDP is quick, and never below the smaller of both bounds: a multiplier that is enough by RDP is enough.
    highest = int(NOISE_MAX * unit)
    if not cheap(highest, by_rdp):
        raise ConfigError(
            f"no noise multiplier up to {NOISE_MAX:g} keeps these trainings within epsilon {budget:g} at delta "
            f"{delta:g}: raise --epsilon or --delta, or plan fewer trainings"
        )
    enough = _least(lambda tried: cheap(tried, by_rdp), 1, highest)
    return _least(lambda tried: cheap(tried, epsilon), max(1, enough // 4), enough) / unit


def theta(planned: SumCost, budget: float, delta: float) -> float:
    """The largest θ, to `THETA_DIGITS` significant digits, with which the planned updates cost at most this epsilon.

    `planned.theta` is ignored. At most `plan_keys.THETA_MAX`. Raises `ConfigError` if no θ is small enough.
    """

    def affordable(tried: float) -> bool:
        return epsilon((replace(planned, theta=tried),), delta) <= budget

    tried, known = THETA_MIN, 0.0
    while abs(tried - known) > known / 10**THETA_DIGITS / 2:
        known, tried = tried, min(max(_rescaled(planned, tried, budget, delta), THETA_MIN), THETA_MAX)
    if tried == THETA_MAX and affordable(tried):
        return tried
    exponent = math.floor(math.log10(tried)) + 1 - THETA_DIGITS
    digits = math.floor(tried / 10.0**exponent)
    while digits and not affordable(float(f"{digits}e{exponent}")):
        digits -= 1
    found = float(f"{digits}e{exponent}")
    if found < THETA_MIN:
        raise ConfigError(
            f"no theta from {THETA_MIN:g} keeps these updates within epsilon {budget:g} at delta {delta:g}: raise "
            "--epsilon or --delta, plan fewer updates, or lower --norm"
        )
    return found


def _rescaled(planned: SumCost, tried: float, budget: float, delta: float) -> float:
    """The θ for this budget, were each order's cost proportional to θ², which it nearly is, from the cost at one."""
    spent = planned.steps * planned.norm**2 * np.array(rates(planned.levels, tried, planned.honest))
    compute = _library().rdp.compute_epsilon
    low, high = 0.0, THETA_MAX / tried
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if compute(ORDERS, middle**2 * spent, delta)[0] <= budget else (low, middle)
    return low * tried


def _least(is_enough: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest integer from `low` to `high` that is enough, if `high` is and every one above an enough one is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _event(cost: Cost) -> Any:
    library = _library()
    one = library.GaussianDpEvent(cost.noise)
    step = one if cost.rate == 1 else library.PoissonSampledDpEvent(cost.rate, one)
    return library.SelfComposedDpEvent(step, cost.steps)


def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415 - takes a second and 60 MB, which most devices do not need
        import dp_accounting.pld  # noqa: PLC0415 - likewise
        import dp_accounting.rdp  # noqa: PLC0415 - likewise
        from absl import logging  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        raise ConfigError(
            "privacy accounting needs the package dp-accounting: pip install 'ternbus[accounting]'"
        ) from error
    logging.set_verbosity(logging.ERROR)  # else a warning for each order that is left out, which only raises epsilon
    return dp_accounting
