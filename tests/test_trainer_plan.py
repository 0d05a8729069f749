"""A plan from the wire is valid or a ProtocolError; steps and batches are what it says; tasks are found by name."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import plan_keys
from ternbus.edge.learn.task import Trained, TrainingError
from ternbus.edge.learn.task_loader import BUILT_IN_TASKS, load_task
from ternbus.edge.plan.plan import Plan

anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
keys = st.sampled_from([*Plan.__slots__]) | st.text(max_size=5)


def test_an_empty_plan_is_the_defaults() -> None:
    plan = Plan.from_meta({})
    assert plan == Plan()
    assert (plan.clip_sigma, plan.codec, plan.local_steps, plan.error_feedback) == (2.5, "ternary", None, False)


def test_every_key_of_the_protocol_is_taken_and_an_unknown_one_kept_for_the_trainer() -> None:
    meta = {
        "local_epochs": 3, "local_steps": 7, "batch_size": 16, "learning_rate": 0.1, "momentum": 0.5,
        "weight_decay": 1e-4, "proximal_mu": 0.01,
        "clip_sigma": 0, "codec": "float32", "seal": True, "seed": 9, "error_feedback": True,
        "local_seconds": 2.5, "optimizer": "adamw", "beta1": 0.8, "beta2": 0.99, "schedule": "cosine",
        "warmup_versions": 3, "schedule_versions": 9, "final_rate": 0.1, "statistics_rate": 0.5, "precision": "auto",
        "memory_format": "channels-last", "participation": 0.25, "turn_s": 7.5, "flavour": "vanilla", "extra": 1,
        "nesterov": True, "rmsprop_alpha": 0.9, "grad_clip": 5.0, "step_schedule": "linear", "warmup_steps": 2,
        "final_step_rate": 0.2, "device": "cuda:1", "evaluation_batch_size": 64,
    }  # fmt: skip
    plan = Plan.from_meta(meta)
    for name, value in meta.items():
        if name not in ("flavour", "extra"):
            assert getattr(plan, name) == value
    assert plan.extra == {"flavour": "vanilla", "extra": 1}


def test_every_key_has_a_field_and_a_default_within_its_bounds() -> None:
    names = {entry.name for entry in fields(Plan)} - {
        "extra",
        "steps_max",
        "width",
    }  # the owner's limit, and an arm's width, are no keys
    assert names == set(plan_keys.KEYS)
    assert not set(plan_keys.SHARED) & set(plan_keys.OWN)
    assert [name for name, key in plan_keys.KEYS.items() if key.fault(getattr(Plan(), name))] == []


@pytest.mark.parametrize("name", [name for name, key in plan_keys.KEYS.items() if isinstance(key, plan_keys.Number)])
def test_the_bounds_of_a_number_are_within_it(name: str) -> None:
    key = plan_keys.KEYS[name]
    assert isinstance(key, plan_keys.Number)
    for bound in (key.low, key.high):
        whole = int(bound) if key.whole else bound
        assert getattr(Plan.from_meta({name: whole}), name) == whole
    beyond = (int(key.low) - 1, int(key.high) + 1) if key.whole else (key.low - 1, math.nextafter(key.high, math.inf))
    for value in beyond:
        with pytest.raises(ProtocolError, match=f"{name} is .*, not within"):
            Plan.from_meta({name: value})


@given(st.dictionaries(keys, anything, max_size=4))
def test_whatever_comes_from_the_wire_is_a_plan_or_a_protocol_error(meta: Mapping[str, object]) -> None:
    try:
        plan = Plan.from_meta(meta)
    except ProtocolError:
        return
    assert plan.steps(100) >= 1
    assert math.isfinite(plan.learning_rate)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("local_epochs", -1), ("local_epochs", math.nan), ("local_epochs", True), ("local_epochs", "2"),
        ("local_epochs", None),
        ("local_steps", 0), ("local_steps", 1.5), ("batch_size", 0), ("batch_size", 2.0), ("learning_rate", math.inf),
        ("momentum", 1.1), ("weight_decay", -1e-9), ("clip_sigma", -1), ("codec", "zip"), ("codec", None), ("seal", 1),
        ("error_feedback", "no"), ("seed", 2**64), ("seed", 0.5), ("local_seconds", -1), ("local_seconds", "1"),
        ("optimizer", "lion"), ("optimizer", ["sgd"]), ("beta1", 1.0), ("beta2", 1), ("schedule", "step"),
        ("schedule", None), ("warmup_versions", 1.5), ("warmup_versions", -1), ("schedule_versions", True),
        ("final_rate", 1.1), ("statistics_rate", -1), ("precision", "float16"), ("memory_format", 1),
        ("nesterov", 1), ("rmsprop_alpha", 1), ("grad_clip", -1), ("grad_clip", math.inf), ("step_schedule", "step"),
        ("warmup_steps", -1), ("final_step_rate", 2), ("evaluation_batch_size", 0), ("evaluation_batch_size", 1.5),
        ("device", "gpu"), ("device", "cuda:"), ("device", "cuda:01"), ("device", "cuda:1\n"), ("device", 0),
        ("participation", 0), ("participation", 1.01), ("participation", "all"), ("turn_s", 0), ("turn_s", math.inf),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=name) as caught:
        Plan.from_meta({name: value})
    assert caught.value.reason == "bad-plan"


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_a_device_is_named_as_in_torch(device: str) -> None:
    assert Plan(device=device).device == device


@given(st.dictionaries(keys, anything, max_size=4))
def test_whoever_writes_a_plan_finds_exactly_the_fault_that_a_device_finds(meta: Mapping[str, object]) -> None:
    known = {name: value for name, value in meta.items() if name in plan_keys.KEYS}
    try:
        Plan.from_meta(known)
    except ProtocolError as error:
        assert str(error).endswith(plan_keys.fault(known) or "none")
    else:
        assert plan_keys.fault(known) is None


def test_a_plan_that_says_its_defaults_has_no_fault() -> None:
    assert plan_keys.fault({name: getattr(Plan(), name) for name in plan_keys.KEYS}) is None


@pytest.mark.parametrize(
    ("name", "closest"),
    [("learning_rat", "learning_rate"), ("gradclip", "grad_clip"), ("flavor", "flavour"), ("zzz", "")],
)
def test_an_unknown_key_is_named_with_the_closest_known_one(name: str, closest: str) -> None:
    (found,) = plan_keys.unknown({"momentum": 0.5, "flavour": 1, name: 1}, ["flavour"])
    meant = f": do you mean {closest}?" if closest else "."
    assert found == f"{name} is an unknown key{meant}"
    assert plan_keys.unknown({"momentum": 0.5, "flavour": 1}, ["flavour"]) == []


def test_a_schedule_without_an_end_is_refused() -> None:
    for schedule in ("linear", "cosine"):
        with pytest.raises(ProtocolError, match=r"schedule_versions is 3: .* must end after the warm-up"):
            Plan(schedule=schedule, warmup_versions=3, schedule_versions=3)
    assert Plan(warmup_versions=3).rate(1) == pytest.approx(0.05 * 2 / 3)


def test_steps_count_epochs_of_batches_unless_they_are_given() -> None:
    assert Plan(local_epochs=2, batch_size=10).steps(100) == 20
    assert Plan(local_epochs=0.25, batch_size=10).steps(100) == 2
    assert Plan(local_epochs=0, batch_size=10).steps(100) == 1
    assert Plan(local_epochs=2, batch_size=1000).steps(3) == 2
    assert Plan(local_epochs=2, local_steps=5, batch_size=10).steps(100) == 5


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 20))
def test_batches_are_full_and_take_every_sample_once_before_any_twice(samples: int, size: int, steps: int) -> None:
    plan = Plan(local_steps=steps, batch_size=size)
    batches = list(plan.batches(samples, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [min(size, samples)] * steps
    counts = np.bincount(np.concatenate(batches), minlength=samples)
    whole, begun = divmod(steps * min(size, samples), samples)
    if samples % min(size, samples) == 0:
        assert counts.max() - counts.min() <= (begun > 0)
    assert counts.max() <= whole + 2


def test_batches_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [batch.tolist() for batch in Plan(batch_size=7).batches(50, np.random.default_rng(seed))]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_diverged_is_never_handed_on(bad: float) -> None:
    with pytest.raises(TrainingError, match="w is not finite"):
        Trained(tensors={"w": np.array([1, bad], np.float32)}, samples=1, metrics={})


def test_the_built_in_tasks_are_named_when_another_is_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        load_task("mnist")
    assert all(name in str(caught.value) for name in BUILT_IN_TASKS)
    assert "MODULE:ATTRIBUTE" in str(caught.value)


def test_a_task_of_ones_own_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_task.py").write_text("from ternbus.edge.tasks.digits_numpy import TASK as MINE\nNOT = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert load_task("my_own_task:MINE").name == "digits-numpy"
    for spec, says in [
        ("my_own_task:NOT", "is not a task"),
        ("my_own_task:NONE", "has no 'NONE'"),
        ("no_such:T", "no module"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load_task(spec)


@pytest.mark.parametrize("value", ["x" * 10_000, ["x"] * 10_000], ids=["text", "list"])
def test_a_fault_is_a_line_whatever_length_its_value_has(value: object) -> None:
    """It is logged by each device that does not train by the plan."""
    said = plan_keys.fault({"codec": value})
    assert said is not None
    assert said.startswith("codec is ")
    assert len(said) < 200
