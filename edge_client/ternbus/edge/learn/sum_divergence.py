"""Rényi differential privacy of the Poisson binomial mechanism: an upper bound at every point, not on a grid alone.

One element. A device draws B(y) = Binomial(2k, 1/2 + θy), or B(0) where it changes nothing. The other h - 1 honest
devices of its set draw 2k(h - 1) Bernoullis R with probabilities from 1/2 - θ to 1/2 + θ, and who sees the sum may know
all of these. Both P = B(y) + R and Q = B(0) + R are affine in the probability of each of those Bernoullis, and a Rényi
divergence is quasi-convex in both of its arguments together (van Erven & Harremoës 2014, theorem 13). So the worst R is
j of Bernoulli(1/2 + θ) and 2k(h - 1) - j of Bernoulli(1/2 - θ), for some j. All j are tried.

All elements. They are independent, and Σy² <= B², so the divergence D of all of them is at most B² times the largest
D(y)/y². By symmetry, 0 < y <= 1.

All y. At the order r, D = log(1 + E[φ(w)]) / (r - 1), where w = P/Q, averaged over Q, and φ(w) = w^a - 1 - a(w - 1)
with a = r for D(P, Q) and a = 1 - r for D(Q, P). With w = 1 + y·v and ψ(w) = φ(w)/(w - 1)², E[φ(w)] is y²·E[v²·ψ(w)].
Here ψ is monotone, and v is a polynomial in y of degree 2k - 1 for each value of the sum. Its Bernstein coefficients on
a cell [low, high] of y enclose it, so they bound v², w and ψ(w), and thereby E[v²·ψ(w)], by a number A for the whole
cell. Since log(1 + A·y²)/y² falls as y grows, D/y² <= log(1 + A·low²) / ((r - 1)·low²) on the cell.
"""

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ORDERS: Final = tuple(1 + 0.1 * 1.2**step for step in range(44))  # to 254
CELLS: Final = 32  # of y
THETA_COARSE: Final = 0.0625  # up to here `CELLS` bound it within some percent; more in proportion
CELLED_MAX: Final = 2**21  # values of all cells, so that the largest sums take seconds; some percent more, then
THETA_SMALLEST: Final = 1e-3  # below it, differences of probabilities would lose digits
SAFETY: Final = 1 + 1e-6  # for rounding; sums have relative errors of 1e-12
TINY: Final = 1e-5  # |w - 1| below which ψ is not computed by a difference


@lru_cache(maxsize=64)
def rates(levels: int, theta: float, honest: int, orders: tuple[float, ...] = ORDERS) -> tuple[float, ...]:
    """For each of the orders, above 1, an upper bound of D(y)/y² over all y, company and both directions.

    ``levels`` is k, ``honest`` is h, the device included. Times B² it is the Rényi divergence of one update; where it
    cannot be represented, it is infinite.
    """
    if theta < THETA_SMALLEST:
        # B(y) under θ is B(θy/θ') under θ' > θ, whose other draws have more freedom.
        return tuple((theta / THETA_SMALLEST) ** 2 * rate for rate in rates(levels, THETA_SMALLEST, honest, orders))
    trials = 2 * levels
    ratios, idle = _ratios(levels, theta, honest)
    # v·y = w - 1 = Σ_m C(2k, m) y^m (1-y)^(2k-m) (w_m - 1), and w_0 = 1: coefficients of v, of degree 2k - 1.
    coefficients = (ratios - 1) * (trials / np.arange(1, trials + 1))[:, None, None]
    cells = max(1, min(CELLS * max(1, round(theta / THETA_COARSE)), CELLED_MAX // idle.size))
    worst = np.zeros(len(orders))
    for cell in range(cells):
        low, high = cell / cells, (cell + 1) / cells
        enclosed = np.tensordot(_restriction(trials - 1, low, high), coefficients, 1)
        least, most = enclosed.min(axis=0), enclosed.max(axis=0)
        weights = idle * np.maximum(least * least, most * most)
        # w rises with the sum (Shaked & Shanthikumar 2007, theorem 1.C.9): its extremes are at sums of 0 and of all.
        below = _Curvature(
            np.maximum(np.minimum(low * least, high * least), (1 - 2 * theta * high) ** trials - 1), weights
        )
        above = _Curvature(
            np.minimum(np.maximum(low * most, high * most), (1 + 2 * theta * high) ** trials - 1), weights
        )
        for place, order in enumerate(orders):
            for power in (order, 1 - order):
                largest = (above if power >= 2 else below).largest(power)
                rate = math.log1p(largest * low * low) / (low * low) if low else largest
                worst[place] = max(worst[place], rate / (order - 1))
    return tuple(float(rate) * SAFETY for rate in worst)


class _Curvature:
    """E[v²·ψ(w)], w = 1 + ``offsets``, for given Q·v² as ``weights``; shapes (j, sums)."""

    def __init__(self, offsets: Floats, weights: Floats) -> None:
        near = np.abs(offsets) < TINY
        self._near = np.where(near, weights, 0.0).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            self._weights = np.where(near, 0.0, weights / np.square(offsets))
            self._logs = np.log1p(offsets)
        self._slopes = (self._weights * offsets).sum(axis=1)

    def largest(self, power: float) -> float:
        """The largest of all j, for φ(w) = w^a - 1 - a(w - 1) with this a; infinite beyond float64's range.

        Near 1, where φ and (w - 1)² vanish, ψ is at most its second derivative's a(a - 1)·w^(a - 2) / 2.
        """
        with np.errstate(over="ignore"):
            means = np.einsum("js,js->j", self._weights, np.expm1(power * self._logs)) - power * self._slopes
        near = power * (power - 1) / 2 * math.exp(2 * TINY * abs(power - 2))
        return float((means + near * self._near).max())


def _ratios(levels: int, theta: float, honest: int) -> tuple[Floats, Floats]:
    """P_m/Q for m = 1 … 2k, shape (2k, others + 1, sums), and Q, shape (others + 1, sums); one row for each j.

    P_m is the sum with m of the device's 2k Bernoullis at 1/2 + θ, and the rest of them at 1/2.
    """
    trials, others = 2 * levels, 2 * levels * (honest - 1)
    high, low, half = (_binomials(max(trials, others), share) for share in (0.5 + theta, 0.5 - theta, 0.5))
    company = np.array([np.convolve(high[j], low[others - j]) for j in range(others + 1)])
    own = np.array([np.convolve(high[m], half[trials - m]) for m in range(trials + 1)])
    sums = np.zeros((trials + 1, others + 1, trials + others + 1))
    for place in range(trials + 1):
        sums[:, :, place : place + others + 1] += own[:, place, None, None] * company
    return sums[1:] / sums[0], sums[0]


def _binomials(trials: int, share: float) -> list[Floats]:
    """The probabilities of Binomial(n, share) for n = 0 … trials, by sums of positive numbers only."""
    rows = [np.ones(1)]
    for _ in range(trials):
        rows.append(np.convolve(rows[-1], (1 - share, share)))
    return rows


def _restriction(degree: int, low: float, high: float) -> Floats:
    """The matrix from Bernstein coefficients on [0, 1] to those on [low, high], by de Casteljau's algorithm."""
    matrix = _left(np.eye(degree + 1), high)
    return _left(matrix[::-1], 1 - low / high)[::-1]


def _left(rows: Floats, at: float) -> Floats:
    """The coefficients on [0, at] of those on [0, 1]."""
    first = [rows[0]]
    while len(rows) > 1:
        rows = (1 - at) * rows[:-1] + at * rows[1:]
        first.append(rows[0])
    return np.array(first)
