"""Schedules: the learning rate (a warm-up, then constant, linear or cosine) by version and step; a device's turns."""

import math

from ternbus.broker.protocol.messages import RESTORE_LEAP

TURNS = 1_000_000  # `participation` is rounded to a whole number of turns in this many versions


def share(schedule: str, version: int, *, warmup: int, total: int, final: float) -> float:
    """The share of `learning_rate` for training on a version, or for a step of a training; 0 to 1.

    v < W: (v + 1) / W. From W on, with p = (v - W) / (T - W), at most 1: constant 1; linear 1 - (1 - f)·p; cosine
    f + (1 - f)·(1 + cos(pi·p)) / 2 (Loshchilov & Hutter 2017, eq. 5). v is `version` or the step, W `warmup`, T
    `total`, f `final`. The result depends on the arguments alone, so every device and every restart computes the same.
    A training may have fewer steps than its warm-up.
    """
    version %= RESTORE_LEAP
    if version < warmup:
        return (version + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (version - warmup) / max(1, total - warmup))
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (1 - final) * left


def turn(version: int, *, participation: float, phase: int) -> int:
    """The first version, from `version` on, that is the device's turn to train.

    With C = `participation` in millionths (the client fraction of McMahan et al. 2017, algorithm 1) a turn is each v
    with floor((C·(v + 1) + phase) / 10⁶) > floor((C·v + phase) / 10⁶): that share of the versions, evenly spaced.
    `phase`, 0 … 999,999, gives each device other turns.
    """
    millionths = max(1, round(participation * TURNS))
    number = (millionths * version + phase) // TURNS + 1  # of the turn
    return (number * TURNS - phase - 1) // millionths
