"""Under differential privacy a release is always made, finite and noisy, whatever aggregator, plan and data do.

Each attack here was tried on a device of before: it learned, without noise, whether one sample was there.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import WEIGHT_MAX, Schema, Vector, flush_tiny
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartEvaluation, StartFineTuning, StartTraining
from ternbus.edge.learn.noise import RandomSource, clipped_change, noisy_change
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import Cost
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import Worker, evaluate, fine_tune, train
from ternbus.edge.tasks import digits_numpy

CLIP, Z = 0.25, 1.5
SCHEMA = Schema.of({"w": (60, 20), "b": (20,), "bn.running_var": (20,)})
KINDS: dict[str, dict[str, Any]] = {
    "device": {"dp": "device", "dp_clip": CLIP, "dp_noise": Z, "dp_epsilon": 50.0},
    "sample": {"dp": "sample", "dp_clip": CLIP, "dp_noise": Z, "dp_epsilon": 50.0, "batch_size": 4, "local_steps": 3},
}
CODECS = [("float32", False), ("float32", True), ("ternary", False), ("ternary", True)]


def seeded(seed: int = 7) -> RandomSource:
    return RandomSource(np.random.default_rng(seed).bytes)


class Scripted:
    """Whose tensors are what a function makes of those it starts from; it may raise, in both kinds of training."""

    samples = 20

    def __init__(self, makes: Callable[[Tensors], Any]) -> None:
        self.makes = makes

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        with np.errstate(all="ignore"):
            return Trained(tensors=self.makes(start), samples=self.samples, metrics={"loss": math.nan, "steps": 3})

    def train_privately(
        self, start: Tensors, plan: Plan, *, version: int, seed: int, random_source: RandomSource
    ) -> Trained:
        return self.train(start, plan, version=version, seed=seed)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        self.makes(tensors)
        return Evaluation(samples=self.samples, values={"accuracy": 0.5, "loss": math.nan})


def job(plan: dict[str, Any], vector: Vector | None = None, **changes: Any) -> StartTraining:
    vector = np.zeros(SCHEMA.elements, np.float32) if vector is None else vector
    fields = {"base": 3, "schema": SCHEMA, "vector": vector, "residual": None, "seed": 5, **changes}
    return StartTraining(plan=Plan.from_meta(plan), **fields)


def released(makes: Callable[[Tensors], Any], work: StartTraining, seed: int = 7) -> events.TrainingFinished:
    """By the real worker's function; what is sent must be a block that the aggregator takes."""
    result = train(Scripted(makes), work, seeded(seed))
    assert isinstance(result, events.TrainingFinished)
    block = Block.read(SCHEMA, result.block.codec, "raw", result.block.content)
    assert np.isfinite(block.value()).all()
    assert result.residual is None or np.isfinite(result.residual).all()
    assert result.account is not None
    return result


def raising(error: Exception) -> Callable[[Tensors], Any]:
    def makes(start: Tensors) -> Any:
        raise error

    return makes


def plus(value: float) -> Callable[[Tensors], Any]:
    return lambda start: {name: tensor + np.float32(value) for name, tensor in start.items()}


ODD = f"a bug in the task: {Path(__file__).name}, line {raising.__code__.co_firstlineno + 2}: ValueError: odd"


# -- the attacks


@pytest.mark.parametrize(("codec", "feedback"), CODECS)
def test_a_change_that_overflows_is_noise_like_any_other(codec: str, feedback: bool) -> None:
    """From weights near float32's end to the other end: infinite in float32; the clip was then 0 times infinity."""
    start = np.full(SCHEMA.elements, 3e38, np.float32)
    plan = {**KINDS["device"], "codec": codec, "error_feedback": feedback}
    with_sample = released(lambda tensors: {name: -tensor for name, tensor in tensors.items()}, job(plan, start))
    without = released(dict, job(plan, start))
    assert with_sample.account == without.account
    assert (with_sample.samples, set(with_sample.metrics) & {"epsilon", "delta"}) == (1, {"epsilon", "delta"})
    if codec == "float32":
        weights = slice(0, 1220)
        difference = with_sample.block.value()[weights] - without.block.value()[weights]
        assert np.linalg.norm(difference.astype(float)) <= CLIP * (1 + 1e-6)  # the same noise in both
        assert without.block.value()[weights].std() == pytest.approx(Z * CLIP, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("codec", "feedback"), CODECS)
@pytest.mark.parametrize(
    "makes",
    [
        raising(TrainingError("diverged")),
        raising(ValueError("sample 7 has no label")),
        raising(ZeroDivisionError()),
        raising(FloatingPointError()),
        plus(math.nan),
        plus(math.inf),
        plus(3e38),
        lambda start: {name: np.full(tensor.shape, 1e300) for name, tensor in start.items()},
    ],
    ids=["diverged", "value", "division", "floating", "nan", "inf", "huge", "float64"],
)
def test_whether_a_training_fails_is_not_seen(
    kind: str, codec: str, feedback: bool, makes: Callable[[Tensors], Any]
) -> None:
    plan = {**KINDS[kind], "codec": codec, "error_feedback": feedback}
    failed, well = released(makes, job(plan)), released(plus(1e-3), job(plan))
    assert (failed.base, failed.samples, failed.account) == (well.base, well.samples, well.account)
    assert {failed.metrics[name] == well.metrics[name] for name in ("epsilon", "delta")} == {True}
    assert failed.block.value().any()
    assert len(failed.block.content) == len(well.block.content)
    again = released(makes, job(plan), seed=8)
    if kind == "device":
        assert failed.block.content != again.block.content  # noise, and not one answer


def test_what_is_released_for_a_failed_training_by_samples_is_the_noise_of_its_steps() -> None:
    plan = {**KINDS["sample"], "codec": "float32", "learning_rate": 0.5}
    value = released(raising(ValueError("odd")), job(plan)).block.value()[:1220]
    assert value.std() == pytest.approx(0.5 * math.sqrt(3) * Z * CLIP / 4, rel=0.1)


def test_why_it_failed_is_in_the_result_for_the_devices_own_log() -> None:
    assert released(raising(ValueError("odd")), job(KINDS["device"])).failure == ODD
    assert released(plus(1.0), job(KINDS["device"])).failure == ""


def test_a_task_that_does_not_suit_the_plan_still_says_so() -> None:
    with pytest.raises(ConfigError, match="mend it"):
        train(Scripted(raising(ConfigError("mend it"))), job(KINDS["device"]), seeded())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("codec", "feedback"), CODECS)
def test_an_old_residual_that_is_not_finite_stops_no_release(kind: str, codec: str, feedback: bool) -> None:
    residual = np.full(SCHEMA.elements, 3e38, np.float32)
    residual[:9] = [math.nan, math.inf, -math.inf] * 3
    released(plus(1.0), job({**KINDS[kind], "codec": codec, "error_feedback": feedback}, residual=residual))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_batch_norm_do_not_travel(kind: str) -> None:
    value = released(plus(1.0), job({**KINDS[kind], "codec": "float32"})).block.value()
    assert not value[-20:].any()
    assert value[:-20].all()


@pytest.mark.parametrize("fails", ["train", "evaluate"])
def test_what_a_device_tries_for_itself_does_not_end_it_under_privacy(fails: str) -> None:
    """The process would end, and its status with it."""
    bad, good = Scripted(raising(ValueError("odd"))), Scripted(plus(0.0))
    vector, trained = np.zeros(SCHEMA.elements, np.float32), {"train": (bad, good), "evaluate": (good, bad)}[fails]
    plan = Plan.from_meta(KINDS["device"])
    own = StartFineTuning(version=3, schema=SCHEMA, vector=vector, plan=plan, seed=1)
    failed = fine_tune(*trained, own)
    assert isinstance(failed, events.FineTuningFailed)
    assert failed.reason == ODD
    work = StartEvaluation(version=3, schema=SCHEMA, vector=vector, private=True)
    assert evaluate(bad, work) == events.Evaluated(version=3, samples=0, values={}, failure=ODD)
    public = evaluate(bad, StartEvaluation(version=3, schema=SCHEMA, vector=vector))
    assert isinstance(public, events.EvaluationFailed)
    assert public.reason == ODD


@pytest.mark.parametrize("makes", [plus(0.0), raising(ValueError("odd"))])
def test_the_owners_shortest_time_holds_for_a_training_that_fails_too(makes: Callable[[Tensors], Any]) -> None:
    """By the thread of a real device."""
    worker = Worker(Scripted(makes), lambda _: None, min_seconds=0.25)
    began = time.monotonic()
    assert isinstance(worker._perform(job(KINDS["device"])), events.TrainingFinished)
    assert time.monotonic() - began >= 0.25


# -- any vectors, any plans

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 5e-324, 1e-45, -1e-40, 2.0**-126, 1.0, 65_504.0, WEIGHT_MAX, -WEIGHT_MAX, 3.4e38]),
    st.sampled_from([-3.4e38, math.inf, -math.inf, math.nan]),
    st.floats(width=32),
)
BOUNDED = FLOATS.filter(lambda value: abs(value) <= WEIGHT_MAX)


def vectors(elements: st.SearchStrategy[float], size: int) -> st.SearchStrategy[Vector]:
    """Of `size` elements, a few values over and over, where most would be too slow to draw."""
    few = st.lists(elements, min_size=1, max_size=12)
    return few.map(lambda values: np.resize(np.array(values, np.float32), size))


@given(
    start=vectors(BOUNDED, 97),
    one=vectors(FLOATS, 97),
    clip=st.one_of(st.sampled_from([5e-324, 1e-300, 1e6]), st.floats(1e-12, 1e6)),
    seed=st.integers(0, 2**16),
)
def test_no_change_is_longer_than_the_clip_and_every_release_is_finite(
    start: Vector, one: Vector, clip: float, seed: int
) -> None:
    clipped = np.concatenate([part for _, part in clipped_change(start, one, clip)])
    assert np.isfinite(clipped).all()
    assert math.sqrt(math.fsum(np.square(clipped))) <= clip
    for noise in (1e-3, 1.0, 1e6):
        made = noisy_change(start, one, clip=clip, noise=noise, random_source=seeded(seed))
        assert made.dtype == np.float32
        assert np.isfinite(made).all()


PLANS = st.fixed_dictionaries(
    {
        "codec": st.sampled_from(["float32", "ternary"]),
        "error_feedback": st.booleans(),
        "dp_clip": st.sampled_from([1e-300, 1e-6, 1.0, 1e6]),
        "dp_noise": st.sampled_from([0.5, 1e3, 1e6]),
        "learning_rate": st.sampled_from([0.0, 1e-3, 1e3]),
        "clip_sigma": st.sampled_from([0.0, 2.5, 1e6]),
    }
)


@settings(deadline=None)
@given(
    start=vectors(BOUNDED, SCHEMA.elements),
    end=vectors(FLOATS, SCHEMA.elements),
    kind=st.sampled_from(sorted(KINDS)),
    asked=PLANS,
)
def test_a_release_is_always_made(start: Vector, end: Vector, kind: str, asked: dict[str, Any]) -> None:
    """Three trainings one after the other, so that residuals and accounts go through; whatever the trainer makes."""
    flush_tiny(start)
    plan = {**KINDS[kind], **asked, "dp_epsilon": 1e6}
    ends = iter(np.split(end, np.cumsum([segment.stop - segment.start for segment in SCHEMA.segments])[:-1]) * 3)

    def makes(tensors: Tensors) -> Any:
        return {name: next(ends).reshape(tensor.shape) for name, tensor in tensors.items()}

    residual, account = None, job(plan).account
    for _ in range(3):
        result = released(makes, job(plan, start, residual=residual, account=account))
        assert result.account is not None
        assert result.samples == (1 if kind == "device" else Scripted.samples)
        residual, account = result.residual, result.account
    assert sum(cost.steps for cost in account.spent) == (3 if kind == "device" else 9)


# -- a real task under a hostile plan


def test_a_real_trainer_under_a_hostile_plan_and_model_always_releases(tmp_path: Path) -> None:
    """digits-numpy, from a model at the bound, with the largest rates that a plan may have."""
    task = digits_numpy.TASK
    trainer = task.trainer(data=None, partition="iid:0/8")
    schema = Schema.of({name: tensor.shape for name, tensor in task.initial(0).items()})
    for codec, feedback in CODECS:
        for value in (WEIGHT_MAX, -WEIGHT_MAX, 1.0):
            plan = Plan.from_meta({
                **KINDS["device"], "codec": codec, "error_feedback": feedback, "learning_rate": 1e3, "momentum": 1.0,
                "weight_decay": 1e3, "proximal_mu": 1e6, "local_steps": 20,
            })  # fmt: skip
            vector = np.full(schema.elements, value, np.float32)
            vector.setflags(write=False)
            work = StartTraining(base=1, schema=schema, vector=vector, residual=None, plan=plan, seed=1)
            result = train(trainer, work)
            assert isinstance(result, events.TrainingFinished)
            assert result.account is not None
            assert result.account.spent == (Cost(kind="device", noise=Z, rate=1.0, steps=1),)
            assert np.isfinite(result.block.value()).all()
            assert result.block.value().any()
