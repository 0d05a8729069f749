"""How much epsilon a device has spent, and what noise a budget asks for: Google's dp-accounting, by Rényi DP.

It was chosen over Opacus' accountants since it needs no torch, which a device with device-level privacy may not have;
both compute the same bounds. RDP adds up exactly over any mixture of mechanisms; it is 8 % looser than PLD for 20
Gaussians of z = 5, and 800 times quicker. The library is loaded at the first question only.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.privacy import Cost

DIGITS: Final = 3  # behind the point, of a noise that is computed
NOISIEST: Final = 1e6  # what a plan may ask for


def epsilon(spent: Iterable[Cost], delta: float) -> float:
    """The epsilon, at this delta, of all of them together; 0 for none.

    RDP of the (Poisson-sampled) Gaussian mechanism: Mironov 2017, proposition 7; Mironov, Talwar & Zhang 2019, section
    3.3. From RDP to (epsilon, delta): Canonne, Kamath & Steinke 2020, proposition 12. Two data sets are neighbours
    where one has what is protected and the other lacks it. Raises `ConfigError` where the library is missing.
    """
    accountant = _library().rdp.RdpAccountant()
    for cost in spent:
        accountant.compose(_event(cost))
    return float(accountant.get_epsilon(delta))


def noise(planned: Cost, budget: float, delta: float) -> float:
    """The least `noise`, up to its last digit, with which the planned steps cost no more than this epsilon.

    `planned.noise` is not looked at. Raises `ConfigError` where no noise that a plan may ask for is enough.
    """
    library = _library()
    unit = 10**DIGITS
    try:
        least = library.calibrate_dp_mechanism(
            library.rdp.RdpAccountant,
            lambda tried: _event(replace(planned, noise=tried / unit)),
            budget,
            delta,
            library.ExplicitBracketInterval(1, NOISIEST * unit),
            discrete=True,
        )
    except ValueError as error:  # the search has found none
        raise ConfigError(f"no noise makes that cost an epsilon of {budget:g} at delta {delta:g}") from error
    return float(least) / unit


def _event(cost: Cost) -> Any:
    library = _library()
    one = library.GaussianDpEvent(cost.noise)
    step = one if cost.rate == 1 else library.PoissonSampledDpEvent(cost.rate, one)
    return library.SelfComposedDpEvent(step, cost.steps)


def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415 - a second and 60 MB, for those who need it
        import dp_accounting.rdp  # noqa: PLC0415 - likewise
        from absl import logging  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        raise ConfigError("the plan asks for differential privacy: pip install 'ternbus[accounting]'") from error
    logging.set_verbosity(logging.ERROR)  # it warns of each order that it leaves out, which only makes epsilon larger
    return dp_accounting
