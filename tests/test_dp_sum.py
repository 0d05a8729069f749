"""`dp = "sum"` on a device: what a training releases and costs, which terms and plans it follows, what it adds up."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from support.core_device import Device, connected
from support.core_device import aggregator as scripted_aggregator
from support.mechanisms import gaussian, sampled
from support.private_device import PINS, refusals, training
from support.private_sums import card, helper_key, terms_for
from support.scripted_aggregator import ScriptedAggregator
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.plan_keys import SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import masks
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import BUCKETS, WEIGHT_STEPS
from ternbus.edge.core import events
from ternbus.edge.core.actions import Log, StartTraining
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.sum_content import SumJob
from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import MECHANISMS_MAX, Account, Charge, PrivacyPolicy, SumCost
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell import cli
from ternbus.edge.shell.directory import Settings
from ternbus.edge.shell.worker import train

SCHEMA = Schema.of({"w": (20, 20), "b": (9,), "layer.running_mean": (5,)})
THETA, NORM = 0.1, 4.0
PLAN = {"codec": "private", "dp": "sum", "dp_theta": THETA, "dp_norm": NORM, "dp_epsilon": 50.0}
HELPERS = (helper_key(1).public,)


def sum_terms(**changes: Any) -> Terms:
    made = {"dp": SUM, "theta": THETA, "norm": NORM, "scales": (0.5, 2.0, 1.0), "helpers": (card(), card(2))}
    return terms_for(SCHEMA, **{**made, **changes})


def cost(steps: int, honest: int = 5, **changes: Any) -> SumCost:
    return replace(SumCost(levels=1, theta=THETA, norm=NORM, honest=honest, steps=steps), **changes)


class Learner:
    """Adds one number to each element; with the number nan, it fails with the text of a secret."""

    samples = 40

    def __init__(self, change: float) -> None:
        self.change = change

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        if math.isnan(self.change):
            raise ValueError("a secret of the data")
        tensors = {name: tensor + np.float32(self.change) for name, tensor in start.items()}
        return Trained(tensors=tensors, samples=self.samples, metrics={"loss": self.change})

    def evaluate(self, tensors: Tensors) -> Evaluation:
        raise AssertionError


def job(plan: Mapping[str, Any] = PLAN, terms: Terms | None = None, honest: int = 5, **changes: Any) -> StartTraining:
    vector = np.zeros(SCHEMA.elements, np.float32)
    sums = SumJob(terms=terms or sum_terms(), context=bytes(32), honest=honest)
    fields = {"base": 3, "schema": SCHEMA, "vector": vector, "residual": None, "seed": 5, "sums": sums, **changes}
    return StartTraining(plan=Plan.from_meta(plan), **fields)


def finished(change: float, seed: int | None = None, **changes: Any) -> Any:
    source = RandomSource() if seed is None else RandomSource(np.random.default_rng(seed).bytes)
    result = train(Learner(change), job(**changes), source)
    assert isinstance(result, events.TrainingFinished)
    return result


def values_of(result: Any, terms: Terms) -> tuple[Any, Any]:
    return terms.layout.unpack(terms.layout.read(result.content.words))


# -- what a training releases


def test_an_update_has_draws_a_weight_of_one_and_no_buckets_whatever_the_data() -> None:
    terms = sum_terms(levels=3)
    for change in (0.0, 0.01, 1e30, math.nan):
        ternary, plain = values_of(finished(change, seed=1, terms=terms), terms)
        assert set(np.unique(ternary)) == set(range(-3, 4))
        assert set(np.unique(plain[:9])) <= set(range(-3, 4))
        assert plain[14] == WEIGHT_STEPS
        assert plain[15:].tolist() == [0] * BUCKETS * 3


def test_the_sum_of_many_devices_is_their_mean_in_the_steps_of_the_terms() -> None:
    terms = sum_terms(bits=8, levels=1)
    devices = terms.devices_max
    total = terms.layout.pack(np.zeros(400, np.int8), np.zeros(terms.layout.plain, np.int64))
    for seed in range(devices):
        terms.layout.add(total, terms.layout.read(finished(0.05, seed, terms=terms).content.words))
    ternary, plain = terms.layout.unpack(total)
    assert plain[14] == devices * WEIGHT_STEPS
    for sums, scale, steps in ((ternary, 0.5, terms.ternary_steps), (plain[:9], 2.0, terms.dense_steps)):
        noise = scale / (THETA * math.sqrt(8 * devices * sums.size))  # of the mean of all elements
        assert (sums * (scale / steps) / devices).mean() == pytest.approx(0.05, abs=4 * noise)


def test_a_training_that_fails_releases_the_draws_of_no_change_at_the_same_cost() -> None:
    """Draw by draw the same as one that changes nothing; only the device's own log knows."""
    failed, idle = finished(math.nan, 7), finished(0.0, 7)
    assert failed.content.words == idle.content.words
    assert failed.content.seeds == idle.content.seeds
    assert (failed.account, failed.samples, failed.residual) == (idle.account, idle.samples, idle.residual)
    assert set(failed.metrics) == {"epsilon", "delta"}
    assert "a secret of the data" in failed.failure


def test_each_release_has_its_own_draws_and_each_helper_its_own_seed() -> None:
    one, other = finished(0.1), finished(0.1)
    assert one.content.words != other.content.words
    assert len({*one.content.seeds, *other.content.seeds}) == 4
    assert all(len(seed) == masks.SEED_BYTES for seed in one.content.seeds)


def test_no_statistic_of_the_data_is_sent() -> None:
    _, plain = values_of(finished(0.1), sum_terms())
    assert (plain[9:14] == 0).all()


def test_nothing_is_left_in_the_residual_and_none_is_added() -> None:
    """It would have no noise, and what an earlier update left behind is in no sum's cost."""
    plan = {**PLAN, "error_feedback": True}
    assert finished(0.1, plan=plan).residual is None
    before = np.full(SCHEMA.elements, 1e3, np.float32)
    assert finished(0.0, 7, plan=plan, residual=before).content.words == finished(0.0, 7).content.words


# -- what it costs


def test_an_update_is_charged_by_the_terms_and_the_honest_devices() -> None:
    result = finished(0.1, honest=4)
    assert result.account.spent == (cost(1, 4),)
    assert result.metrics["epsilon"] == pytest.approx(epsilon([cost(1, 4)], 1e-5))
    again = finished(0.1, honest=4, account=result.account)
    assert again.account.spent == (cost(2, 4),)
    assert finished(0.1, honest=3, account=again.account).account.spent == (cost(2, 4), cost(1, 3))


def test_more_honest_devices_cost_less_and_nobody_honest_costs_most() -> None:
    found = [epsilon([cost(20, honest)], 1e-5) for honest in (1, 2, 5, 20, 60)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 4 * found[-1]


def test_the_device_stops_before_the_update_that_its_budget_does_not_pay_for() -> None:
    affordable = max(n for n in range(1, 50) if epsilon([cost(n)], 1e-5) <= 20.0)
    plan = {**PLAN, "dp_epsilon": 20.0}
    policy = PrivacyPolicy(kind="sum", epsilon=20.0, delta=1e-5)
    assert isinstance(
        train(Learner(0.1), job(plan, account=Account(spent=(cost(affordable - 1),)))), events.TrainingFinished
    )
    over = train(Learner(0.1), job(plan, account=Account(spent=(cost(affordable),)), policy=policy))
    assert isinstance(over, events.BudgetSpent)
    assert over.final
    assert over.epsilon > 20.0
    unlike = train(
        Learner(0.1),
        job(plan, terms=sum_terms(norm=40.0), account=Account(spent=(cost(affordable),)), policy=policy),
    )
    assert isinstance(unlike, events.BudgetSpent)
    assert not unlike.final  # no plan ends a device that has not spent its budget on trainings like it


# -- accounts of several kinds


def test_updates_in_sums_and_gaussians_add_up_by_order() -> None:
    both = Account().plus(cost(10)).plus(gaussian(4.0, 3))
    parts = [epsilon([each], 1e-5) for each in both.spent]
    assert max(parts) < epsilon(both.of("sum"), 1e-5) < sum(parts)
    assert both.of("sum") == both.spent
    assert both.covers("sum")
    assert both.covers("device")


def test_a_device_that_trusts_nobody_counts_an_update_in_a_sum_as_if_it_was_seen_alone() -> None:
    account = Account().plus(cost(10)).plus(gaussian(4.0, 3))
    assert account.of("device") == (cost(10, honest=1), gaussian(4.0, 3))
    assert epsilon(account.of("device"), 1e-5) > epsilon(account.of("sum"), 1e-5)


@pytest.mark.parametrize(("before", "kind"), [(cost(1), "sample"), (sampled(9.0, 0.1, 1), "sum")])
def test_sums_and_samples_do_not_mix(before: Any, kind: str) -> None:
    assert not Account(spent=(before,)).covers(kind)
    assert epsilon([cost(1), sampled(9.0, 0.1, 1)], 1e-5) == math.inf


@given(
    st.lists(
        st.builds(
            SumCost,
            levels=st.sampled_from([1, 2]),
            theta=st.sampled_from([0.01, 0.1, 0.2]),
            norm=st.sampled_from([0.5, 3.0]),
            honest=st.integers(1, 3),
            steps=st.integers(1, 30),
        ),
        min_size=2,
        max_size=2,
    )
)
def test_two_sums_that_become_one_entry_cost_no_less(pair: list[SumCost]) -> None:
    one, other = pair
    joined = one.joined(other)
    assert joined.steps == one.steps + other.steps
    assert epsilon([joined], 1e-5) >= epsilon(pair, 1e-5) * (1 - 1e-9)
    same = one.joined(replace(one, norm=7.0, steps=2))
    assert epsilon([same], 1e-5) == pytest.approx(epsilon([one, replace(one, norm=7.0, steps=2)], 1e-5))


def test_ever_new_thetas_do_not_make_an_account_grow_for_good() -> None:
    account = Account()
    for version in range(80):
        account = account.plus(cost(1, theta=0.1 + version / 1000)).plus(gaussian(5.0 + version, 1))
    assert len(account.spent) == MECHANISMS_MAX
    assert sum(each.steps for each in account.spent) == 160
    exact = [cost(1, theta=0.1 + version / 1000) for version in range(0, 80, 20)]
    assert epsilon(account.of("sum"), 1e-5) > epsilon(exact, 1e-5)


def test_an_account_comes_back_from_its_text_and_one_without_sums_is_what_it_was() -> None:
    account = Account(epsilon=2.5, delta=1e-5).plus(gaussian(3.0, 2)).plus(cost(4)).plus(cost(2, honest=3))
    assert Account.loads(account.dumps()) == account
    old = '{"spent": [{"kind": "device", "noise": 3.0, "rate": 1.0, "steps": 2}], "epsilon": 1.5, "delta": 1e-05}'
    assert Account.loads(old).dumps() == old
    assert Account.loads(old).plus(cost(1)).of("sum") == (gaussian(3.0, 2), cost(1))


@pytest.mark.parametrize(
    "strange",
    [cost(10**9), cost(1, norm=1e6), cost(1, theta=5e-324), cost(1, theta=0.25, levels=20, honest=2), cost(1, 40)],
)
def test_every_cost_has_an_epsilon(strange: SumCost) -> None:
    """Whatever terms an aggregator signs: an exception would stop the device."""
    for delta in (1e-30, 1e-5, 0.1):
        assert epsilon([strange], delta) >= 0


# -- which plans and terms it follows


def test_a_plan_needs_theta_norm_epsilon_and_private_sums() -> None:
    assert Plan.from_meta(PLAN).dp_theta == THETA
    for key in ("dp_theta", "dp_norm", "dp_epsilon"):
        with pytest.raises(ProtocolError, match=f"must be above 0; set {key}"):
            Plan.from_meta({**PLAN, key: 0.0})
    with pytest.raises(ProtocolError, match="set codec to 'private'"):
        Plan.from_meta({**PLAN, "codec": "ternary"})
    with pytest.raises(ProtocolError, match=r"dp_theta is 0.26, not within 0 and 0.25"):
        Plan.from_meta({**PLAN, "dp_theta": 0.26})


def test_the_owner_may_require_this_kind() -> None:
    policy = PrivacyPolicy(kind="sum", epsilon=8.0, delta=1e-5)
    bound = policy.bound(Plan.from_meta(PLAN))
    assert isinstance(bound, Plan)
    assert bound.dp_epsilon == 8.0
    other = {"codec": "private", "dp": "device", "dp_clip": 1, "dp_noise": 1, "dp_epsilon": 1}
    assert 'its owner requires dp = "sum"' in str(policy.bound(Plan.from_meta(other)))


@pytest.mark.parametrize(
    ("plan", "changes", "accepted"),
    [
        (PLAN, {}, True),
        (PLAN, {"theta": 0.2}, False),
        (PLAN, {"norm": 5.0}, False),
        (PLAN, {"dp": "none", "theta": 0.0, "norm": 0.0}, False),
        ({"codec": "private"}, {}, False),
        ({"codec": "private"}, {"dp": "none", "theta": 0.0, "norm": 0.0}, True),
    ],
)
def test_terms_must_be_those_of_the_plan(plan: Mapping[str, Any], changes: dict[str, Any], accepted: bool) -> None:
    fault = SumPolicy(helpers=HELPERS).terms_fault(sum_terms(**changes), SCHEMA, Plan.from_meta(plan), {})
    assert (fault == "") == accepted
    assert accepted or "the terms have dp, theta and norm" in fault


def test_colluding_devices_are_not_honest_and_leave_at_least_one() -> None:
    assert SumPolicy(helpers=HELPERS, min=5, colluding=2).honest(sum_terms(min=8)) == 6
    for wrong in (-1, 5):
        with pytest.raises(ConfigError, match="--private-colluding"):
            SumPolicy(helpers=HELPERS, min=5, colluding=wrong)


# -- the command


def run(line: str) -> Any:
    return CliRunner().invoke(cli.app, ["noise", *line.split()])


def test_the_command_says_theta_and_the_noise_of_a_mean() -> None:
    found = run("--dp sum --epsilon 8 --updates 20 --devices 10 --norm 4 --elements 650")
    assert found.exit_code == 0
    lines = found.output.splitlines()
    theta = float(lines[0].removeprefix("dp_theta = "))
    assert lines[1] == "dp_norm = 4"
    assert epsilon([cost(20, 10, theta=theta)], 1e-5) <= 8 < epsilon([cost(20, 10, theta=theta * 1.02)], 1e-5)
    each = 1 / (theta * 4 * math.sqrt(80))
    assert f"mean of 10 updates, in clips: {each:.3g} in each element, {each * 650**0.5:.3g} in all 650" in lines[2]
    fewer = run("--dp sum --epsilon 8 --updates 20 --devices 10 --colluding 3 --norm 4")
    assert float(fewer.output.splitlines()[0].removeprefix("dp_theta = ")) < theta


def test_the_command_speaks_json_for_scripts_and_tells_the_noise_of_other_kinds_too() -> None:
    line = "--epsilon 8 --updates 20 --devices 10 --elements 650 --json"
    told = json.loads(run(f"--dp sum --norm 4 {line}").output)
    assert set(told) == {"dp_theta", "dp_norm", "noise_of_mean", "noise_of_mean_in_all"}
    assert told["noise_of_mean"] == pytest.approx(1 / (told["dp_theta"] * 4 * math.sqrt(80)))
    alone = json.loads(run(f"--dp device {line}").output)
    assert alone["noise_of_mean_in_all"] == pytest.approx(alone["dp_noise"] * math.sqrt(65))
    assert "noise_of_mean" not in json.loads(run("--dp device --epsilon 8 --updates 20 --json").output)


def test_the_command_says_what_no_theta_can_do() -> None:
    found = run("--dp sum --epsilon 1e-9 --updates 1000000000 --delta 1e-30 --devices 2 --norm 1e6")
    assert isinstance(found.exception, ConfigError)
    assert "no theta from 1e-06" in str(found.exception)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--devices 1", "has from 2 to 127"),
        ("--devices 128", "has from 2 to 127"),
        ("--devices 64 --levels 2", "has from 2 to 63"),
        ("--devices 5 --colluding 5", "--colluding is 5"),
        ("--devices 5 --norm 0", "--norm is 0"),
    ],
)
def test_the_command_refuses_what_is_no_sum(wrong: str, says: str) -> None:
    found = run(f"--dp sum --epsilon 8 --updates 1 {wrong}")
    assert isinstance(found.exception, ConfigError)
    assert says in str(found.exception)


# -- the device's core and its settings


def following_sums(**changes: Any) -> tuple[Any, Device, StartTraining]:
    """A device whose owner counts on one colluding device, training on version 0 by a plan with dp = "sum"."""
    terms = terms_for(ScriptedAggregator().schema, dp=SUM, theta=THETA, norm=NORM, min=7)
    pins = replace(PINS, colluding=1)
    return training(terms, plan=dict(PLAN), sums=pins, max_staleness=0, **changes)


def test_a_job_says_how_many_devices_are_honest() -> None:
    _, _, started = following_sums()
    assert started.sums is not None
    assert started.sums.honest == 6
    assert started.plan.dp == "sum"


def test_a_late_update_that_was_not_sent_is_lost_and_paid_for() -> None:
    """Its draws are noise that no other sum may have without their cost."""
    scripted, device, started = following_sums(direct_parts=0)  # it is offered first
    result = train(Learner(0.1), started)
    assert isinstance(result, events.TrainingFinished)
    device.handle(result)
    scripted.advance()
    done = device.arrive(*scripted.delta(1), scripted.head())
    (text,) = [each.text for each in done if isinstance(each, Log) and each.event == "withdrawn"]
    assert text.endswith("nothing of it was sent; its change is not sent again, since private sums keep no residual")
    assert device.disk is not None
    assert (device.disk.outstanding, device.disk.residual) == (None, None)
    assert device.disk.account.spent == (cost(1, 6),)


@pytest.mark.parametrize(("before", "kind"), [("sample", "sum"), ("sum", "sample")])
def test_a_plan_of_a_kind_that_does_not_mix_is_refused_in_words(before: str, kind: str) -> None:
    spent: Charge = sampled(9.0, 0.1, 1) if before == "sample" else cost(1)
    plan = PLAN if kind == "sum" else {"dp": "sample", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 9.0}
    about: dict[str, Any] = {"sums": PINS} if kind == "sum" else {}
    scripted = scripted_aggregator(plan=dict(plan))
    device = connected(state={"account": Account(spent=(spent,))}, **about)
    done = device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert not [each for each in done if isinstance(each, StartTraining)]
    said = f'it has dp = "{kind}", but this device has trained under dp = "{before}"'
    assert any(text.startswith(said) for text in refusals(done))


def test_the_settings_keep_the_colluding_devices() -> None:
    made = Settings(
        federation="fed", device="pi-1", broker="mqtt://localhost", aggregator_key="00" * 32, task="digits",
        helpers=HELPERS[0].hex(), private_min="5", private_colluding="2",
    )  # fmt: skip
    assert made.sums == SumPolicy(helpers=HELPERS, min=5, colluding=2)
    with pytest.raises(ConfigError, match="private_colluding is 'two'"):
        replace(made, private_colluding="two")


def test_this_kind_without_private_sums_is_refused_at_join(tmp_path: Path) -> None:
    line = ["join", str(tmp_path / "x.toml"), str(tmp_path / "d"), "--task", "digits", "--dp", "sum"]
    found = CliRunner().invoke(cli.app, [*line, "--max-epsilon", "8"])
    assert isinstance(found.exception, ConfigError)
    assert "add --private" in str(found.exception)


def test_colluding_devices_without_private_sums_are_refused_at_join(tmp_path: Path) -> None:
    line = ["join", str(tmp_path / "x.toml"), str(tmp_path / "d"), "--task", "digits", "--private-colluding", "1"]
    found = CliRunner().invoke(cli.app, line)
    assert isinstance(found.exception, ConfigError)
    assert "--private-colluding are for private sums: add --private" in str(found.exception)
