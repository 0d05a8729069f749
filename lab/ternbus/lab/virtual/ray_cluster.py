"""Training of simulated devices on a Ray cluster: each training is a task of it, on one processor of some node.

A training is a function of its job, the scenario and the data alone. So Ray repeats one whose node is lost, and the
result is the same, bit for bit, wherever it is computed: by the same packages, on processors of the same kind.
"""

import logging
import os
import platform
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit
from uuid import uuid4

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.learn.failure import describe
from ternbus.edge.learn.task import Task
from ternbus.edge.learn.task_loader import absolute, code_errors, load_task
from ternbus.edge.shell.worker import TrainingResult
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.training import Awaited, Pair, Widths, computed, loaded

SAME: Final = ("ternbus", "numpy", "torch")  # packages that decide the bits of a training
THREADS: Final = "OMP_NUM_THREADS"
ANSWERS_S: Final = 10.0
RETRIES: Final = 5  # of a training whose node or process is lost: it may itself be what ends the process
START: Final = "start one with `ray start --head --ray-client-server-port=10001`"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What a node needs to train for one simulation."""

    name: str
    scenario: Scenario
    load: Callable[[], Task]
    versions: dict[str, str | None]
    threads: str


class RayCluster:
    """Training on the cluster at ``address``, ray://HOST:PORT. Every node has the scenario's data at the same path.

    ``load``, which must travel to a node, takes the place of loading the task by its name. Raises `ConfigError` without
    the package `ray`, and where no cluster answers.
    """

    def __init__(self, scenario: Scenario, address: str, load: Callable[[], Task] | None = None) -> None:
        self._ray, self._address = _library(), address
        if load is None:
            scenario = replace(scenario, task=absolute(scenario.task))
        if scenario.data is not None:
            scenario = replace(scenario, data=scenario.data.absolute())
        self._session = self._connected()
        setting = _Setting(
            name=uuid4().hex,
            scenario=scenario,
            load=load or partial(load_task, scenario.task),
            versions=_versions(),
            threads=os.environ.get(THREADS, "1"),
        )
        with self._readable():
            self._setting = self._ray.put(setting)
            self._train = self._ray.remote(num_cpus=1, max_retries=RETRIES)(_train_on_node)

    def _connected(self) -> Any:
        """The session. What answers at the address is looked at first: Ray itself waits half a minute."""
        try:
            place = urlsplit(self._address)
            socket.create_connection((place.hostname or "", place.port or 0), ANSWERS_S).close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong is in the exception too
                return self._ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of many kinds: its address, its version, its connection
            raise ConfigError(f"no Ray cluster can be used at {self._address} ({_line(error)}): {START}") from error

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:  # noqa: ARG002 - as of `Place`
        """Queue a training. The returned function raises `FederationError` if it, or the cluster, is lost."""
        with self._readable():
            return partial(self._result, self._train.remote(self._setting, device, job))

    def _result(self, reference: Any) -> TrainingResult:
        with self._readable():
            result: TrainingResult = self._ray.get(reference)
            return result

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Errors of a node as they are raised there, those of the cluster in words."""
        exceptions = self._ray.exceptions
        try:
            yield
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
            raise FederationError(
                f"the Ray cluster at {self._address} lost a training ({_line(error)}): give its nodes more memory, or "
                "look into their logs"
            ) from error
        except (exceptions.RayError, ConnectionError) as error:
            raise FederationError(
                f"the Ray cluster at {self._address} was lost ({_line(error)}): start it again, and repeat the command"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster, which drops unfinished trainings."""
        self._session.disconnect()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _library() -> Any:
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise ConfigError("a Ray cluster needs the package ray: pip install 'ternbus[ray]'") from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of its own arguments
    return ray


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in SAME:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # torch, which not every task needs
            found[package] = None
    return found


_loaded: dict[str, tuple[list[Pair], Widths]] = {}  # in a process of a node: the trainers of the last simulation


def _train_on_node(setting: _Setting, device: int, job: StartTraining) -> TrainingResult:
    if setting.name not in _loaded:
        _loaded.clear()
        try:
            _loaded[setting.name] = _trainers(setting)
        except code_errors() as error:
            raise ConfigError(f"the node {platform.node()} of the Ray cluster: {describe(error)}") from error
    own, widths = _loaded[setting.name]
    return computed(own[device], job, widths.of(device))


def _trainers(setting: _Setting) -> tuple[list[Pair], Widths]:
    """Of all devices, on a node. Raises `ConfigError` where its packages would give other bits."""
    for package, own in _versions().items():
        if own != (asked := setting.versions[package]):
            raise ConfigError(f"it has {package} {own}, and the simulation {asked}: install the same")
    os.environ[THREADS] = setting.threads
    return loaded(setting.scenario, setting.load())
