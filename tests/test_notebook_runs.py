"""Runs of a federation on arrays: tables, models, callbacks, interrupts, failures and baselines."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from support.arrays import CLIENTS, TEST, linear, numbers
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.metric import higher, lower
from ternbus.edge.learn.subnetwork import channels
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab import (
    BestModel,
    ClientError,
    EarlyStopping,
    Federation,
    Hostile,
    Local,
    Run,
    Speeds,
    State,
    TensorBoard,
    compare,
    iid,
    sweep,
    tune,
)
from ternbus.lab.notebook.objectives import mae

pytestmark = pytest.mark.slow
PLAN = {"learning_rate": 0.02, "batch_size": 10}
ROOT = Path(__file__).parent.parent


def hidden(width: float = 1.0) -> nn.Module:
    units = channels(8, width)
    return nn.Sequential(nn.Linear(10, units), nn.Tanh(), nn.Linear(units, 1))


def federation(**changes: Any) -> Federation:
    return Federation(**{"model": linear, "loss": "mse", "clients": CLIENTS, "test": TEST, "plan": PLAN, **changes})


def simulated(fed: Federation | None = None, **arguments: Any) -> Run:
    return (fed or federation()).simulate(**{"versions": 4, "callbacks": [], **arguments})


def same(one: Run, other: Run) -> bool:
    return all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.fixture(scope="module")
def run() -> Run:
    return simulated(federation(), versions=8)


# --- the result


def test_a_federation_learns_and_its_tables_say_how(run: Run) -> None:
    versions, devices = run.versions, run.devices
    assert versions["version"].tolist() == list(range(9))
    assert versions["mae"].iloc[-1] < 0.3 * versions["mae"].iloc[0]
    assert run.metrics["mae"] == versions["mae"].iloc[-1]
    assert versions["bytes_up"].is_monotonic_increasing
    assert versions["seconds"].is_monotonic_increasing
    assert devices["device"].tolist() == ["alice", "bob"]
    assert devices["samples"].tolist() == [30, 50]
    assert devices["accepted"].sum() == run.report["updates"] >= versions["updates"].sum()
    assert "mae" in run.table.columns
    assert run.ended == "limit"
    assert "8 versions" in repr(run)
    assert "<table" in run._repr_html_()


def test_the_models_are_ordinary_modules_that_have_the_metrics_of_their_versions(run: Run) -> None:
    for model, version in ((run.model, run.version), (run.best, run.best_version)):
        assert isinstance(model, nn.Linear)
        with torch.no_grad():
            outputs = model(torch.from_numpy(TEST[0])).squeeze(1)
        mae = float((outputs - torch.from_numpy(TEST[1])).abs().mean())
        assert mae == pytest.approx(run.versions["mae"].iloc[version], rel=1e-4)
    assert run.best_version == int(run.versions["mae"].argmin())


def test_the_figures_are_drawn(run: Run) -> None:
    for figure in (run.plot(), federation().partition().plot(), compare(run).plot()):
        assert figure._repr_png_()[:4] == b"\x89PNG"


def test_the_same_cell_runs_twice_and_leaves_random_numbers_and_threads_alone() -> None:
    fed = federation()
    torch.manual_seed(5)
    torch.set_num_threads(2)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = simulated(fed)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert same(first, simulated(fed))
    assert not same(first, simulated(fed, seed=1))
    assert same(first, simulated(federation()))


def test_seconds_for_each_client_decide_who_is_merged_how_often() -> None:
    run = simulated(versions=12, merge={"buffer_size": 1}, speeds={"alice": 1.0, "bob": 5.0})
    accepted = dict(zip(run.devices["device"], run.devices["accepted"], strict=True))
    assert accepted["alice"] >= 4 * accepted["bob"] > 0


def test_some_clients_are_slower_by_the_beginning_of_their_names() -> None:
    speeds = Speeds(sigma=0.0, median_s=1.0, factors={"bo": 5.0})
    run = simulated(versions=12, merge={"buffer_size": 1}, speeds=speeds)
    accepted = dict(zip(run.devices["device"], run.devices["accepted"], strict=True))
    assert accepted["alice"] >= 4 * accepted["bob"] > 0


@pytest.mark.parametrize("how", [{}, {"vectorise": 2}, {"jobs": 2}], ids=["one by one", "at once", "processes"])
def test_clients_train_the_sub_networks_of_a_search(how: dict[str, int]) -> None:
    fed = federation(model=hidden, narrow=hidden)
    arms = [{"width": 0.25}, {"width": 0.5}]
    run = simulated(fed, settings={"search.arms": arms}, merge={"buffer_size": 2}, **how)
    before, after = fed.task.initial(0)["2.weight"], run.tensors["2.weight"]
    assert {"mae@0.25", "mae@0.5"} <= run.metrics.keys()
    assert (before == after)[:, 4:].all()  # no arm has the other half
    assert (before != after)[:, :2].all()


def test_what_a_scenario_can_say_an_argument_says() -> None:
    fed = Federation(linear, loss="mse", data=numbers(100), partition=iid(5), test=TEST, plan=PLAN)
    run = simulated(
        fed, sync=True, local=Local(hold_out=0.2), hostile=(Hostile(kind="sign-flip", share=0.2),),
        merge={"rule": "median"}, settings={"optimizer.name": "fedavgm"},
    )  # fmt: skip
    assert run.versions["staleness_max"].iloc[1:].tolist() == [0] * 4
    assert run.devices["own_mae"].notna().sum() == 4  # the hostile one holds nothing out
    assert run.settings["optimizer.name"] == "fedavgm"


def test_worker_processes_train_what_lambdas_make_to_the_same_bits(tmp_path: Path) -> None:
    """As a script without a guard: no process runs it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\n"
        "from torch import nn\n"
        "from ternbus.lab import Federation\n"
        "print('began')\n"
        "rng = np.random.default_rng(0)\n"
        "size = 3\n"
        "data = (rng.normal(size=(40, size)).astype('f4'), rng.normal(size=40).astype('f4'))\n"
        "fed = Federation(lambda: nn.Linear(size, 1), loss='mse', clients={'a': data, 'b': data}, test=0.2)\n"
        "runs = [fed.simulate(versions=2, callbacks=[], jobs=jobs) for jobs in (1, 2)]\n"
        "print(all((runs[0].tensors[n] == runs[1].tensors[n]).all() for n in runs[0].tensors), __file__ != '')\n"
        "try:\n"
        "    Federation(\n"
        "        lambda: nn.Linear(size, 1), clients={'a': data}, test=0.2,\n"
        "        loss=lambda outputs, targets: 1 / 0 if outputs.requires_grad else outputs.mean(),\n"
        "    ).simulate(callbacks=[], jobs=2)\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (ran.stderr, ran.stdout[:16]) == ("", "began\nTrue True\n")
    said = r"a, training on version 0: a bug in the task: .*, line 14: ZeroDivisionError"
    assert re.match(said, ran.stdout[16:])


def test_devices_that_are_trained_at_once_make_the_same_versions_to_rounding() -> None:
    alone, at_once = (simulated(federation(), versions=3, vectorise=count) for count in (1, 2))
    assert alone.versions["seconds"].tolist() == at_once.versions["seconds"].tolist()
    for name, tensor in alone.tensors.items():
        np.testing.assert_allclose(at_once.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_travel_says_so() -> None:
    class Held(nn.Linear):
        lock = None

        def __reduce_ex__(self, _: Any) -> Any:
            raise TypeError("cannot pickle this")

    net = Held(10, 1)
    with pytest.raises(ConfigError, match=r"cannot travel to a worker process \(TypeError: .*use jobs=1"):
        simulated(federation(model=lambda: net), jobs=2)


def test_a_task_by_its_name_is_a_federation_without_a_module() -> None:
    run = simulated(Federation(task="digits-numpy", partition=iid(3)), versions=2)
    assert run.versions["accuracy"].iloc[-1] > run.versions["accuracy"].iloc[0]
    with pytest.raises(ConfigError, match="makes no PyTorch model: its model is `tensors`"):
        _ = run.model


# --- callbacks


def test_callbacks_see_every_version_and_may_end_the_run(tmp_path: Path) -> None:
    seen: list[int] = []
    ended: list[Any] = []

    class Keeps:
        def on_version(self, state: State) -> bool | None:
            seen.append(state.version)
            assert state.model()(torch.zeros(1, 10)).shape == (1, 1)
            return True if state.version == 3 else None

        def on_end(self, run: Run) -> None:
            ended.append(run)

    best = tmp_path / "best.safetensors"
    run = simulated(versions=20, callbacks=[Keeps(), BestModel(best)])
    assert (run.ended, run.version, seen) == ("stopped", 3, [0, 1, 2, 3])
    assert ended == [run]
    stored = load_file(best)
    assert all(np.array_equal(stored[name], run.best_tensors[name]) for name in stored)


def test_early_stopping_keeps_the_best_version() -> None:
    run = simulated(versions=200, callbacks=[EarlyStopping("mae", patience=3)])
    assert run.ended == "stopped"
    assert run.version == run.best_version + 3 < 200
    with torch.no_grad():
        mae = float((run.best(torch.from_numpy(TEST[0])).squeeze(1) - torch.from_numpy(TEST[1])).abs().mean())
    assert mae == pytest.approx(run.versions["mae"].min(), rel=1e-4)


def test_tensorboard_names_a_file_that_is_where_its_folder_should_be(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.touch()
    with pytest.raises(ConfigError, match=f"^TensorBoard: cannot write {file}: it is a file, not a folder"):
        simulated(callbacks=[TensorBoard(file)])


def test_tensorboard_has_the_metrics_of_every_version(tmp_path: Path) -> None:
    run = simulated(callbacks=[TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("mae")
    assert [event.step for event in events] == run.versions["version"].tolist()
    assert [event.value for event in events] == pytest.approx(run.versions["mae"].tolist(), rel=1e-4)


@pytest.mark.extended
def test_mlflow_has_the_metrics_of_every_version_and_the_settings(tmp_path: Path) -> None:
    """In a process of its own: mlflow's libraries warn."""
    script = f"""
import mlflow
from support.arrays import CLIENTS, TEST, linear
from ternbus.lab import Federation, MLflow
mlflow.set_tracking_uri("sqlite:///{tmp_path}/mlflow.db")
run = Federation(linear, loss="mse", clients=CLIENTS, test=TEST).simulate(
    versions=3, callbacks=[MLflow("trial")], plan={{"momentum": 0.5}}
)
client = mlflow.MlflowClient()
(kept,) = client.search_runs(["0"])
history = client.get_metric_history(kept.info.run_id, "mae")
print(mlflow.active_run(), kept.data.params["plan.momentum"], kept.info.run_name)
print([round(each.value, 6) for each in sorted(history, key=lambda each: each.step)] == run.versions["mae"].tolist())
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-2:] == ["None 0.5 trial", "True"], ran.stderr


# --- ends


def test_an_interrupt_returns_what_was_reached() -> None:
    def interrupts(state: State) -> None:
        if state.version == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = simulated(versions=1000, callbacks=[interrupts])
    assert run.ended == "interrupted"
    assert 2 <= run.version < 10
    assert signal.getsignal(signal.SIGINT) is before


def fails_in_the_third_batch() -> Any:
    calls = 0

    def loss(outputs: Any, targets: Any) -> Any:
        nonlocal calls
        calls += outputs.requires_grad
        if calls == 3:
            raise ValueError("no such digit")
        return nn.functional.mse_loss(outputs, targets.unsqueeze(1))

    return loss


def test_a_bug_in_a_clients_training_names_client_batch_and_line() -> None:
    with pytest.raises(ClientError) as raised:
        simulated(federation(loss=fails_in_the_third_batch()))
    assert str(raised.value) == (
        f"{raised.value.client}, training on version 0: a bug in the task: test_notebook_runs.py, line "
        f"{fails_in_the_third_batch.__code__.co_firstlineno + 7}: ValueError: no such digit (in batch 3 of "
        f"{ {'alice': 3, 'bob': 5}[raised.value.client] })"
    )
    assert "raise ValueError" in "".join(raised.value.__notes__)


def test_labels_that_the_model_has_no_output_for_are_of_a_client_or_of_the_test_data() -> None:
    inputs, labels = np.ones((40, 1), np.float32), np.arange(40) % 3
    clients = {"good": (inputs, labels), "odd": (inputs, labels + 5)}

    def scores() -> nn.Module:
        return nn.Linear(1, 3)

    with pytest.raises(ClientError) as raised:
        simulated(Federation(scores, clients=clients, test=(inputs, labels)))
    assert re.fullmatch(
        "odd, training on version 0: a bug in the task: IndexError: Target [567] is out of bounds. The model has "
        r"outputs for the classes 0 to 2 \(in batch 1 of 1\); look at the task's model, loss and data",
        str(raised.value),
    )
    with pytest.raises(ConfigError, match="fails in the evaluation of version 0 on the test data: a bug in the task: "):
        simulated(Federation(scores, clients=clients, test=0.2))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Linear(3, 2), "mat1 and mat2 must have the same dtype, but got Long and Float"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), "\"batch_norm\" not implemented for 'Long'"),
    ],
    ids=["linear", "batch norm"],
)
def test_inputs_that_are_whole_numbers_are_named_where_the_model_takes_none(model: Any, says: str) -> None:
    inputs, labels = np.arange(30).reshape(10, 3) % 5, np.arange(10) % 2
    with pytest.raises(ConfigError) as raised:
        Federation(model, clients={"a": (inputs, labels)}, test=(inputs, labels)).simulate(callbacks=[])
    hint = 'inputs are whole numbers: for a model that takes none, convert them by .astype("float32")'
    assert f"{says}; {hint}; look at" in str(raised.value)


def test_whole_numbers_are_no_fault_of_their_own_where_the_model_takes_them() -> None:
    inputs, labels = np.arange(30).reshape(10, 3) % 5, np.arange(10) % 2
    clients = {"a": (inputs, labels)}

    def model(classes: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(classes, 2))

    run = Federation(lambda: model(6), clients=clients, test=(inputs, labels)).simulate(versions=1, callbacks=[])
    assert run.version == 1
    with pytest.raises(ConfigError) as raised:
        Federation(lambda: model(5), clients=clients, test=(inputs, labels)).simulate(versions=1, callbacks=[])
    assert "shapes" in str(raised.value)
    assert "whole numbers" not in str(raised.value)


def test_a_training_that_diverges_is_a_failure_of_the_federation_and_no_bug() -> None:
    with pytest.raises(Exception, match=r"no device can train\n.* cannot train: training diverged"):
        simulated(plan={"learning_rate": 1000.0, "local_epochs": 50})


# --- baselines and searches


def test_a_metric_that_is_no_number_is_named_once() -> None:
    undefined = {"mae": lower(mae), "odd": higher(lambda outputs, _: outputs.mean() * float("nan"))}
    run = federation(clients={"alice": CLIENTS["alice"]}, metrics=undefined).simulate(versions=2, callbacks=[])
    assert run.lines == ("left out from version 0 on where it is no finite number: odd",)
    assert run.metrics.keys() == {"mae", "loss"}
    assert repr(run).startswith("<Run: 2 versions in ")
    assert repr(federation(clients={"alice": CLIENTS["alice"]})).startswith("<Federation of 1 device (")


def test_baselines_stand_beside_a_run(run: Run) -> None:
    fed = federation()
    central, alone = fed.centralized(epochs=8), fed.local_only(epochs=8)
    assert central.metrics["mae"] < 0.3 * central.rows[0]["mae"]
    assert central.metrics["mae"] <= min(alone.devices["mae"])
    assert alone.metrics["mae"] == pytest.approx(alone.devices["mae"].mean())
    assert alone.devices["samples"].tolist() == [30, 50]
    assert len(central.epochs) == 9
    with torch.no_grad():
        outputs = central.model(torch.from_numpy(TEST[0])).squeeze(1)
    assert float((outputs - torch.from_numpy(TEST[1])).abs().mean()) == pytest.approx(central.metrics["mae"], rel=1e-4)
    with pytest.raises(ConfigError, match="each device has a model of its own"):
        _ = alone.model
    with pytest.raises(ConfigError, match="needs results"):
        compare(run, central.table)
    both = compare(run, central, alone)
    assert both.table["result"].tolist() == ["federation", "centralized", "local only"]
    assert both.plot()._repr_png_()[:4] == b"\x89PNG"
    assert fed.centralized(epochs=8).rows == central.rows


def test_centralized_training_is_plain_gradient_descent_on_all_samples() -> None:
    """One full batch without momentum: w - lr dL/dw of all samples."""
    fed = federation()
    found = fed.centralized(epochs=1, plan={"batch_size": 80, "momentum": 0.0, "learning_rate": 0.1})
    start = {name: torch.from_numpy(each) for name, each in fed.task.initial(0).items()}
    net = linear()
    net.load_state_dict(start)
    inputs, targets = (torch.from_numpy(np.concatenate([each[part] for each in CLIENTS.values()])) for part in (0, 1))
    nn.functional.mse_loss(net(inputs).squeeze(1), targets).backward()
    assert found.tensors is not None
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        expected = start[name] - 0.1 * parameter.grad
        assert torch.allclose(torch.from_numpy(found.tensors[name]), expected, atol=1e-6)


def test_a_sweep_has_the_mean_over_seeds_of_each_combination() -> None:
    fed = federation()
    found = sweep(fed, {"plan.learning_rate": [0.001, 0.02], "merge.buffer_size": [1, 2]}, seeds=2, versions=2)
    table = found.table
    assert len(table) == 4
    assert table["seeds"].tolist() == [2] * 4
    runs = [
        simulated(fed, versions=2, seed=seed, plan={"learning_rate": 0.02}, merge={"buffer_size": 2}) for seed in (0, 1)
    ]
    assert table["mae"].iloc[3] == pytest.approx(np.mean([run.metrics["mae"] for run in runs]))
    best = table.sort_values("mae").iloc[0]
    assert found.best() == {name: best[name] for name in ("plan.learning_rate", "merge.buffer_size")}
    assert best["plan.learning_rate"] == 0.02
    assert found.plot()._repr_png_()[:4] == b"\x89PNG"


def test_tuning_finds_the_better_rate_and_prunes_what_is_worse() -> None:
    fed = federation()
    found = tune(fed, {"plan.learning_rate": (1e-4, 0.1, "log")}, trials=9, versions=3)
    table = found.table
    assert found.best["plan.learning_rate"] > 0.01
    assert set(table["state"]) == {"complete", "pruned"}
    assert table.loc[table["state"] == "pruned", "versions"].max() < 3
    assert found.value == pytest.approx(table.loc[table["state"] == "complete", "mae"].min(), abs=1e-6)
    again = tune(fed, {"plan.learning_rate": (1e-4, 0.1, "log")}, trials=9, versions=3)
    assert again.best == found.best


@pytest.mark.extended
def test_the_code_of_the_notebook_page_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 9
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script), run_name="__main__")
    assert names["run"].best_version > 0
    assert names["central"].metrics["accuracy"] > 0.9
    assert names["wards"].devices == ("device-0", "device-1", "device-2")
    assert load_task(f"{tmp_path}/my_task.py:TASK").name == "federation"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["alice", "bob", "carol"]
