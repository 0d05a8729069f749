"""How much epsilon a device has spent, and what noise a budget asks for: Google's dp-accounting.

It was chosen over Opacus' accountants since it needs no torch, which a device with device-level privacy may not have.
Gaussian mechanisms without sampling have an exact epsilon. Of the others two upper bounds are computed, Rényi DP and
privacy loss distributions (PLD), and the smaller one counts: PLD is 8 to 15 % smaller for the plans of a device, but
slow for a large epsilon, and not accurate for a tiny delta. An account holds mechanisms, not an epsilon, so one that
was begun with another computation stays valid. The library is loaded at the first question only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.privacy import Cost

DIGITS: Final = 3  # behind the point, of a noise that is computed
NOISIEST: Final = 1e6  # what a plan may ask for
LEAST_NOISE: Final = 1e-3  # with less a single step costs more than any budget that a plan may have
LARGEST_EPSILON: Final = 1e6  # of a plan's budget

PLD_INTERVAL: Final = 1e-4  # of the privacy loss, as a share of epsilon; its rounding is pessimistic
PLD_INTERVALS: Final = (1e-5, 1e-3)  # the least and the largest
PLD_POINTS: Final = 2e5  # of one step's losses
PLD_EPSILON_MAX: Final = 100.0
PLD_DELTA_MIN: Final = 1e-10  # below it the rounding of the convolutions would count
PLD_NOISE_MIN: Final = 0.3
PLD_STEPS_MAX: Final = 10**6


def epsilon(spent: Iterable[Cost], delta: float) -> float:
    """The epsilon, at this delta, of all of them together; 0 for none, infinite beyond every budget.

    Exact for Gaussian mechanisms alone: Balle & Wang 2018, theorem 8; T of them with noise z are one with z / sqrt(T).
    Else the smaller of two bounds. RDP of the Poisson-sampled Gaussian: Mironov, Talwar & Zhang 2019, section 3.3, and
    from RDP to (epsilon, delta) Canonne, Kamath & Steinke 2020, proposition 12. PLD: Koskela et al. 2020, with the
    pessimistic discretization of Doroshenko et al. 2022. Two data sets are neighbours where one has what is protected
    and the other lacks it. Raises `ConfigError` where the library is missing.
    """
    return _epsilon(tuple(spent), delta)


@lru_cache(maxsize=256)  # devices of one simulation spend the same
def _epsilon(spent: tuple[Cost, ...], delta: float) -> float:
    library = _library()
    if not spent:
        return 0.0
    if min(cost.noise for cost in spent) < LEAST_NOISE:
        return math.inf
    if all(cost.rate == 1 for cost in spent):
        return _gaussian(library, spent, delta)
    bound = _composed(library.rdp.RdpAccountant(), spent, delta)
    if not bound <= PLD_EPSILON_MAX or not _suits_pld(spent, delta):
        return bound
    interval = max(PLD_INTERVAL * bound, _loss_range(spent[0]) / PLD_POINTS, PLD_INTERVALS[0])
    interval = min(interval, PLD_INTERVALS[1])
    accountant = library.pld.PLDAccountant(value_discretization_interval=interval)
    return min(bound, _composed(accountant, spent, delta))


def _gaussian(library: Any, spent: Sequence[Cost], delta: float) -> float:
    mu = math.sqrt(math.fsum(cost.steps / cost.noise**2 for cost in spent))
    if mu * mu / 2 > LARGEST_EPSILON:  # epsilon is above that for every delta below 1/2
        return math.inf
    with np.errstate(divide="ignore"):  # delta is 0 where epsilon is tried too large
        return float(library.get_epsilon_gaussian(1 / mu, delta))


def _suits_pld(spent: Sequence[Cost], delta: float) -> bool:
    """Not for several mechanisms: an aggregator chooses each plan by what it has seen, and that PLD holds then is not
    proven. It is for RDP (Feldman & Zrnic 2021) and for Gaussians (Smith & Thakurta 2022).
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
    """The least `noise`, up to its last digit, with which the planned steps cost no more than this epsilon.

    `planned.noise` is not looked at. Raises `ConfigError` where no noise that a plan may ask for is enough.
    """
    library = _library()
    unit = 10**DIGITS

    def cheap(tried: int, bound: Callable[[tuple[Cost, ...], float], float]) -> bool:
        return bound((replace(planned, noise=tried / unit),), delta) <= budget

    def by_rdp(spent: tuple[Cost, ...], delta: float) -> float:
        return _composed(library.rdp.RdpAccountant(), spent, delta)

    # RDP is quick, and never below the smaller of both bounds: what is enough by it is enough.
    highest = int(NOISIEST * unit)
    if not cheap(highest, by_rdp):
        raise ConfigError(f"no noise makes that cost an epsilon of {budget:g} at delta {delta:g}")
    enough = _least(lambda tried: cheap(tried, by_rdp), 1, highest)
    return _least(lambda tried: cheap(tried, epsilon), max(1, enough // 4), enough) / unit


def _least(is_enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least whole number from `low` to `high` that is enough, as `high` is, and with it every larger one."""
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
        import dp_accounting  # noqa: PLC0415 - a second and 60 MB, for those who need it
        import dp_accounting.pld  # noqa: PLC0415 - likewise
        import dp_accounting.rdp  # noqa: PLC0415 - likewise
        from absl import logging  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        raise ConfigError("the plan asks for differential privacy: pip install 'ternbus[accounting]'") from error
    logging.set_verbosity(logging.ERROR)  # it warns of each order that it leaves out, which only makes epsilon larger
    return dp_accounting
