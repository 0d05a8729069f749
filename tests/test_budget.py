"""The noise that a budget asks for: `ternbus edge noise`, and the plans of the experiments on privacy."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.accountant import epsilon, noise
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import Charge, Cost, SumCost, cost
from ternbus.edge.shell import cli
from ternbus.lab.experiment import experiment
from ternbus.lab.scenario import scenario

SAMPLES = 5000  # CIFAR-10's 50,000 on 10 devices


def planned(rate: float, steps: int) -> Cost:
    return Cost(kind="sample", noise=0, rate=rate, steps=steps)


@pytest.mark.parametrize("budget", [0.5, 8.0, 1000.0])
@pytest.mark.parametrize(("rate", "steps"), [(1.0, 20), (0.2, 200)])
def test_the_noise_is_enough_and_a_thousandth_less_is_not(rate: float, steps: int, budget: float) -> None:
    found = noise(planned(rate, steps), budget, 1e-5)
    assert found == round(found, 3)
    assert epsilon([replace(planned(rate, steps), noise=found)], 1e-5) <= budget
    assert epsilon([replace(planned(rate, steps), noise=found - 0.001)], 1e-5) > budget


def test_gaussians_need_what_the_accountants_own_test_says() -> None:
    """Three of sqrt(3) are exactly (1, 0.126936), in dp-accounting's test_gaussian_basic."""
    assert noise(planned(1.0, 3), 1.0, 0.126936) == pytest.approx(3**0.5, abs=1e-3)


def test_what_no_noise_can_do_is_said() -> None:
    with pytest.raises(ConfigError, match="no noise"):
        noise(planned(1.0, 10**9), 1e-3, 1e-12)


def run(line: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["noise", *line.split()])
    return found.exit_code, found.output


def test_the_command_says_what_the_plan_needs() -> None:
    """With few steps: the search composes them again and again."""
    assert run("--dp device --epsilon 8 --updates 20") == (0, f"dp_noise = {noise(planned(1.0, 20), 8, 1e-5)}\n")
    steps = "--dp sample --epsilon 4 --updates 2 --samples 5000 --batch-size 1000 --local-steps 5"
    assert run(steps) == (0, f"dp_noise = {noise(planned(0.2, 10), 4, 1e-5)}\n")
    assert run(steps.replace("steps 5", "epochs 1")) == run(steps)
    assert run(f"{steps} --delta 1e-6") == (0, f"dp_noise = {noise(planned(0.2, 10), 4, 1e-6)}\n")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--dp sampl --epsilon 8", "--dp is 'sampl': give device, sample or sum"),
        ("--dp device --epsilon 0", "--epsilon is 0: give a number above 0"),
        ("--dp device --epsilon nan", "--epsilon is nan: give a number above 0"),
        ("--dp device --epsilon 8 --delta 1", "--delta is 1: give a number between 0 and 1, such as 1e-5"),
        ("--dp sample --epsilon 8", "--dp sample needs the number of a device's samples: add --samples"),
        ("--dp sum --epsilon 8 --samples 9", "--samples is for --dp sample: leave it out with --dp sum"),
    ],
)
def test_the_command_names_the_option_that_is_wrong(wrong: str, said: str) -> None:
    refused = CliRunner().invoke(cli.app, ["noise", *wrong.split(), "--updates", "1"]).exception
    assert (type(refused), str(refused)) == (ConfigError, said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--max-epsilon 8", "--max-epsilon is for differential privacy: add --dp"),
        ("--dp sampl", "--dp is 'sampl': give device, sample or sum"),
        ("--dp sample", "--dp sample needs the largest epsilon to spend: add --max-epsilon"),
        ("--dp sample --max-epsilon 0", "--max-epsilon is 0: give a number above 0"),
        ("--dp sample --max-epsilon 1 --max-delta 2", "--max-delta is 2: give a number between 0 and 1, such as 1e-5"),
    ],
)
def test_an_owner_s_policy_names_the_option_that_is_wrong(wrong: str, said: str) -> None:
    line = ["join", "pi.toml", "pi", "--task", "digits", *wrong.split()]
    refused = CliRunner().invoke(cli.app, line).exception
    assert (type(refused), str(refused)) == (ConfigError, said)


def test_the_experiment_spends_its_budgets_and_no_more() -> None:
    """Each plan's noise is enough for as many trainings as its run has room for; by RDP, when it ran, the least."""
    checked = 0
    for combination in experiment.load("privacy").grid.combinations():
        table = combination.scenario
        plan = Plan.from_meta(table["plan"])
        if plan.dp == "none":
            continue
        assert (combination.labels["privacy"], plan.dp_delta) == (f"{plan.dp}, epsilon {plan.dp_epsilon:g}", 1e-5)
        one = cost(plan, SAMPLES)
        updates = 1 if plan.dp == "device" else table["end"]["versions"]  # a device trains once a version at most
        assert updates <= 20
        least = noise(replace(one, steps=updates * one.steps), plan.dp_epsilon, plan.dp_delta)
        assert least <= plan.dp_noise < 1.08 * least
        checked += 1
    assert checked == 4


def test_the_experiment_on_private_sums_spends_its_budget_and_no_more() -> None:
    """Every update of every device: a version has one of each, and a sum all of them, of whom all are honest."""
    kinds = []
    for combination in experiment.load("privacy-sum").grid.combinations():
        wanted = scenario.parse(combination.scenario)
        plan, steps = Plan.from_meta(wanted.chosen_plan), wanted.end.versions or 0
        assert combination.labels["privacy"] == f"{plan.dp}, {wanted.devices} devices"
        assert wanted.sync  # a version of every device's update
        if plan.dp == "none":
            continue
        kinds.append(plan.dp)
        spent: Charge = replace(planned(1.0, steps), kind=plan.dp, noise=plan.dp_noise)
        if plan.dp == "sum":
            assert wanted.private is not None
            assert wanted.private.min == wanted.devices
            spent = SumCost(levels=1, theta=plan.dp_theta, norm=plan.dp_norm, honest=wanted.devices, steps=steps)
        assert 7.9 < epsilon([spent], plan.dp_delta) <= plan.dp_epsilon == 8.0
    assert kinds == ["device"] * 2 + ["sum"] * 4
