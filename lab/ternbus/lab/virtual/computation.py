"""How the trainings of a simulation are computed: in this process, in several, on a cluster, or several at once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import Task
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.ray_cluster import RayCluster
from ternbus.lab.virtual.training import Place, Placing
from ternbus.lab.virtual.vectorised import Vectorised
from ternbus.lab.virtual.workers import GroupWorkers, Workers

RAY: Final = "ray://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """`jobs` is a number of processes of this machine, or the address of a Ray cluster, ray://HOST:PORT.

    `vectorise` is the number of devices that a process trains at once; then this one is one of `jobs`. Raises
    `ConfigError` for any other value, and for vectorised training on a cluster.
    """

    jobs: int | str = 1
    vectorise: int = 1

    def __post_init__(self) -> None:
        jobs: object = int(self.jobs) if isinstance(self.jobs, str) and self.jobs.isdecimal() else self.jobs
        is_number, is_address = type(jobs) is int and jobs > 0, isinstance(jobs, str) and jobs.startswith(RAY)
        if not (is_number or is_address):
            raise ConfigError(f"jobs is {self.jobs!r}: write a whole number from 1, or {RAY}HOST:PORT of a Ray cluster")
        object.__setattr__(self, "jobs", jobs)
        if type(self.vectorise) is not int or self.vectorise < 1:
            raise ConfigError(f"vectorise is {self.vectorise!r}, but must be a whole number from 1")
        if self.vectorise > 1 and is_address:
            raise ConfigError("a Ray cluster trains each device by itself: leave out vectorise, or name processes")

    @property
    def elsewhere(self) -> bool:
        """Whether other processes train."""
        return self.jobs != 1

    def place(
        self, scenario: Scenario, say: Callable[[str], None], load: Callable[[], Task] | None = None
    ) -> AbstractContextManager[Place | Placing | None]:
        """The place, as of `Simulation`. ``load`` takes the place of loading the task by its name elsewhere."""
        if isinstance(self.jobs, str):
            return RayCluster(scenario, self.jobs, load)
        if self.vectorise > 1:
            others = GroupWorkers(scenario, self.jobs - 1, load) if self.jobs > 1 else None  # which start here
            return _vectorised(partial(Vectorised, most=self.vectorise, say=say, others=others), others)
        return Workers(scenario, self.jobs, load) if self.jobs > 1 else nullcontext()


@contextmanager
def _vectorised(placing: Placing, others: GroupWorkers | None) -> Iterator[Placing]:
    with others or nullcontext():
        yield placing
