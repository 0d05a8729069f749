"""A simulation that trains on a Ray cluster of two nodes, one of which is killed: the model of a single process."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from stranger.servers import until
from support.page_story import free_port
from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.lab.scenario.scenario import End, Scenario
from ternbus.lab.virtual import ray_cluster

TASK = """
import os, time
from dataclasses import dataclass
from pathlib import Path

from ternbus.edge.tasks.digits_numpy import DigitsNumpy

NODE = os.environ.get("NODE_OF_TEST", "here")
MARKS = Path(__file__).with_name("marks")


class Trainer:
    def __init__(self, inner, stuck):  # the name of the node that it stays on until that is killed
        self.inner, self.stuck, self.samples = inner, stuck, inner.samples
        self.evaluate = inner.evaluate

    def train(self, *arguments, **named):
        (MARKS / NODE).touch()
        while self.stuck == NODE:
            time.sleep(0.1)
        return self.inner.train(*arguments, **named)


@dataclass(frozen=True)
class Marking(DigitsNumpy):
    stuck: str = ""

    def trainer(self, *, data, partition):
        return Trainer(super().trainer(data=data, partition=partition), self.stuck)


TASK, STUCK, LOST = Marking(), Marking(stuck="other"), Marking(stuck="head")
"""

SCRIPT = """
import numpy as np
from torch import nn
from ternbus.lab import Federation

rng = np.random.default_rng(0)
data = (rng.normal(size=(40, 3)).astype("f4"), rng.normal(size=40).astype("f4"))
fed = Federation(lambda: nn.Linear(3, 1), loss="mse", clients={{"a": data, "b": data}}, test=0.2)
runs = [fed.simulate(versions=2, callbacks=[], jobs=jobs) for jobs in (1, "{address}")]
print(all((runs[0].tensors[name] == runs[1].tensors[name]).all() for name in runs[0].tensors))
"""

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ternbus[ray]'")


def job() -> StartTraining:
    task = load_task("digits-numpy")
    model = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in model.items()})
    plan = Plan.from_meta(task.default_plan)
    return StartTraining(base=0, schema=schema, vector=to_vector(schema, model), residual=None, plan=plan, seed=1)


def setting(scenario: Scenario) -> ray_cluster._Setting:
    return ray_cluster._Setting(
        name=scenario.task,
        scenario=scenario,
        load=lambda: load_task(scenario.task),
        versions=ray_cluster._versions(),
        threads="1",
    )


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ternbus\[ray\]'"):
        ray_cluster.RayCluster(Scenario(), "ray://127.0.0.1:1")


class RayError(Exception):
    """As Ray's."""


class WorkerCrashedError(RayError):
    """As Ray's."""


def test_a_training_that_is_lost_is_told_from_a_cluster_that_is() -> None:
    """By the kinds of Ray's exceptions; each training of a real one is repeated before."""
    kinds = {"RayTaskError": type("RayTaskError", (RayError,), {}), "OutOfMemoryError": type("Memory", (RayError,), {})}
    exceptions = SimpleNamespace(RayError=RayError, WorkerCrashedError=WorkerCrashedError, **kinds)
    made = object.__new__(ray_cluster.RayCluster)
    made._address, made._ray = "ray://here:1", SimpleNamespace(exceptions=exceptions, get=throw)
    for error in (WorkerCrashedError("it died"), kinds["OutOfMemoryError"]("it was full")):
        with pytest.raises(
            FederationError, match=r"lost a training \(it (died|was full)\): give its nodes more memory"
        ):
            made._result(error)
    with pytest.raises(FederationError, match=r"was lost \(no answer\): start it again"):
        made._result(RayError("no answer"))


def throw(error: Exception) -> None:
    raise error


def test_a_node_with_other_packages_or_without_the_data_is_named() -> None:
    wanted = Scenario(task="digits-numpy", devices=2, end=End(versions=1))
    good = setting(wanted)
    other = replace(good, name="other", versions={**good.versions, "numpy": "1.0"})
    with pytest.raises(ConfigError, match=r"the node .* of the Ray cluster: it has numpy .*, and the simulation 1\.0"):
        ray_cluster._train_on_node(other, 0, job())
    with pytest.raises(ConfigError, match=r"the node .*: no Fashion-MNIST in nowhere"):
        ray_cluster._train_on_node(setting(replace(wanted, task="fashion-mnist", data=Path("nowhere"))), 0, job())
    assert isinstance(ray_cluster._train_on_node(good, 0, job()), TrainingFinished)


class Cluster:
    """Two nodes on this machine, with a processor each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port, self._client_port = free_port(), free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._start(
            "head", "--head", f"--port={self._port}", f"--ray-client-server-port={self._client_port}",
            "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={self._folder}",
        )  # fmt: skip
        self._until_it_has(1)
        self._start("other", f"--address=127.0.0.1:{self._port}")
        self._until_it_has(2)

    def kill_all(self) -> None:
        for node in reversed(self._nodes):
            self.kill(node)

    @property
    def head(self) -> subprocess.Popen[bytes]:
        return self._nodes[0]

    @property
    def other(self) -> subprocess.Popen[bytes]:
        return self._nodes[1]

    @property
    def address(self) -> str:
        return f"ray://127.0.0.1:{self._client_port}"

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def _start(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, "NODE_OF_TEST": name, "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                   "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", *arguments]  # fmt: skip
        with (self._folder / f"{name}.log").open("wb") as log:
            self._nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0))

    def _until_it_has(self, processors: int) -> None:
        look = f"import ray; ray.init({self.address!r}); print(ray.cluster_resources().get('CPU'))"

        def has() -> bool:
            found = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", look], check=False, capture_output=True, text=True
            )
            return found.stdout.strip() == f"{processors}.0"

        until(has, 180.0, f"a cluster with {processors} processors")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, as sockets need it
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def simulate(folder: Path, task: str, out: str, jobs: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ternbus", "lab", "simulate", "--task", f"my_task:{task}", "--devices", "4",
               "--versions", "3", "--jobs", jobs, "--out", out]  # fmt: skip
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def model_of(folder: Path, out: str, process: subprocess.Popen[str]) -> bytes:
    _, complaint = process.communicate(timeout=300)
    assert complaint == ""
    assert process.returncode == 0
    return (folder / out / "model.safetensors").read_bytes()


@needs_ray
@pytest.mark.slow
@pytest.mark.extended
def test_two_nodes_make_the_same_model_and_one_that_is_lost_loses_no_training(tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "my_task.py").write_text(TASK)
    marks = tmp_path / "marks"
    marks.mkdir()
    alone = model_of(tmp_path, "alone", simulate(tmp_path, "TASK", "alone", "1"))
    assert model_of(tmp_path, "two", simulate(tmp_path, "TASK", "two", cluster.address)) == alone
    assert {each.name for each in marks.iterdir()} == {"here", "head", "other"}

    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(address=cluster.address))
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert (ran.stderr, ran.stdout) == ("", "True\n")

    (marks / "other").unlink()
    running = simulate(tmp_path, "STUCK", "stuck", cluster.address)
    until((marks / "other").exists, 120.0, "a training on the node")
    cluster.kill(cluster.other)
    assert model_of(tmp_path, "stuck", running) == alone

    (marks / "head").unlink()
    running = simulate(tmp_path, "LOST", "lost", cluster.address)
    until((marks / "head").exists, 120.0, "a training on the head")
    cluster.kill(cluster.head)
    _, complaint = running.communicate(timeout=300)
    assert running.returncode == 1
    assert re.search(
        r"^ternbus: the Ray cluster at ray://127\.0\.0\.1:\d+ was lost \(.*\): start it again", complaint, re.MULTILINE
    )
