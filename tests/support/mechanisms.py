"""What trainings under differential privacy cost, for the tests of accounts."""

from ternbus.edge.plan.privacy import Cost


def gaussian(noise: float, steps: int) -> Cost:
    return Cost(kind="device", noise=noise, rate=1.0, steps=steps)


def sampled(noise: float, rate: float, steps: int) -> Cost:
    return Cost(kind="sample", noise=noise, rate=rate, steps=steps)
