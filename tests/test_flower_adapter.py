"""Flower's clients as tasks: what they are told, what travels, and their faults in words."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.simulated import simulated
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.adapters import Context, FlowerTask
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.task import TrainingError, halves_of
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import check
from ternbus.edge.shell.worker import train
from ternbus.edge.tasks.digits_data import load
from ternbus.lab.scenario.resolve import settled
from ternbus.lab.scenario.scenario import Local, Scenario

EXAMPLE = f"{Path(__file__).parent.parent}/examples/flower_task.py:TASK"


class Client:
    """Two layers, a counter and statistics, as of a `state_dict`; a training adds one to everything."""

    def __init__(self, context: Context | None = None) -> None:
        self.context = context
        self.drawn = np.random.rand(3)  # noqa: NPY002 - as users' code does
        self.configs: list[dict[str, Any]] = []
        self.given: list[list[Any]] = []

    def get_parameters(self, config: dict[str, Any]) -> list[Any]:
        return [self.drawn.astype(np.float32), np.ones((2, 2)), np.zeros(2, np.float32), np.array(7)]

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[Any, Any, Any]:
        self.configs.append(config)
        self.given.append([np.copy(one) for one in parameters])
        for array in parameters:
            array += 1  # noqa: PLW2901 - in place, which must not reach the version
        return parameters, 20, {"loss": 0.5, "note": "text", "nan": float("nan")}

    def evaluate(self, parameters: list[Any], config: dict[str, Any]) -> tuple[Any, Any, Any]:
        return 0.25, 5, {"accuracy": np.float32(0.5)}


NAMES = ["weight", "bias", "norm.running_mean", "norm.num_batches_tracked"]


def task_of(client: Callable[[Context], Any] = Client, **fields: Any) -> FlowerTask:
    return FlowerTask(name="mine", client_fn=client, **fields)


def plan(**keys: object) -> Plan:
    return Plan.from_meta(keys)


def test_a_client_gets_its_part_the_folder_of_the_data_and_the_task_s_own_config(tmp_path: Any) -> None:
    made: list[Context] = []

    def client_fn(context: Context) -> Client:
        made.append(context)
        return Client(context)

    task = task_of(client_fn, run_config={"width": 3})
    task.trainer(data=tmp_path, partition="iid:2/5")
    task.trainer(data=None, partition="all")
    assert dict(made[0].node_config) == {"partition-id": 2, "num-partitions": 5, "data": str(tmp_path)}
    assert dict(made[1].node_config) == {"partition-id": 0, "num-partitions": 1}
    assert made[0].run_config == {"width": 3}


@pytest.mark.parametrize("partition", ["dirichlet:0.5:0/8:0", "natural:3"])
def test_a_part_that_a_number_does_not_name_is_refused(partition: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--partition {partition}: a Flower client divides its data itself.*write iid:I/N or all"
    ):
        task_of().trainer(data=None, partition=partition)


def test_the_lab_falls_back_to_equal_parts_and_says_so() -> None:
    found = settled(Scenario(task="mine"), task_of())
    assert found.scenario.partition == "iid"
    assert found.lines == ['partition = "iid": a Flower client divides its data itself, as part I of N']


def test_the_plan_is_told_as_flower_tells_it() -> None:
    client = Client()
    task = task_of(lambda context: client, on_fit_config_fn=lambda server_round: {"mine": 10 * server_round})
    asked = plan(learning_rate=0.5, local_epochs=3, batch_size=8, local_steps=4, note="text", own=[1])
    task.trainer(data=None, partition="all").train(task.initial(0), asked, version=4, seed=2**40 + 3)
    config = client.configs[-1]
    expected = {"server_round": 5, "lr": 0.5, "local_epochs": 3, "batch_size": 8, "local_steps": 4, "seed": 3}
    assert expected.items() <= config.items()
    assert config["mine"] == 50
    assert config["note"] == "text"
    assert "own" not in config  # Flower's configs have scalars only
    assert "local_seconds" not in config


def test_no_key_of_the_aggregator_s_takes_the_place_of_the_owner_s_limits() -> None:
    client = Client()
    task = task_of(lambda context: client)
    asked = TrainingLimits(seconds=5.0, steps=7).bound(plan(max_steps=10**9, seed=1, lr="x", server_round=-1))
    task.trainer(data=None, partition="all").train(task.initial(0), asked, version=4, seed=3)
    config = client.configs[-1]
    assert (config["max_steps"], config["local_seconds"]) == (7, 5.0)
    assert (config["lr"], config["server_round"]) == (0.05, 5)


def test_what_a_client_returns_under_privacy_is_no_reason_to_keep_an_update_back() -> None:
    """It may depend on a sample; a `ConfigError` would keep the update back."""
    client = Client()
    task = task_of(lambda context: client)
    trainer, start = task.trainer(data=None, partition="all"), task.initial(0)
    client.fit = lambda parameters, config: (parameters, 0, {})  # type: ignore[method-assign]
    for private in (plan(dp="device", dp_clip=1.0, dp_noise=1.0, dp_epsilon=8.0), plan(codec="private")):
        with pytest.raises(TrainingError, match="returned 0 as num_examples"):
            trainer.train(start, private, version=0, seed=0)
    with pytest.raises(ConfigError, match="returned 0 as num_examples"):
        trainer.train(start, plan(), version=0, seed=0)


def test_no_number_of_samples_is_asked_for_before_the_noise_of_a_device() -> None:
    """A client would have to train for it, without privacy, and nothing would be sent if that failed."""
    pytest.importorskip("dp_accounting")
    client = Client()
    task = task_of(lambda context: client)
    trainer, start = task.trainer(data=None, partition="all"), task.initial(0)
    client.fit = lambda parameters, config: (parameters, 0, {})  # type: ignore[method-assign]
    schema = Schema.of({name: tensor.shape for name, tensor in start.items()})
    private = plan(dp="device", dp_clip=1.0, dp_noise=1.0, dp_epsilon=8.0)
    vector = to_vector(schema, start)
    job = StartTraining(base=0, schema=schema, vector=vector, residual=None, plan=private, seed=1)
    result = train(trainer, job, RandomSource(np.random.default_rng(3).bytes))
    assert isinstance(result, TrainingFinished)
    assert "returned 0 as num_examples" in result.failure
    assert result.samples == 1


def test_the_client_s_dtypes_come_back_and_whole_numbers_stay_on_the_device() -> None:
    client = Client()
    task = task_of(lambda context: client, names=NAMES)
    start = task.initial(0)
    assert {name: array.dtype for name, array in start.items()} == dict.fromkeys(NAMES[:3], np.dtype(np.float32))
    trainer = task.trainer(data=None, partition="all")
    before = {name: array.copy() for name, array in start.items()}
    for _ in range(2):
        trained = trainer.train(start, plan(statistics_rate=0.25), version=0, seed=0)
    assert [array.dtype for array in client.given[-1]] == [np.float32, np.float64, np.float32, np.int64]
    assert client.given[-1][3] == 7  # also in the second training
    np.testing.assert_array_equal(trained.tensors["bias"], 2)
    np.testing.assert_array_equal(trained.tensors["norm.running_mean"], 0.25)
    assert all(np.array_equal(start[name], before[name]) for name in start)  # the client worked on copies
    assert trained.samples == 20
    assert trained.metrics.keys() == {"loss", "seconds"}


def test_under_differential_privacy_no_statistics_travel() -> None:
    task = task_of(names=NAMES)
    private = plan(dp="device", dp_clip=1.0, dp_noise=1.0, dp_epsilon=5.0)
    trained = task.trainer(data=None, partition="all").train(task.initial(0), private, version=0, seed=0)
    np.testing.assert_array_equal(trained.tensors["norm.running_mean"], 0)


def test_what_a_dtype_cannot_represent_is_not_sent_as_a_change() -> None:
    class Half(Client):
        def get_parameters(self, config: dict[str, Any]) -> list[Any]:
            return [np.ones(2, np.float16)]

        def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[Any, Any, Any]:
            return parameters, 1, {}

    start = {"0": np.array([1.0001, 0.3], np.float32)}
    trained = task_of(Half).trainer(data=None, partition="all").train(start, plan(), version=0, seed=0)
    np.testing.assert_array_equal(trained.tensors["0"], start["0"])


def test_the_same_seed_gives_the_same_client_and_other_code_keeps_its_random_numbers() -> None:
    def drawn() -> list[float]:
        return [random.random(), np.random.rand()]  # noqa: NPY002 - as users' code does

    def seed_both() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - as users' code does

    seed_both()
    expected = drawn()
    seed_both()
    first, again, other = (task_of().initial(seed)["0"] for seed in (5, 5, 6))
    assert drawn() == expected
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_client_that_was_wrapped_by_to_client_is_unwrapped() -> None:
    task = task_of(lambda context: SimpleNamespace(numpy_client=Client(context)))
    assert task.trainer(data=None, partition="all").samples == 20


def test_an_evaluator_s_client_evaluates_or_the_strategy_s_function_does() -> None:
    start = task_of().initial(0)
    alone = task_of(better={"mae": "lower"}).evaluator(data=None).evaluate(start)
    assert (alone.samples, alone.values, alone.better) == (5, {"accuracy": 0.5, "loss": 0.25}, {"mae": "lower"})

    def evaluate(server_round: int, parameters: list[Any], config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        assert [array.dtype for array in parameters] == [np.float32, np.float64, np.float32, np.int64]
        return 2.0, {"f1": 0.75, "num_examples": 30}

    central = task_of(evaluate_fn=evaluate).evaluator(data=None).evaluate(start)
    assert (central.samples, central.values) == (30, {"f1": 0.75, "loss": 2.0})


def test_the_client_s_validation_data_are_what_a_device_holds_out() -> None:
    ((trainer, held),) = halves_of(task_of(), None, ["iid:0/2"], 0.2)
    assert (trainer.samples, held.samples) == (20, 5)


def test_a_client_that_evaluates_on_its_training_data_holds_nothing_out() -> None:
    class Same(Client):
        def evaluate(self, parameters: list[Any], config: dict[str, Any]) -> tuple[Any, Any, Any]:
            return 0.25, 20, {}

    with pytest.raises(ConfigError, match="the task mine holds no data out"):
        halves_of(task_of(Same), None, ["all"], 0.2)


def with_parameters(found: Any) -> Callable[[Context], Client]:
    client = Client()
    client.get_parameters = lambda config: found  # type: ignore[method-assign]
    return lambda context: client


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "returned no arrays"),
        (np.ones(3), "returned ndarray: return a list of numpy arrays"),
        ([np.ones(2), "text"], "returned str as array 1: return numpy arrays .of torch: tensor.detach"),
        ([np.array([{}, None])], "array 0 of dtype object, which cannot be sent"),
        ([np.ones(2, complex)], "array 0 of dtype complex128, which cannot be sent"),
        ([np.ones((0, 2))], r"array 0 without elements, of shape \(0, 2\): leave it out"),
        ([np.array([1, 2])], "returned no floating-point array"),
    ],
)
def test_arrays_that_cannot_be_sent_are_refused_with_file_and_line(found: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^test_flower_adapter.py, line \d+: .*{words}"):
        task_of(with_parameters(found)).initial(0)


def with_fit(result: Any) -> Callable[[Context], Client]:
    client = Client()
    client.fit = lambda parameters, config: result  # type: ignore[method-assign]
    return lambda context: client


GOOD = [np.ones(3, np.float32), np.ones((2, 2)), np.zeros(2, np.float32), np.array(7)]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (GOOD, "returned a list of 4: return a tuple of parameters, num_examples, metrics"),
        ((GOOD[:3], 1, {}), r"returned 3 arrays, and get_parameters\(\) 4"),
        (([np.ones(4), *GOOD[1:]], 1, {}), r"array '0' with shape \(4,\), and get_parameters\(\) \(3,\)"),
        (([np.array([1, 2, 3]), *GOOD[1:]], 1, {}), "array '0' as int64"),
        (([np.array([None] * 3), *GOOD[1:]], 1, {}), "array 0 of dtype object"),
        ((GOOD, 0, {}), "returned 0 as num_examples"),
        ((GOOD, "9", {}), "returned '9' as num_examples"),
        ((GOOD, 1, None), "returned NoneType as metrics"),
    ],
)
def test_a_wrong_result_of_fit_is_told_in_words_with_file_and_line(result: Any, words: str) -> None:
    task = task_of(with_fit(result))
    with pytest.raises(ConfigError, match=rf"^test_flower_adapter.py, line \d+: .*{words}"):
        task.trainer(data=None, partition="all").train(task_of().initial(0), plan(), version=0, seed=0)


def test_a_model_that_is_not_finite_diverged() -> None:
    task = task_of(with_fit(([np.full(3, np.nan), *GOOD[1:]], 1, {})))
    with pytest.raises(TrainingError, match="training diverged"):
        task.trainer(data=None, partition="all").train(task_of().initial(0), plan(), version=0, seed=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"names": ["a", "b"]}, "returned 4 arrays, and the task has 2 different names"),
        ({"names": ["a", "b", "b", "c"]}, "returned 4 arrays, and the task has 3 different names"),
        ({"client_fn": lambda context: object()}, r"client_fn returned object, which has no get_parameters\(\)"),
        ({"evaluate_fn": lambda *given: 1.0}, r"evaluate_fn\(\) returned float: return a tuple of loss, metrics"),
        ({"evaluate_fn": lambda *given: (None, {})}, r"evaluate_fn\(\) returned a loss of type NoneType"),
    ],
)
def test_a_wrong_task_is_told_in_words(fields: dict[str, Any], words: str) -> None:
    task = FlowerTask(**{"name": "mine", "client_fn": Client, **fields})
    with pytest.raises(ConfigError, match=words):
        task.evaluator(data=None).evaluate(task.initial(0))


def test_an_exception_of_the_client_names_its_own_line() -> None:
    def client_fn(context: Context) -> Client:
        raise KeyError("partition_id")

    report = check(task_of(client_fn))
    assert re.search(r"KeyError: 'partition_id' \(test_flower_adapter.py, line \d+\)", report.problems[0])
    with pytest.raises(ConfigError, match=r"the task mine fails: .*KeyError"), explained("mine"):
        task_of(client_fn).initial(0)


def test_the_example_federates_as_well_as_it_trains_alone() -> None:
    task: Any = load_task(EXAMPLE)
    found = simulated(task, devices=4, versions=20)
    alone = task.trainer(data=None, partition="all")
    model = task.initial(0)
    for version in range(10):
        model = alone.train(model, plan(**task.default_plan), version=version, seed=version).tensors
    central = task.evaluator(data=None).evaluate(model).values["accuracy"]
    assert found.evaluation.samples == len(load("test")[1])
    assert found.evaluation.values["accuracy"] > 0.93
    assert found.evaluation.values["accuracy"] > central - 0.02


def test_a_device_with_the_example_reports_on_its_client_s_validation_data() -> None:
    task: Any = load_task(EXAMPLE)
    found = simulated(task, devices=2, versions=3, local=Local(hold_out=0.1))
    assert found.updates >= 3


@pytest.mark.parametrize("argument", ["client_fn", "on_fit_config_fn", "evaluate_fn"])
def test_what_is_no_function_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"the task mine: {argument} is int, but must be a function"):
        FlowerTask(**dict[str, Any](name="mine", client_fn=print) | {argument: 3})


@pytest.mark.parametrize(
    ("argument", "given", "kind"),
    [
        ("run_config", 3, "a dict"),
        ("default_plan", "x", "a dict"),
        ("names", "w", "a list of texts"),
        ("plan_keys", [1], "a list of texts"),
    ],
)
def test_what_is_no_dict_or_list_is_refused(argument: str, given: object, kind: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"the task mine: {argument} is {given!r}, but must be {kind}")):
        FlowerTask(**dict[str, Any](name="mine", client_fn=print) | {argument: given})


def test_a_client_fn_of_other_arguments_is_said_with_its_place() -> None:
    none: Any = lambda: None  # noqa: E731 - it stands for a user's
    with pytest.raises(ConfigError, match=r"^test_flower_adapter.py, line \d+: this is called as client_fn\(context\)"):
        FlowerTask(name="mine", client_fn=none).evaluator(data=None)
