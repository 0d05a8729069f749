"""The command `ternbus edge noise`: the noise that a privacy budget asks for, and what it does to a mean of updates."""

import json
import math
from dataclasses import replace
from typing import Annotated, Final

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.sums.words import BITS
from ternbus.edge.learn import accountant
from ternbus.edge.learn.poisson_binomial import deviation
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import SAMPLE, SUM, SumCost, check_budget, cost
from ternbus.edge.shell.arguments import AsJson

SUM_MAX: Final = 2 ** (BITS[-1] - 1) - 1  # of the levels of all devices of a set


def noise(
    *,
    dp: Annotated[str, typer.Option(metavar="KIND", help="Kind of differential privacy: device, sample or sum.")],
    epsilon: Annotated[float, typer.Option(metavar="EPSILON", help="Privacy budget of a device.")],
    updates: Annotated[int, typer.Option(min=1, metavar="N", help="Number of trainings of a device.")],
    delta: Annotated[float, typer.Option(metavar="DELTA", help="Delta of the privacy budget.")] = 1e-5,
    samples: Annotated[int, typer.Option(min=0, help="Number of samples of a device; for --dp sample only.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the plan; for --dp sample only.")] = 32,
    local_epochs: Annotated[float, typer.Option(min=0, help="Epochs per training; for --dp sample only.")] = 1.0,
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps per training, instead of epochs; for --dp sample only.")
    ] = None,
    devices: Annotated[
        int,
        typer.Option(min=0, help="Devices in the smallest sum, for --dp sum; in a mean of updates, for --dp device."),
    ] = 0,
    colluding: Annotated[
        int, typer.Option(min=0, help="Devices of a sum that may help whoever sees it; for --dp sum only.")
    ] = 0,
    norm: Annotated[
        float, typer.Option(metavar="B", help="L2 norm of a change, in units of the scales; for --dp sum only.")
    ] = 10.0,
    levels: Annotated[int, typer.Option(min=1, help="Levels of the private sums; for --dp sum only.")] = 1,
    elements: Annotated[int, typer.Option(min=0, help="Parameters of the model, to tell the noise in all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute the least noise that allows N trainings within a privacy budget.

    It is `dp_noise` of a plan, and with `--dp sum` the largest `dp_theta`. With `--devices`, the command also tells
    how much noise is left in the mean of their updates, beside the largest change (the clip) of one.

    Example: ternbus edge noise --dp sample --epsilon 8 --updates 20 --samples 5000 --batch-size 1000 --local-steps 5

    Example: ternbus edge noise --dp sum --epsilon 8 --updates 20 --devices 50 --elements 650
    """
    check_budget(dp, epsilon, delta)
    if dp == SAMPLE and not samples:
        raise ConfigError("--dp sample needs the number of a device's samples: add --samples")
    if samples and dp != SAMPLE:
        raise ConfigError(f"--samples is for --dp sample: leave it out with --dp {dp}")
    found: dict[str, float] = {}
    if dp == SUM:
        _check_sum(devices, colluding, norm, levels)
        planned = SumCost(levels=levels, theta=0.0, norm=norm, honest=devices - colluding, steps=updates)
        theta = accountant.theta(planned, epsilon, delta)
        found = {"dp_theta": theta, "dp_norm": norm}
        left = deviation(levels, theta, devices) / norm
    else:
        plan = Plan(
            dp=dp, dp_clip=1, dp_noise=1, dp_epsilon=epsilon,
            batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps,
        )  # fmt: skip
        one = cost(plan, samples)
        found["dp_noise"] = accountant.noise(replace(one, steps=updates * one.steps), epsilon, delta)
        left = found["dp_noise"] / math.sqrt(max(1, devices))
    _tell(found, left if devices and dp != SAMPLE else None, devices, elements, as_json=as_json)


def _check_sum(devices: int, colluding: int, norm: float, levels: int) -> None:
    if not 2 <= devices <= SUM_MAX // levels:
        raise ConfigError(
            f"--devices is {devices}: with {levels} levels (--levels) a private sum has from 2 to {SUM_MAX // levels} "
            "devices; give the smallest number that a sum may have (--private-min of the devices)"
        )
    if colluding >= devices:
        raise ConfigError(f"--colluding is {colluding}, and a sum has {devices} devices: give a smaller number")
    if not 0 < norm <= 1e6:
        raise ConfigError(f"--norm is {norm:g}: give a number above 0, at most 1e6")


def _tell(found: dict[str, float], left: float | None, devices: int, elements: int, *, as_json: bool) -> None:
    """Lines for a plan, and a comment; ``left`` is the standard deviation of the noise in each element of the mean."""
    if as_json:
        means = {} if left is None else {"noise_of_mean": left}
        overall = {} if left is None or not elements else {"noise_of_mean_in_all": left * math.sqrt(elements)}
        typer.echo(json.dumps({**found, **means, **overall}))
        return
    for name, number in found.items():
        typer.echo(f"{name} = {number:g}")
    if left is not None:
        overall_text = f", {left * math.sqrt(elements):.3g} in all {elements:,}" if elements else ""
        typer.echo(f"# noise in the mean of {devices} updates, in clips: {left:.3g} in each element{overall_text}")
