"""Hostile devices of the lab: what each kind sends, who they are, and what merge rules make of them."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hostile import ATTACKS, RULES
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.tasks.digits_numpy import TASK, NumpyTrainer
from ternbus.lab.hostile import KINDS, Behaviour, HostileTask, HostileTrainer
from ternbus.lab.processes import fleet
from ternbus.lab.report import output
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import End, Hostile, Scenario
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.simulate import Simulation

PLAN = Plan(local_steps=5)
VERSIONS = 8
SMALL = Scenario(
    task="digits-numpy",
    devices=10,
    partition="iid",
    aggregator={"merge.buffer_size": 10, "merge.max_wait_s": 1000.0},
    end=End(versions=VERSIONS),
)


def images(classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(40, 64)).astype(np.float32), rng.integers(0, classes, 40)


def hostile(behaviour: Behaviour) -> HostileTrainer:
    return HostileTrainer(NumpyTrainer(*images()), behaviour, tuple(TASK.initial(0)))


def changes(kind: str, strength: float = 1.0, *, seed: int = 5) -> tuple[Tensors, Tensors]:
    """What an honest device and a hostile one with the same data send."""
    start = TASK.initial(0)
    both = (NumpyTrainer(*images()), hostile(Behaviour(kind=kind, strength=strength)))
    trained = [each.train(start, PLAN, version=3, seed=seed).tensors for each in both]
    good, bad = ({name: tensor - start[name] for name, tensor in tensors.items()} for tensors in trained)
    return good, bad


def test_a_sign_flip_is_the_opposite_so_many_times() -> None:
    good, bad = changes("sign-flip", 3.0)
    for name, change in good.items():
        assert np.abs(change).max() > 0
        np.testing.assert_allclose(bad[name], -3 * change, rtol=1e-3, atol=1e-5)


def test_scaled_noise_is_as_large_as_said_and_nothing_else() -> None:
    good, bad = changes("scaled-noise", 10.0)
    large = good["hidden.weight"]
    size = float(np.sqrt(np.mean(large**2)))
    assert np.std(bad["hidden.weight"]) == pytest.approx(10 * size, rel=0.05)
    assert abs(np.corrcoef(large.reshape(-1), bad["hidden.weight"].reshape(-1))[0, 1]) < 0.05
    assert not np.array_equal(bad["hidden.weight"], changes("scaled-noise", 10.0, seed=6)[1]["hidden.weight"])


def test_a_label_flip_is_training_on_flipped_labels() -> None:
    """Also said with the labels themselves, which the behaviour never touches."""
    start = TASK.initial(0)
    inputs, labels = images()
    bad = hostile(Behaviour(kind="label-flip")).train(start, PLAN, version=0, seed=5)
    wrong = NumpyTrainer(inputs, 9 - labels).train(start, PLAN, version=0, seed=5)
    right = NumpyTrainer(inputs, labels).train(start, PLAN, version=0, seed=5)
    for name, tensor in wrong.tensors.items():
        np.testing.assert_allclose(bad.tensors[name], tensor, rtol=1e-3, atol=1e-5)
    assert np.abs(right.tensors["output.bias"] - wrong.tensors["output.bias"]).max() > 1e-3


def test_a_free_rider_sends_no_change_and_claims_what_it_likes() -> None:
    _, bad = changes("free-rider")
    assert all(not change.any() for change in bad.values())
    rider = hostile(Behaviour(kind="free-rider", samples=10**6))
    assert rider.samples == rider.train(TASK.initial(0), PLAN, version=0, seed=1).samples == 10**6


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_device_started_from_stays_as_it_is(kind: str) -> None:
    start = TASK.initial(0)
    for tensor in start.values():
        tensor.flags.writeable = False
    hostile(Behaviour(kind=kind)).train(start, PLAN, version=0, seed=1)
    assert all(np.array_equal(tensor, TASK.initial(0)[name]) for name, tensor in start.items())


def test_the_classes_are_found_in_whatever_order_tensors_come() -> None:
    """A file of tensors sorts them by name; the model's own order is what counts."""
    start = TASK.initial(0)
    behaviour = Behaviour(kind="label-flip")
    ways = [
        hostile(behaviour).train(dict(order), PLAN, version=0, seed=5).tensors
        for order in (start.items(), sorted(start.items()))
    ]
    assert all(np.array_equal(ways[0][name], ways[1][name]) for name in start)


@pytest.mark.parametrize("shapes", [{"w": (3, 4)}, {"w": (3, 4), "b": (4,)}, {"w": (3, 4), "v": (3, 4)}])
def test_labels_are_flipped_only_where_there_are_classes(shapes: dict[str, tuple[int, ...]]) -> None:
    trainer = HostileTrainer(NumpyTrainer(*images()), Behaviour(kind="label-flip"), tuple(shapes))
    with pytest.raises(ConfigError, match="last two tensors"):
        trainer.train({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, PLAN, version=0, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_gets_its_behaviour_with_the_task_s_name(kind: str) -> None:
    behaviour = Behaviour(kind=kind, strength=2.5, samples=7)
    task = load_task(behaviour.spec("ternbus.edge.tasks.digits_numpy:TASK"))
    assert isinstance(task, HostileTask)
    assert (task.behaviour, task.honest, task.name) == (behaviour, TASK, "digits-numpy")
    trainer = task.trainer(data=None, partition="iid:0/100")
    assert isinstance(trainer, HostileTrainer)
    assert isinstance(task.evaluator(data=None), NumpyTrainer)
    with pytest.raises(ConfigError):
        load_task("ternbus.lab.hostile:helpful/1.0/0/digits")


# --- scenario


def test_the_scenario_s_keys(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(
        'devices = 10\n[[hostile]]\nkind = "sign-flip"\n'
        '[[hostile]]\nkind = "free-rider"\nshare = 0.1\nsamples = 9\n'
        '[[hostile]]\nkind = "scaled-noise"\nshare = 0.1\nstrength = 4\n'
    )
    found = scenario.load(file)
    assert found.hostile == (
        Hostile(kind="sign-flip"),
        Hostile(kind="free-rider", share=0.1, samples=9),
        Hostile(kind="scaled-noise", share=0.1, strength=4.0),
    )
    assert sorted(behaviour.kind for behaviour in found.behaviours.values()) == [
        "free-rider",
        "scaled-noise",
        "sign-flip",
        "sign-flip",
    ]


def test_the_seed_draws_who_is_hostile() -> None:
    one = Scenario(devices=20, hostile=(Hostile(kind="sign-flip"),))
    again = replace(one, hostile=(Hostile(kind="label-flip"),))
    assert list(one.behaviours) == list(again.behaviours)
    assert len(one.behaviours) == 4
    assert {tuple(replace(one, seed=seed).behaviours) for seed in range(5)} != {tuple(one.behaviours)}
    assert Scenario().behaviours == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[hostile]]\nkind = "rude"', "choose one of sign-flip, scaled-noise, label-flip, free-rider"),
        ("[[hostile]]\nshare = 0.5", "needs the key kind"),
        ('[[hostile]]\nkind = "sign-flip"\nshare = 1.5', "hostile.share is 1.5"),
        ('[[hostile]]\nkind = "sign-flip"\nstrength = -1', "hostile.strength is -1"),
        ('[[hostile]]\nkind = "sign-flip"\nsamples = 4294967296', "hostile.samples"),
        ('[[hostile]]\nkind = "sign-flip"\nforce = 2', "unknown key 'hostile.force'"),
        (
            '[[hostile]]\nkind = "sign-flip"\nshare = 0.6\n[[hostile]]\nkind = "free-rider"\nshare = 0.6',
            "sum of the shares is above 1",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "scenario.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        scenario.load(tmp_path / "scenario.toml")


def test_processes_are_told_who_is_hostile(tmp_path: Path) -> None:
    wanted = replace(SMALL, hostile=(Hostile(kind="sign-flip", share=0.3),))
    tasks = []
    place = output.claim(tmp_path / "out")
    for index in range(wanted.devices):
        _, arguments = fleet.device(wanted, place, index, f"device-{index}", 1.0)
        tasks.append(arguments[arguments.index("--task") + 1])
    place.release()
    assert [number for number, task in enumerate(tasks) if task != "digits-numpy"] == list(wanted.behaviours)
    assert set(tasks) == {"digits-numpy", "ternbus.lab.hostile:sign-flip/5.0/0/digits-numpy"}


# --- what comes of it


def accuracy(harm: tuple[Hostile, ...], **aggregator: object) -> float:
    settings = {**SMALL.aggregator, **{f"merge.{key}": value for key, value in aggregator.items()}}
    once = Simulated(evaluate_every=VERSIONS)
    wanted = replace(SMALL, hostile=harm, aggregator=settings, simulate=once)
    simulation = Simulation(wanted, load_task(SMALL.task), Lines(io.StringIO()))
    simulation.run()
    found = simulation.moment().last.accuracy
    assert found is not None
    return found


def test_a_fifth_of_hostile_devices_ruins_a_mean_and_not_a_robust_rule() -> None:
    flips = (Hostile(kind="sign-flip"),)
    assert accuracy(()) > 0.85
    assert accuracy(flips, influence_bound="none") < 0.5
    for rule in ("median", "trimmed-mean", "multi-krum", "norm-clip"):
        assert accuracy(flips, rule=rule, trim=0.2, byzantine=2) > 0.75, rule


def test_a_false_number_of_samples_ruins_a_mean_and_not_one_with_a_cap() -> None:
    boasters = (Hostile(kind="sign-flip", strength=1.0, samples=2**32 - 1, share=0.1),)
    assert accuracy(boasters, influence_bound="none") < 0.5
    assert accuracy(boasters, max_share=0.1) > 0.75


def test_the_default_bound_on_influence_softens_both() -> None:
    """It acts after two of these versions, and bounds size, not direction: a rule is still better."""
    for harm in (Hostile(kind="sign-flip"), Hostile(kind="sign-flip", strength=1.0, samples=2**32 - 1, share=0.1)):
        assert accuracy((harm,)) > accuracy((harm,), influence_bound="none") + 0.2


def test_a_model_that_diverged_is_reported_by_what_is_a_number() -> None:
    evaluator = NumpyTrainer(*images())
    broken = {name: np.full(tensor.shape, 1e38, np.float32) for name, tensor in TASK.initial(0).items()}
    with np.errstate(all="ignore"):
        found = evaluator.evaluate(broken)
    assert not np.isfinite(found.values["loss"])
    assert set(found.finite) == {"accuracy"}


def test_the_benchmark_s_rules_and_attacks_are_ones() -> None:
    assert {kind for attack in ATTACKS.values() for kind in (each.kind for each in attack)} == set(KINDS)
    for rule in RULES.values():
        Scenario(aggregator={"merge.buffer_size": 10, **rule})
