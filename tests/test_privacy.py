"""Differential privacy on the device: the noise, the accounting, what is sent, and what may never be."""

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from support.core_device import DEVICE as DEVICE_NAME
from support.core_device import DEVICE_KEY, Device, aggregator, following, only, published, trained, update_in
from support.mechanisms import gaussian, sampled
from support.scripted_aggregator import ScriptedAggregator
from support.small_world import Bench, float32_block, make_directory
from ternbus.aggregator.shell import cli as aggregator_cli
from ternbus.aggregator.store import status as statuses
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.exit_codes import EXIT_BUDGET
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Status, Update
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core import events
from ternbus.edge.core.actions import Log, Publish, Save, StartEvaluation, StartTraining, Stop
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.noise import BLOCK, RandomSource, noisy_change
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import Account, Cost, PrivacyPolicy, cost
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell import key_rotation
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.worker import train
from ternbus.edge.store.outbox import Outbox
from ternbus.edge.tasks import digits_numpy
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Scenario, Speeds
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation

Z = 1.5
CLIP = 0.25
DEVICE = {"dp": "device", "dp_clip": CLIP, "dp_noise": Z, "dp_epsilon": 50.0}
SCHEMA = Schema.of({"w": (300, 200), "b": (200,)})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(make_directory(tmp_path / "aggregator", merge__buffer_size=2, downlink__slots=4))
    made.start()
    yield made
    made.close()


def seeded(seed: int = 7) -> RandomSource:
    return RandomSource(np.random.default_rng(seed).bytes)


# -- the noise


def test_the_normal_numbers_are_normal() -> None:
    count = 2_000_001
    values = seeded().normal(count)
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert abs((values[1:] * values[:-1]).mean()) < 4 / math.sqrt(count)
    half = count // 2  # a cosine and a sine of one radius are this far apart
    assert abs((values[:half] ** 2 * values[half + 1 :] ** 2).mean() - 1) < 4 * math.sqrt(8 / half)
    for bound, share in [(1.0, 0.15866), (2.0, 0.02275), (3.0, 0.00135)]:
        assert (values > bound).mean() == pytest.approx(share, abs=4 * math.sqrt(share / count))


def test_noise_has_the_deviation_that_was_paid_for_in_every_element() -> None:
    start = np.zeros(5 * BLOCK + 17, np.float32)
    change = noisy_change(start, start, clip=CLIP, noise=Z, random_source=seeded())
    for part in (change, change[:BLOCK], change[-BLOCK - 17 :]):
        assert part.std() == pytest.approx(Z * CLIP, rel=4 / math.sqrt(2 * part.size))
        assert abs(part.mean()) < 4 * Z * CLIP / math.sqrt(part.size)
    assert len(np.unique(change[:BLOCK])) > BLOCK * 0.9  # not one block again and again
    assert not np.array_equal(change[:BLOCK], change[BLOCK : 2 * BLOCK])


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e18])
def test_no_update_is_longer_than_the_clip_before_the_noise(scale: float) -> None:
    before = (np.random.default_rng(1).normal(size=3 * BLOCK + 5) * scale).astype(np.float32)
    change = noisy_change(np.zeros_like(before), before, clip=CLIP, noise=0.0, random_source=seeded())
    length = float(np.linalg.norm(change.astype(np.float64)))
    assert length <= CLIP
    expected = min(CLIP, float(np.linalg.norm(before.astype(np.float64))))
    assert length == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(change / np.float64(length), before / np.linalg.norm(before.astype(float)), atol=1e-6)


def test_poisson_sampling_takes_each_sample_alone_with_the_same_probability() -> None:
    random_source = seeded()
    counts: npt.NDArray[np.float64] = np.zeros(50)
    sizes = []
    for _ in range(4000):
        rows = random_source.sampled(50, 0.2)
        counts[rows] += 1
        sizes.append(len(rows))
    assert np.abs(counts / 4000 - 0.2).max() < 5 * math.sqrt(0.16 / 4000)
    assert np.var(sizes) == pytest.approx(50 * 0.16, rel=0.15)
    assert len(random_source.sampled(50, 1.0)) == 50


def test_chance_is_the_operating_systems_unless_a_test_brings_its_own() -> None:
    assert RandomSource()._source is os.urandom
    assert not np.array_equal(RandomSource().uniform(8), RandomSource().uniform(8))
    assert np.array_equal(seeded().normal(8), seeded().normal(8))


# -- a training under device-level privacy


class Learner:
    """Changes each element by the same; or diverges."""

    def __init__(self, change: float, samples: int = 40, diverges: bool = False) -> None:
        self.change, self.samples, self.diverges = change, samples, diverges

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        if self.diverges:
            raise TrainingError("it diverged")
        tensors = {name: tensor + np.float32(self.change) for name, tensor in start.items()}
        return Trained(tensors=tensors, samples=self.samples, metrics={"loss": self.change, "accuracy": 0.5})

    def evaluate(self, tensors: Tensors) -> Evaluation:
        raise AssertionError


def job(plan: Mapping[str, Any], **changes: Any) -> StartTraining:
    vector = np.zeros(SCHEMA.elements, np.float32)
    fields = {"base": 3, "schema": SCHEMA, "vector": vector, "residual": None, "seed": 5, **changes}
    return StartTraining(plan=Plan.from_meta({"codec": "float32", **plan}), **fields)


def finished(
    plan: Mapping[str, Any], learner: Learner, random_source: RandomSource | None = None, **changes: Any
) -> Any:
    result = train(learner, job(plan, **changes), random_source)
    assert isinstance(result, events.TrainingFinished)
    return result


def test_what_is_sent_is_the_clipped_change_with_noise() -> None:
    result = finished(DEVICE, Learner(1.0), seeded())
    expected = CLIP / math.sqrt(SCHEMA.elements)
    value = result.block.value()
    assert value.std() == pytest.approx(Z * CLIP, rel=0.02)
    assert value.mean() == pytest.approx(expected, abs=4 * Z * CLIP / math.sqrt(SCHEMA.elements))
    assert value.mean() != 0


def test_the_ternary_block_is_made_of_the_noisy_change_alone() -> None:
    """Post-processing: two data sets that the mechanism makes equal give equal blocks."""
    plan = {**DEVICE, "codec": "ternary"}
    one, other = (finished(plan, Learner(change), seeded()) for change in (8.0, 1024.0))
    assert one.block.content == other.block.content
    bare = finished({"codec": "ternary"}, Learner(10.0))
    assert one.block.content != bare.block.content


def test_the_noise_is_never_the_jobs_seed_s() -> None:
    one, other = (finished(DEVICE, Learner(1.0)) for _ in range(2))
    assert not np.array_equal(one.block.value(), other.block.value())
    assert abs(np.corrcoef(one.block.value(), other.block.value())[0, 1]) < 0.05


def test_the_residual_of_error_feedback_is_of_the_noisy_change() -> None:
    plan = {**DEVICE, "codec": "ternary", "error_feedback": True}
    one, other = (finished(plan, Learner(change), seeded()) for change in (8.0, 1024.0))
    assert one.residual is not None
    assert np.array_equal(one.residual, other.residual)


def test_samples_and_metrics_of_the_data_do_not_depend_on_them() -> None:
    few, many = (finished(DEVICE, Learner(change, samples), seeded()) for change, samples in ((10.0, 3), (99.0, 999)))
    assert few.samples == many.samples == 1
    assert few.account == many.account
    assert few.metrics["epsilon"] == pytest.approx(epsilon([gaussian(Z, 1)], 1e-5))
    assert few.metrics["delta"] == 1e-5


def test_a_training_that_diverges_sends_noise_like_any_other() -> None:
    result = finished(DEVICE, Learner(0.0, diverges=True), seeded())
    assert result.block.value().std() == pytest.approx(Z * CLIP, rel=0.02)
    assert result.account.spent == (gaussian(Z, 1),)


def test_a_device_stops_before_the_update_that_its_budget_does_not_pay_for() -> None:
    plan = {**DEVICE, "dp_epsilon": 8.0}
    affordable = max(n for n in range(1, 50) if epsilon([gaussian(Z, n)], 1e-5) <= 8.0)
    account, epsilons = Account(), []
    for _ in range(affordable):
        result = finished(plan, Learner(1.0), account=account)
        account = result.account
        epsilons.append(result.metrics["epsilon"])
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] <= 8.0
    over = train(Learner(1.0), job(plan, account=account))
    assert isinstance(over, events.BudgetSpent)
    assert (over.base, over.budget, over.delta) == (3, 8.0, 1e-5)
    assert over.epsilon == pytest.approx(epsilon([gaussian(Z, affordable + 1)], 1e-5))


def test_an_update_that_protects_the_device_counts_for_its_samples_with_half_its_noise() -> None:
    """One sample moves it from one vector of at most the clip to another: by twice the clip."""
    account = Account().plus(gaussian(4.0, 3)).plus(sampled(1.0, 0.5, 10))
    assert account.of("sample") == (gaussian(2.0, 3), sampled(1.0, 0.5, 10))
    assert account.of("device") == (gaussian(4.0, 3),)
    both = epsilon(account.of("sample"), 1e-5)
    assert both > max(epsilon([sampled(1.0, 0.5, 10)], 1e-5), epsilon([gaussian(2.0, 3)], 1e-5))


def test_samples_that_were_protected_leave_no_bound_for_the_device() -> None:
    account = Account().plus(sampled(50.0, 0.5, 1))
    assert account.covers("sample")
    assert not account.covers("device")
    over = train(Learner(1.0), job(DEVICE, account=account))
    assert isinstance(over, events.BudgetSpent)
    assert over.epsilon == math.inf


def test_per_sample_privacy_is_refused_where_the_trainer_does_not_know_it() -> None:
    with pytest.raises(ConfigError, match="no train_privately"):
        train(Learner(1.0), job({**DEVICE, "dp": "sample", "batch_size": 4}))


def test_without_privacy_nothing_is_charged_or_told() -> None:
    result = finished({}, Learner(1.0, samples=40))
    assert result.account is None
    assert result.samples == 40
    assert "epsilon" not in result.metrics


# -- plans and owners


@pytest.mark.parametrize("missing", ["dp_clip", "dp_noise", "dp_epsilon"])
def test_a_plan_with_half_of_its_privacy_is_no_plan(missing: str) -> None:
    with pytest.raises(ProtocolError, match="must be above 0"):
        Plan.from_meta({name: value for name, value in DEVICE.items() if name != missing})


def test_an_owner_bounds_the_budget_and_refuses_less_privacy() -> None:
    plan, policy = Plan.from_meta(DEVICE), PrivacyPolicy(kind="device", epsilon=2.0, delta=1e-5)
    assert policy.bound(plan) == replace(plan, dp_epsilon=2.0)
    assert replace(policy, epsilon=90.0).bound(plan) == plan
    for refused in ({}, {**DEVICE, "dp": "sample"}, {**DEVICE, "dp_delta": 1e-4}):
        assert isinstance(policy.bound(Plan.from_meta(refused)), str)


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"kind": "none"}, "--dp"),
        ({"epsilon": 0.0}, "--max-epsilon"),
        ({"epsilon": math.nan}, "--max-epsilon"),
        ({"delta": 1.0}, "--max-delta"),
    ],
)
def test_an_owners_promise_is_one(wrong: Mapping[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option} is "):
        PrivacyPolicy(**{"kind": "device", "epsilon": 2.0, "delta": 1e-5, **wrong})


# -- what is kept, and in which order


def following_with(plan: dict[str, Any], **changes: Any) -> tuple[ScriptedAggregator, Device]:
    return following(scripted=aggregator(plan=plan), **changes)


def paid(work: StartTraining, **changes: Any) -> events.TrainingFinished:
    """A result as a training by its plan would give it."""
    if work.plan.dp == "none":
        return trained(work, **changes)
    account = replace(work.account.plus(cost(work.plan, 10)), epsilon=2.5, delta=1e-5)
    metrics = {"loss": 0.5, "epsilon": 2.5, "delta": 1e-5}
    return trained(work, account=account, metrics=metrics, **changes)


def answered(scripted: ScriptedAggregator, born: Device, outcome: str, plan: dict[str, Any]) -> StartTraining:
    """The answer to what is outstanding, a new plan, and the training that follows."""
    assert born.disk is not None
    assert born.disk.outstanding is not None
    born.arrive(scripted.receipt(DEVICE_NAME, DEVICE_KEY.key_id, born.disk.outstanding.seq, outcome))
    scripted.plan = plan
    scripted.advance()
    return only(born.arrive(*scripted.delta(scripted.version), scripted.head()), StartTraining)


def test_what_an_update_costs_is_on_disk_with_it_before_anything_of_it_is_sent() -> None:
    _, born = following_with(DEVICE)
    done = born.handle(paid(only(born.actions, StartTraining)))
    save = only(done, Save)
    assert save.state.outstanding is not None
    assert save.state.account.spent == (gaussian(Z, 1),)
    assert done.index(save) < min(place for place, action in enumerate(done) if isinstance(action, Publish))


def test_the_next_training_is_told_what_was_spent_also_after_a_power_loss() -> None:
    scripted, born = following_with(DEVICE)
    born.handle(paid(only(born.actions, StartTraining)))
    again = born.restarted()
    again.connect()
    again.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert answered(scripted, again, "accepted", dict(DEVICE)).account.spent == (gaussian(Z, 1),)


def test_the_account_and_its_update_survive_in_one_file(tmp_path: Path) -> None:
    _, born = following_with(DEVICE)
    work = only(born.actions, StartTraining)
    born.handle(paid(work, residual=np.ones(work.schema.elements, np.float32)))
    assert born.disk is not None
    with Outbox(tmp_path, DEVICE_KEY.key_id) as store:
        store.save(born.disk, None, {})
    with Outbox(tmp_path, DEVICE_KEY.key_id) as store:
        assert store.state.account == born.disk.account
        assert store.state.protected == "device"
        store.save(replace(store.state, account=Account()), None, {})
    with Outbox(tmp_path, DEVICE_KEY.key_id) as store:
        assert store.state.account == Account()


def test_a_failure_under_privacy_is_in_the_devices_own_log_only() -> None:
    _, born = following_with(DEVICE)
    done = born.handle(paid(only(born.actions, StartTraining), failure="ValueError: sample 7 is odd"))
    (log,) = [action for action in done if isinstance(action, Log) and action.event == "training-failed"]
    assert "sample 7 is odd" in log.text
    sent = [action.payload for action in done if isinstance(action, Publish)]
    assert sent
    assert not any(b"odd" in payload or b"fail" in payload for payload in sent)


@pytest.mark.parametrize(("plan", "role", "private"), [(DEVICE, "train", True), ({}, "train", False),
                                                       (DEVICE, "evaluate", False)])  # fmt: skip
def test_what_a_device_tries_on_its_own_data_is_private_under_privacy(plan: Any, role: Any, private: bool) -> None:
    _, born = following_with(dict(plan), role=role, reports=True)
    work = only(born.actions, StartEvaluation)
    assert work.private == private
    done = born.handle(events.Evaluated(version=0, samples=0, values={}, failure="ValueError: odd"))
    (log,) = [action for action in done if isinstance(action, Log) and action.event == "evaluated"]
    assert log.text.endswith("ValueError: odd")
    assert not private or not any(b"odd" in action.payload for action in done if isinstance(action, Publish))


def test_a_device_whose_budget_is_spent_says_so_and_ends_with_a_code_of_its_own() -> None:
    _, born = following_with(DEVICE)
    stop = only(born.handle(events.BudgetSpent(base=0, epsilon=8.25, budget=8.0, delta=1e-5, final=True)), Stop)
    assert stop.code == EXIT_BUDGET == 4
    assert "epsilon would be 8.25, above 8 (delta 1e-05)" in stop.reason
    assert stop.reason.endswith("; to continue, raise max_epsilon in the edge.toml of its directory and run it again")


def test_a_device_waits_for_another_plan_where_this_one_asks_for_too_much() -> None:
    """It says so once, and why it tries again; and it goes on at once when the plan is another."""
    scripted, born = following_with(DEVICE)
    asked = only(born.actions, StartTraining)
    over = events.BudgetSpent(base=0, epsilon=8.25, budget=8.0, delta=1e-5)
    (log,) = [action for action in born.handle(over) if isinstance(action, Log) and action.event == "bad-plan"]
    assert "epsilon would be 8.25, above 8 (delta 1e-05)" in log.text
    scripted.advance()
    assert not any(isinstance(action, StartTraining) for action in born.arrive(*scripted.delta(1), scripted.head()))
    born.now += 7200
    again, said = only(tried := born.handle(events.TimeReached()), StartTraining), only(tried[:-1], Log).text
    assert (again.base, again.plan) == (1, asked.plan)
    assert "on version 1 once more, as the cost may have changed; last time its privacy budget" in said
    assert not any(isinstance(action, Log | Stop) for action in born.handle(replace(over, base=1)))
    scripted.plan = {**DEVICE, "dp_noise": 100.0}
    assert only(born.arrive(scripted.head()), StartTraining).plan.dp_noise == 100


def failing(actions: list[Any]) -> list[str]:
    """What the statuses in these say of why nothing may be expected of the device."""
    return [Status.from_meta(frame.meta).failing for frame in published(actions, "status")]


def kept(device: Device) -> str:
    """What its disk says of why the device makes no update."""
    return device.disk.refusal if device.disk is not None else ""


def test_the_aggregator_is_told_by_every_status_that_the_budget_pays_for_no_update_by_this_plan() -> None:
    """So that it does not wait for one, at this version or the next; until the plan is another."""
    scripted, born = following_with(DEVICE)
    over = events.BudgetSpent(base=0, epsilon=8.25, budget=8.0, delta=1e-5)
    (told,) = failing(born.handle(over))
    assert told == (
        "its privacy budget does not pay for one more update: epsilon would be 8.25, above 8 (delta 1e-05); "
        "more noise, fewer steps or a larger dp_epsilon may do"
    )
    assert kept(born) == told
    scripted.advance()
    assert not failing(born.arrive(*scripted.delta(1), scripted.head()))
    born.now += 7200
    again = born.handle(events.TimeReached())
    assert only(again, StartTraining).base == 1
    assert failing(again) == [told]
    assert failing(born.handle(replace(over, base=1))) == [told]
    scripted.plan = {**DEVICE, "dp_noise": 100.0}
    assert failing(born.arrive(scripted.head()))[-1] == ""
    assert kept(born) == ""


def test_what_fails_later_by_the_same_plan_is_not_told_with_it() -> None:
    """The reason of a failure may have data in it, that of the budget has none."""
    _, born = following_with(DEVICE)
    (told,) = failing(born.handle(events.BudgetSpent(base=0, epsilon=8.25, budget=8.0, delta=1e-5)))
    born.now += 7200
    born.handle(events.TimeReached())
    assert failing(born.handle(events.TrainingFailed(base=0, reason="odd"))) == [told]


@pytest.mark.parametrize(("owners", "larger"), [(8.0, "max_epsilon in the device's edge.toml"), (9.0, "dp_epsilon")])
def test_the_limit_is_named_that_the_plan_meets(owners: float, larger: str) -> None:
    _, born = following_with(DEVICE, policy=PrivacyPolicy(kind="device", epsilon=owners, delta=1e-5))
    over = events.BudgetSpent(base=0, epsilon=1234.5678, budget=8.0, delta=1e-5)
    (told,) = failing(born.handle(over))
    assert told.endswith(f"or a larger {larger} may do")


def test_a_device_that_may_not_train_by_a_plan_of_another_kind_says_so_at_each_version() -> None:
    account = Account(spent=(Cost(kind="sample", noise=9.0, rate=0.1, steps=1),))
    scripted, born = following_with(DEVICE, state={"account": account})
    told = 'it has dp = "device", but this device has trained under dp = "sample"'
    assert kept(born).startswith(told)
    scripted.advance()
    assert not failing(born.arrive(*scripted.delta(1), scripted.head()))
    assert kept(born).startswith(told)


def ended_by(plan: Mapping[str, Any], account: Account, policy: PrivacyPolicy | None) -> bool:
    over = train(Learner(1.0), job(plan, account=account, policy=policy))
    assert isinstance(over, events.BudgetSpent)
    return over.final


OWNER = PrivacyPolicy(kind="device", epsilon=8.0, delta=1e-5)


@pytest.mark.parametrize("trainings", [0, 1, 3])
@pytest.mark.parametrize(
    "changes", [{"dp_noise": 0.01}, {"dp_epsilon": 1e-6}, {"dp_noise": 0.3}, {"dp_delta": 1e-30, "dp_epsilon": 2.0}]
)
def test_no_plan_ends_a_device_that_has_not_spent_its_owners_budget(changes: dict[str, Any], trainings: int) -> None:
    spent = Account().plus(gaussian(Z, trainings)) if trainings else Account()
    assert epsilon(spent.of("device"), 1e-5) < 8
    assert not ended_by({**DEVICE, "dp_epsilon": 8.0, **changes}, spent, OWNER)


def test_a_device_ends_when_its_owners_budget_pays_for_no_more_trainings_like_its_last() -> None:
    affordable = max(n for n in range(1, 50) if epsilon([gaussian(Z, n)], 1e-5) <= 8.0)
    spent = Account().plus(gaussian(Z, affordable))
    assert ended_by(DEVICE | {"dp_epsilon": 8.0}, spent, OWNER)
    assert ended_by(DEVICE | {"dp_epsilon": 1.0}, spent, OWNER)
    assert not ended_by(DEVICE | {"dp_epsilon": 8.0}, spent, None)  # the plan's budget may grow
    assert not ended_by(DEVICE | {"dp_epsilon": 8.0}, spent, replace(OWNER, epsilon=99.0))


def test_a_plan_for_the_whole_device_is_refused_after_one_for_its_samples() -> None:
    """In words, once a head; and the device goes on when the plan is the other one again."""
    scripted, born = following_with({**DEVICE, "dp": "sample"})
    born.handle(paid(only(born.actions, StartTraining)))
    assert born.disk is not None
    assert born.disk.outstanding is not None
    born.arrive(scripted.receipt(DEVICE_NAME, DEVICE_KEY.key_id, born.disk.outstanding.seq, "accepted"))
    scripted.plan = dict(DEVICE)
    scripted.advance()
    done = born.arrive(*scripted.delta(scripted.version), scripted.head())
    assert not [action for action in done if isinstance(action, StartTraining)]
    (log,) = [action for action in done if isinstance(action, Log) and action.event == "bad-plan"]
    assert 'under dp = "sample"' in log.text
    assert not [action for action in born.handle(events.TimeReached()) if isinstance(action, Log)]
    scripted.plan = {**DEVICE, "dp": "sample"}
    only(born.arrive(scripted.head()), StartTraining)


def test_a_plan_for_samples_goes_on_after_one_for_the_whole_device_and_counts_both() -> None:
    scripted, born = following_with(DEVICE)
    born.handle(paid(only(born.actions, StartTraining)))
    work = answered(scripted, born, "accepted", {**DEVICE, "dp": "sample"})
    assert work.account.of("sample") == (gaussian(Z / 2, 1),)


@pytest.mark.parametrize("seal", [False, True])
def test_only_epsilon_and_delta_are_told_of_a_private_update(seal: bool) -> None:
    _, born = following_with({**DEVICE, "seal": seal})
    frame = update_in(born.handle(paid(only(born.actions, StartTraining))))
    assert dict(Update.from_meta(frame.meta).metrics) == {"epsilon": 2.5, "delta": 1e-5}


@pytest.mark.parametrize("outcome", ["accepted", "stale"])
@pytest.mark.parametrize(("before", "kind"), [({}, "device"), (DEVICE, "sample")])
def test_a_residual_of_other_changes_enters_no_private_update(before: dict[str, Any], kind: str, outcome: str) -> None:
    """Neither what error feedback kept back nor a stale update: both would go round the noise."""
    scripted, born = following_with(before)
    work = only(born.actions, StartTraining)
    born.handle(paid(work, residual=np.ones(work.schema.elements, np.float32)))
    assert answered(scripted, born, outcome, {**DEVICE, "dp": kind}).residual is None


def test_a_residual_of_noisy_changes_enters_the_next_update() -> None:
    """It is made of what was paid for; after a power loss too."""
    scripted, born = following_with(DEVICE)
    work = only(born.actions, StartTraining)
    born.handle(paid(work, residual=np.ones(work.schema.elements, np.float32)))
    again = born.restarted()
    again.connect()
    again.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    residual = answered(scripted, again, "stale", dict(DEVICE)).residual
    assert residual is not None
    assert (residual == 2).all()


def test_an_owners_device_trains_by_no_plan_with_less_privacy() -> None:
    policy = PrivacyPolicy(kind="device", epsilon=2.0, delta=1e-5)
    _, refused = following_with({}, policy=policy)
    assert not [action for action in refused.actions if isinstance(action, StartTraining)]
    texts = [action.text for action in refused.actions if isinstance(action, Log) and action.event == "bad-plan"]
    assert texts
    assert 'its owner requires dp = "device"' in texts[0]
    _, bounded = following_with(DEVICE, policy=policy)
    assert only(bounded.actions, StartTraining).plan.dp_epsilon == 2.0


def test_what_an_owner_insists_on_outlives_the_process_and_a_new_key(tmp_path: Path) -> None:
    policy = PrivacyPolicy(kind="device", epsilon=2.0, delta=1e-6)
    invitation = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key="ab" * 32, code="c" * 32
    )
    home = DeviceDirectory(tmp_path / "pi")
    joined = home.prepare(invitation, task="digits-numpy", data=None, partition="all", policy=policy)
    home.write(replace(joined, code=""))
    assert home.settings().policy == policy
    begun = key_rotation.begin(home, replace(invitation, code="d" * 32))
    assert begun is not None
    _, renewed = begun
    assert renewed.policy == policy
    with pytest.raises(ConfigError, match="--dp is ''"):
        replace(home.settings(), dp="")


# -- a whole federation, in virtual time


def test_each_device_pays_for_its_own_updates_and_stops_by_itself() -> None:
    """Unequal speeds: the fast ones reach the budget first, and the simulation ends when the last one has."""
    affordable = 5
    budget = (epsilon([gaussian(2.0, affordable)], 1e-5) + epsilon([gaussian(2.0, affordable + 1)], 1e-5)) / 2
    wanted = Scenario(
        task="digits-numpy",
        devices=3,
        speeds=Speeds(sigma=1.5, median_s=10.0),
        plan={"dp": "device", "dp_clip": 1.0, "dp_noise": 2.0, "dp_epsilon": budget, "local_epochs": 1},
        aggregator={"merge.buffer_size": 1},
        end=End(versions=100),
    )
    simulation = Simulation(wanted, digits_numpy.TASK, Lines(io.StringIO()))
    simulation.run()
    assert isinstance(simulation.ledger, MemoryLedger)
    told: dict[str, list[float | None]] = {}
    for row in simulation.ledger.contributions:
        told.setdefault(row.device, []).append(row.epsilon)
        assert row.samples == 1
    assert len(told) == 3
    for values in told.values():
        of_so_many = [round(epsilon([gaussian(2.0, count + 1)], 1e-5), 9) for count in range(affordable)]
        found = [round(value or 0, 9) for value in values]
        assert found == sorted(found)
        assert set(found) <= set(of_so_many)  # one that was stale is missing here, and has been paid for
    assert all(sum(each.steps for each in device.state.account.spent) == affordable for device in simulation.devices)
    shown = simulation.ledger.status()["devices"]
    assert {name: row["epsilon"] for name, row in shown.items()} == {name: told[name][-1] for name in told}
    for name, row in simulation.report(0.0)["devices"].items():
        assert row["updates"] == len(told[name])
        assert row["epsilon"] == pytest.approx(of_so_many[-1])  # those that were stale are in it


def test_the_aggregators_status_shows_what_each_device_says(bench: Bench) -> None:
    open_book, quiet = bench.join("pi"), bench.join("quiet")
    for epsilon_told in (1.5, 2.5):
        block = float32_block(bench.schema, 1)
        bench.send(open_book, block, bench.version, metrics={"epsilon": epsilon_told, "delta": 1e-5})
        bench.send(quiet, block, bench.version)
        bench.tick(3600)
    found = statuses.read(bench.directory)["devices"]
    assert (found["pi"]["epsilon"], found["quiet"]["epsilon"]) == (2.5, None)
    shown = CliRunner().invoke(aggregator_cli.app, ["status", str(bench.directory)]).output
    (header,) = [line for line in shown.splitlines() if line.startswith("device ")]
    assert header.endswith("epsilon")
    assert next(line for line in shown.splitlines() if line.startswith("pi ")).endswith(" 2.5000")
