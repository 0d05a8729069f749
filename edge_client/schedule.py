"""How the learning rate changes with the federation's versions: a warm-up, then constant, linear or cosine."""

import math

SCHEDULES = ("constant", "linear", "cosine")
RESTORED = 2**32  # an aggregator restored from an older copy adds this to its version


def share(schedule: str, version: int, *, warmup: int, total: int, final: float) -> float:
    """The share of `learning_rate` for training on a version; 0 to 1.

    v < W: (v + 1) / W. From W on, with p = (v - W) / (T - W), at most 1: constant 1; linear 1 - (1 - f)·p; cosine
    f + (1 - f)·(1 + cos(pi·p)) / 2 (Loshchilov & Hutter 2017, eq. 5). W is `warmup`, T `total`, f `final`. Every device
    and every restart computes the same: nothing but the version counts.
    """
    version %= RESTORED
    if version < warmup:
        return (version + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (version - warmup) / (total - warmup))
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (1 - final) * left
