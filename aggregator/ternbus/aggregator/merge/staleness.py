"""The discount of an update by its staleness, the number of versions since its base."""

import math

from ternbus.aggregator.settings import StalenessSettings


def discount(about: StalenessSettings, staleness: int) -> float:
    """s(tau), 1 for a fresh update and never more (FedAsync, Xie et al. 2019, section 5.2).

    constant:    1
    polynomial:  (1 + tau)^-a                      a: exponent
    exponential: exp(-a tau)                       a: decay
    hinge:       1                   for tau <= b  a: hinge_slope
                 1 / (1 + a (tau - b))  beyond it  b: hinge_from
    """
    match about.discount:
        case "polynomial":
            return float((1 + staleness) ** -about.exponent)
        case "exponential":
            return math.exp(-about.decay * staleness)
        case "hinge":
            return 1 / (1 + about.hinge_slope * max(0, staleness - about.hinge_from))
        case _:
            return 1.0
