"""A federation on arrays: what it takes and refuses, before anything is trained."""

import io
import random
import re
import signal
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from support.arrays import CLIENTS, TEST, classes, linear, numbers
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.metric import higher, lower
from ternbus.lab import (
    BestModel,
    EarlyStopping,
    Federation,
    Progress,
    State,
    by,
    dirichlet,
    iid,
    natural,
    quantity,
    shards,
)
from ternbus.lab.notebook.callbacks import asked_to_stop, checked
from ternbus.lab.notebook.frames import library
from ternbus.lab.notebook.objectives import accuracy_of_signs, mae, r2
from ternbus.lab.notebook.parts import parts_of
from ternbus.lab.notebook.search import arguments_with, sweep, tune
from ternbus.lab.notebook.simulated import speeds_of
from ternbus.lab.notebook.surroundings import Interrupt, untouched


def federation(**changes: Any) -> Federation:
    return Federation(**{"model": linear, "loss": "mse", "clients": CLIENTS, "test": TEST, **changes})


def state(version: int = 1, **metrics: float) -> State:
    return State(
        version=version, versions=5, seconds=1.0, updates=2, staleness=0.0, accepted=2, bytes_up=3, bytes_down=4,
        metrics=metrics, better={"mae": "lower"}, read=dict, module=lambda _: None, metadata=dict,
    )  # fmt: skip


# --- data


def test_clients_are_devices_by_their_names_with_their_own_samples() -> None:
    fed = federation()
    assert fed.devices == ("alice", "bob")
    table = fed.partition().table
    assert table["device"].tolist() == ["alice", "bob"]
    assert table["samples"].tolist() == [30, 50]
    for number, name in enumerate(fed.devices):
        trainer: Any = fed.trainer(number)
        inputs, targets = trainer.data.batch(slice(None))
        assert np.array_equal(inputs.numpy(), CLIENTS[name][0])
        assert np.array_equal(targets.numpy(), CLIENTS[name][1])


def test_clients_may_have_tensors_frames_and_arrays_beside_each_other() -> None:
    inputs, targets = numbers(20, seed=3)
    mixed = {
        "array": (inputs, targets),
        "tensor": (torch.from_numpy(inputs), torch.from_numpy(targets)),
        "frame": (pd.DataFrame(inputs), pd.Series(targets)),
    }
    assert federation(clients=mixed).partition().table["samples"].tolist() == [20, 20, 20]


def test_clients_may_have_datasets() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            inputs, target = super().__getitem__(index)  # type: ignore[no-untyped-call]  # torch's
            return inputs * 2, target

    given = {name: Doubled(torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in CLIENTS.items()}
    fed = federation(clients=given)
    trainer: Any = fed.trainer(1)
    assert torch.equal(trainer.data.batch(slice(0, 3))[0], torch.from_numpy(CLIENTS["bob"][0][:3] * 2))


def test_one_table_is_divided_as_a_scenario_divides_it() -> None:
    inputs, labels = classes(120)
    expected = {
        iid(4): ("iid", 4), dirichlet(0.5): ("dirichlet:0.5", 8), shards(2, 3): ("shards:2", 3),
        quantity(1.0, 5): ("quantity:1", 5),
    }  # fmt: skip
    for parts, (name, devices) in expected.items():
        fed = Federation(lambda: nn.Linear(4, 3), data=(inputs, labels), partition=parts, test=(inputs, labels))
        facts = fed.partition().facts
        assert (facts["partition"], facts["devices"], facts["samples"]["all"]) == (name, devices, 120)
        assert fed.partition().table[["0", "1", "2"]].to_numpy().sum() == 120


def test_by_a_column_makes_a_device_of_each_value_and_takes_the_column_out_of_the_inputs() -> None:
    inputs, targets = numbers(40)
    frame = pd.DataFrame(inputs, columns=[f"x{i}" for i in range(10)]).assign(user=["ann", "ben", "cy", "dan"] * 10)
    fed = federation(clients=None, data=(frame, targets), partition=by("user"), test=(frame, targets))
    assert len(fed.devices) == 4
    assert fed.partition().table["owner"].tolist() == ["ann", "ben", "cy", "dan"]
    trainer: Any = fed.trainer(0)
    assert trainer.data.batch(slice(None))[0].shape == (10, 10)
    numbered = frame.assign(user=[0, 1, 2, 3] * 10)
    kept = federation(clients=None, data=(numbered, targets), partition=by("user", keep=True), test=0.2)
    other: Any = kept.trainer(0)
    assert other.data.batch(slice(None))[0].shape[1] == 11


@pytest.mark.parametrize("absent", [None, np.nan, pd.NA, pd.NaT])
def test_an_owner_that_is_not_given_is_named_by_its_row(absent: Any) -> None:
    inputs, targets = numbers(9)
    owners = pd.Series([*"aaabb", absent, *"bcc"], dtype=object)
    for given in (owners, pd.DataFrame({"owner": owners})):
        with pytest.raises(ConfigError, match=r"(owners|the column 'owner') has no label in row 5"):
            federation(clients=None, data=(inputs, targets), owners=given, partition=natural(), test=(inputs, targets))
    frame = pd.DataFrame({"x": inputs[:, 0], "user": owners})
    with pytest.raises(ConfigError, match="the column 'user' has no label in row 5"):
        federation(clients=None, data=(frame, targets), partition=by("user"), test=0.2)
    numbered = np.array([0, 0, 1, 1, 2, np.nan, 2, 2, 2])
    with pytest.raises(ConfigError, match="owners has no label in row 5"):
        federation(clients=None, data=(inputs, targets), owners=numbered, test=0.2)


def test_a_column_that_is_missing_is_told_with_the_first_of_many_columns() -> None:
    inputs, targets = numbers(9)
    wide = pd.DataFrame({f"column_{number}": inputs[:, 0] for number in range(300)})
    with pytest.raises(ConfigError) as raised:
        federation(clients=None, data=(wide, targets), partition=by("colum_1"), test=0.2)
    assert "there is no column 'colum_1' (do you mean column_1?): the columns are column_0, " in str(raised.value)
    assert "column_9 and 290 more: " in str(raised.value)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"learnig_rate": 0.1}, "plan: learnig_rate is an unknown key: do you mean learning_rate?"),
        ({"learning_rate": -1}, "plan: learning_rate is -1, not within 0 and 1000"),
    ],
)
def test_a_plan_is_checked_as_the_federation_is_made(plan: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        federation(plan=plan)
    assert federation(plan={"mine": 1}, plan_keys=["mine"]).task.default_plan == {"mine": 1}


def test_a_search_says_which_argument_is_of_another_type() -> None:
    for search in (sweep, tune):
        with pytest.raises(ConfigError, match=f"{search.__name__}.. searches with a Federation, and not with 'f'"):
            search("f", {"plan.learning_rate": [0.1]})  # type: ignore[arg-type]  # what the test is about
        with pytest.raises(ConfigError, match="space is 'x', but must be a dict"):
            search(federation(), "x")  # type: ignore[arg-type]  # likewise


@pytest.mark.parametrize(
    "owners",
    [[["a", "b"], *"aabbccdd"], [[1, 2, 3], [4, 5]] + [[6]] * 7, np.array([[1, 2], [3]] + [[4]] * 7, dtype=object)],
)
def test_owners_that_are_lists_are_refused_in_words(owners: Any) -> None:
    inputs, targets = numbers(9)
    with pytest.raises(ConfigError, match="owners has a list in the place of a label: give one number or text"):
        federation(clients=None, data=(inputs, targets), owners=owners, partition=natural(), test=(inputs, targets))
    table = pd.DataFrame({"owner": list(owners)}, dtype=object)
    with pytest.raises(ConfigError, match="the column 'owner' has a list in the place of a label"):
        federation(clients=None, data=(inputs, targets), owners=table, partition=natural(), test=(inputs, targets))


def test_owners_as_a_table_of_objects_are_refused_in_words() -> None:
    inputs, targets = numbers(9)
    owners = np.array([["a", "b"]] * 9, dtype=object)
    with pytest.raises(ConfigError, match=r"an array of shape \(9, 2\) as owners of 9 samples"):
        federation(clients=None, data=(inputs, targets), owners=owners, partition=natural(), test=(inputs, targets))


def test_owners_divide_the_samples_without_a_partition() -> None:
    inputs, targets = numbers(30)
    owners = np.repeat(["b", "a", "c"], 10)
    fed = federation(clients=None, data=(inputs, targets), owners=owners, test=0.2)
    assert fed.partition().table["owner"].tolist() == ["a", "b", "c"]
    assert fed.partition().table["samples"].tolist() == [8, 8, 8]
    with pytest.raises(ConfigError, match="no column 'city'"):
        federation(clients=None, data=(inputs, targets), owners={"town": owners}, partition=by("city"), test=0.2)


def test_a_share_of_each_clients_samples_is_set_aside_and_nobody_trains_on_it() -> None:
    fed = federation(test=0.2)
    assert fed.partition().table["samples"].tolist() == [24, 40]
    task: Any = fed.task
    seen = {tuple(row) for row in task.train_samples.batch(slice(None))[0].tolist()}
    tested = {tuple(row) for row in task.test_samples.batch(slice(None))[0].tolist()}
    assert len(tested) == 16
    assert not seen & tested


def test_a_named_loss_brings_its_metrics_and_compares_columns_with_numbers() -> None:
    found = federation().initial_evaluation()
    assert list(found.values) == ["mae", "r2", "loss"]
    net = linear()
    net.load_state_dict({name: torch.from_numpy(each) for name, each in federation().task.initial(0).items()})
    with torch.no_grad():
        outputs = net(torch.from_numpy(TEST[0])).squeeze(1)
    assert found.values["mae"] == pytest.approx(float((outputs - torch.from_numpy(TEST[1])).abs().mean()), rel=1e-5)
    assert found.better == {"mae": "lower"}


def test_the_metrics_are_their_formulas() -> None:
    outputs, targets = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 5.0])
    assert mae(outputs, targets).item() == pytest.approx(2 / 3)
    assert r2(outputs, targets).item() == pytest.approx(1 - 2 / 8)
    assert r2(torch.full((3,), 3.0), targets).item() == pytest.approx(0)
    assert accuracy_of_signs(torch.tensor([-1.0, 2.0, 0.5]), torch.tensor([0, 1, 0])).item() == pytest.approx(2 / 3)


TABLE = (pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}), pd.Series([1.0, 2.0]))
MIXED_UP = (TABLE[0][["b", "a"]], TABLE[1])
BAD: list[tuple[dict[str, Any], str]] = [
    ({"loss": "mes"}, "no loss 'mes' .do you mean mse"),
    ({"clients": {"Alice": TEST}}, "the client 'Alice' cannot be a device"),
    ({"clients": {}}, "clients must be a dict"),
    ({"clients": {"alice": TEST, "bob": (TEST[0][:, :3], TEST[1])}}, r"alice has \(10,\) of float32.* bob \(3,\)"),
    ({"clients": {"alice": (np.full((5, 10), np.nan, np.float32), np.zeros(5))}}, "client alice: 5 of 5 samples"),
    ({"clients": {"alice": TABLE, "bob": MIXED_UP}, "test": 0.5}, "client bob has the columns b, a, and client alice"),
    ({"test": None}, "give test="),
    ({"test": 1.5}, "must be between 0 and 1"),
    ({"data": TEST}, "either clients=.* or data="),
    ({"clients": None}, "either clients=.* or data="),
    ({"partition": iid(3)}, "clients have their own data already"),
    ({"augmentt": abs}, "no argument 'augmentt' .do you mean augment"),
    ({"clients": None, "data": TEST, "partition": iid}, "partition is the function iid: call it"),
    ({"clients": None, "data": TEST, "partition": 3}, r"partition is 3: write iid\(20\)"),
    ({"clients": None, "data": TEST, "partition": natural()}, "these data have no owners"),
    ({"task": "digits", "clients": None, "test": None, "loss": None}, "no argument 'model': the task has it"),
    ({"clients": {"alice": (TEST[0], TEST[1][:5])}}, "^client alice has 40 inputs and 5 targets"),
    ({"clients": {"alice": (TEST[0].tolist(), TEST[1])}}, "^client alice: the data have float in place of a tensor"),
    ({"test": 2}, "test is 2: the share that is set aside must be between 0 and 1"),
    ({"client": CLIENTS}, "no argument 'client' .do you mean clients"),
    ({"model": nn.Linear(10, 1)}, "model is a Linear: give a function that makes one"),
    ({"model": nn.Linear}, "model is Linear, which needs the arguments in_features, out_features: give a function"),
    ({"loss": nn.MSELoss}, r"loss is the class MSELoss: give one that is made, as MSELoss\(\)"),
    ({"metrics": mae}, "metrics is function: it must be a dict of name to function"),
    ({"clients": {"alice": "data.csv"}}, "client alice: the data are str, 'data.csv': they must be"),
    ({"test": "test.csv"}, "test: the data are str, 'test.csv': they must be"),
    ({"stays_local": "weight"}, r"stays_local is one text: give a list of them, as \['weight'\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_what_does_not_fit_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        federation(**changes)


@pytest.mark.parametrize(("task", "what"), [(5, "5"), (Federation, "the class Federation")])
def test_a_task_that_is_none_is_refused(task: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=f"task is {what}: give the name of a task"):
        Federation(task=task)


@pytest.mark.parametrize("seconds", [np.float32(2), np.array(2.0), Fraction(2), Decimal(2)])
def test_seconds_are_numbers_of_any_class(seconds: Any) -> None:
    names = ["alice", "bob"]
    assert speeds_of(seconds, names) == speeds_of(2, names)


@pytest.mark.parametrize(("speeds", "says"), [(object(), "speeds is <object"), (["1", "2"], "speeds has '1', but")])
def test_seconds_that_are_no_numbers_are_refused_in_words(speeds: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        speeds_of(speeds, ["alice", "bob"])


@pytest.mark.parametrize("partition", [dirichlet, quantity])
@pytest.mark.parametrize("alpha", [0.5, Fraction(1, 2), Decimal("0.5"), np.float32(0.5)])
def test_a_partition_takes_a_number_of_any_class(partition: Any, alpha: Any) -> None:
    assert partition(alpha) == partition(0.5)


@pytest.mark.parametrize("partition", [dirichlet, quantity])
def test_a_partition_by_no_number_is_refused(partition: Any) -> None:
    with pytest.raises(ConfigError, match=r"has the alpha 'a', but it must be a number"):
        partition("a")


def test_a_loss_of_another_shape_says_which() -> None:
    fed = federation(model=lambda: nn.Linear(10, 2))
    with pytest.raises(ConfigError, match=r"outputs have shape \(\d+, 2\) and the targets \(\d+,\)"):
        fed.initial_evaluation()


BAD_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"plan": {"learnin_rate": 0.1}}, "learning_rate"),
    ({"plan": {"learning_rate": -1}}, "learning_rate"),
    ({"merge": {"bufer_size": 2}}, "merge has no key 'bufer_size' .do you mean buffer_size"),
    ({"settings": {"optimiser.name": "fedadam"}}, "do you mean optimizer.name"),
    ({"settings": {"optimizer": {"name": "fedadam"}}}, "no section 'optimizer', but keys with a dot: optimizer.name,"),
    ({"verions": 3}, "no argument 'verions' .do you mean versions.*: there are versions, seed, .*vectorise.*, sync, "),
    ({"versions": 0}, "end.versions is 0"),
    ({"speeds": [1.0]}, "speeds has 1 number for 2 devices"),
    ({"speeds": {"alice": 1, "carol": 2}}, "no device 'carol'"),
    ({"speeds": {"alice": 1}}, "no seconds for bob"),
    ({"callbacks": [EarlyStopping]}, "callbacks has the class EarlyStopping"),
    ({"callbacks": [3]}, "callbacks has 3"),
    ({"merge_rule": (abs,)}, r"merge_rule is a tuple of builtin_\S*: give a pair of functions, \(init, apply\)$"),
    ({"merge_rule": ((abs, abs), (abs, abs))}, "merge_rule is a tuple of tuple, tuple: .*; give each of these pairs"),
    ({"client": (abs, abs), "jobs": 2}, "use jobs=1"),
    ({"jobs": 0}, "jobs is 0"),
    ({"jobs": "ray://127.0.0.1:1", "vectorise": 2}, "a Ray cluster trains each device by itself"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"versions": 1.5}, "versions is 1.5, but must be a whole number"),
    ({"seed": "0"}, "seed is '0', but must be a whole number"),
    ({"plan": [("learning_rate", 0.1)]}, "plan is .*, but must be a dict"),
    ({"local": {"hold_out": 0.2}}, r"local has .*: give Local\(…\) of ternbus.lab"),
    ({"hostile": "sign-flip"}, r"hostile has 'sign-flip': give Hostile\(…\)"),
    ({"private": True}, r"private has True: give Private\(…\)"),
    ({"callbacks": abs}, "callbacks is .*: give a list"),
    ({"sync": "no"}, "sync is 'no', but must be True or False"),
    ({"dense": "weight"}, r"dense is one text: give a list of them, as \['weight'\]"),
    ({"device": 3}, "device is 3: it must be auto, cpu"),
    ({"speeds": "fast"}, "speeds is 'fast': give the seconds of a training"),
    ({"learning_rate": 0.1}, "no argument 'learning_rate': it is a key of the plan, plan={'learning_rate': …}"),
    ({"buffer_size": 2}, "no argument 'buffer_size': it is a key of the merge, merge={'buffer_size': …}"),
    ({"tau": 2}, "no argument 'tau': it is a key of the settings, settings={'optimizer.tau': …}"),
    ({"hold_out": 0.2}, r"no argument 'hold_out': it is a field of local, local=Local\(hold_out=…\)"),
    ({"settings": {"plan.learning_rate": 0.1}}, "settings has no key 'plan.learning_rate': it is a key of the plan"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_RUNS, ids=[next(iter(given)) for given, _ in BAD_RUNS])
def test_a_run_that_cannot_be_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        federation().simulate(**{"callbacks": [], **arguments})


def test_search_refuses_what_is_no_space() -> None:
    fed = federation()
    with pytest.raises(ConfigError, match="a list of values for each name"):
        sweep(fed, {"plan.learning_rate": 0.1})
    with pytest.raises(ConfigError, match=r"write \(low, high\)"):
        tune(fed, {"plan.learning_rate": (1, 0)})
    with pytest.raises(ConfigError, match='the low end of a range with "log" must be above 0'):
        tune(fed, {"plan.learning_rate": (0, 1, "log")})
    with pytest.raises(ConfigError, match="trials is 0, but must be"):
        tune(fed, {"plan.learning_rate": (0.1, 1.0)}, trials=0)
    with pytest.raises(ConfigError, match="needs a range for each name"):
        tune(fed, {})
    with pytest.raises(ConfigError, match=r"the evaluation has no metric 'maee' \(do you mean mae\?\)"):
        tune(fed, {"plan.learning_rate": (0.1, 1.0)}, metric="maee")


def test_numbers_of_numpy_are_numbers_wherever_one_chooses_them() -> None:
    fed = federation(plan={"learning_rate": np.float32(0.5)})
    chosen = {"plan": {"local_epochs": np.int64(2)}, "merge": {"buffer_size": np.int64(2)}, "callbacks": []}
    run = fed.simulate(versions=np.int64(1), seed=np.int64(3), **chosen)  # type: ignore[arg-type]  # as users give them
    assert run.version == 1
    assert run.report["scenario"]["plan"] == {"local_epochs": 2}
    table = sweep(fed, {"plan.learning_rate": np.logspace(-2, -1, 2)}, versions=1).table
    assert [*table["plan.learning_rate"]] == [0.01, 0.1]


def test_a_regression_of_whole_numbers_has_its_metrics() -> None:
    inputs, targets = TEST
    found = federation(test=(inputs, targets.round().astype(int))).initial_evaluation()
    assert set(found.values) == {"mae", "r2", "loss"}


def test_a_name_with_a_dot_goes_where_it_belongs() -> None:
    found = arguments_with(
        {"plan": {"momentum": 0}, "versions": 3}, {"plan.learning_rate": 1, "merge.rule": "median", "staleness.max": 2,
                                                   "sync": True}
    )  # fmt: skip
    assert found == {
        "plan": {"momentum": 0, "learning_rate": 1}, "merge": {"rule": "median"}, "settings": {"staleness.max": 2},
        "sync": True, "versions": 3,
    }  # fmt: skip


def test_a_partition_by_its_name_is_the_function_s() -> None:
    assert parts_of("iid") == iid()
    assert parts_of("by:user").devices is None


def test_what_is_missing_names_what_installs_it() -> None:
    with pytest.raises(ConfigError, match=r"nonsense_library is missing; run: pip install 'ternbus\[notebook\]'"):
        library("nonsense_library", "'ternbus[notebook]'")


# --- callbacks


def test_early_stopping_waits_by_the_metrics_direction() -> None:
    stop = EarlyStopping("mae", patience=2)
    answers = [stop.on_version(state(version, mae=value)) for version, value in enumerate([3.0, 2.0, 2.0, 1.9, 2.5, 2])]
    assert answers == [None, None, None, None, None, True]
    up = EarlyStopping(patience=1, min_delta=0.1)
    assert [up.on_version(state(n, accuracy=value)) for n, value in enumerate([0.5, 0.7, 0.75])] == [None, None, True]
    assert up.on_version(state(0, accuracy=0.1)) is None  # a second run begins anew


def test_a_metric_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"version 1 has no metric 'maee' \(do you mean mae\?\): it has mae, loss"):
        EarlyStopping("maee").on_version(state(mae=1.0, loss=2.0))
    with pytest.raises(ConfigError, match="it has none that is finite"):
        BestModel("best.safetensors").on_version(state())


def test_a_callback_answers_none_or_a_truth_value() -> None:
    with pytest.raises(ConfigError, match="returned 'stop': return True"):
        asked_to_stop(lambda _: "stop", state())  # type: ignore[arg-type, return-value]  # the mistake
    assert asked_to_stop(lambda given: given.version == 1, state())
    assert checked([Progress(), print]) != []


def test_progress_in_a_pipe_is_lines_and_the_last_state_is_among_them() -> None:
    stream = io.StringIO()
    bar = Progress(stream)
    bar.say("a notice")
    for version in range(4):
        bar.on_version(state(version, mae=1 / (1 + version)))
    bar.on_end(None)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["a notice", "version 0/5  mae 1"]
    assert lines[-1] == "version 3/5  mae 0.25"


def test_progress_in_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = Progress(stream)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TERM", "xterm")
        bar.on_version(state(0, mae=1.0))
        bar.on_version(state(5, mae=0.5))
        bar.on_end(None)
    assert "━" in stream.getvalue()
    assert "version 5/5" in stream.getvalue()


# --- the caller's process


def test_random_numbers_and_threads_of_the_caller_stay_as_they_were() -> None:
    draws: list[Callable[[], float]] = [random.random, np.random.random, lambda: torch.rand(()).item()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    torch.set_num_threads(2)
    expected = [draw() for draw in draws]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    inside = []
    for _ in range(2):
        with untouched(3):
            torch.set_num_threads(1)
            inside.append([draw() for draw in draws])
    assert [draw() for draw in draws] == expected
    assert inside[0] == inside[1] != expected
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_first_interrupt_is_noted_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.came
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_thread_the_signals_are_left_alone() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interrupt() as interrupt:
            found.append(interrupt.came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_metrics_of_ones_own_have_their_direction() -> None:
    fed = federation(metrics={"error": lower(mae), "fit": higher(r2)})
    assert fed.initial_evaluation().better == {"error": "lower"}
