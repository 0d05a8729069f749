"""Other processes for a task in memory, which travels to each of them by cloudpickle.

Those of this machine are spawned, as all of ours are: a forked process would have locks of torch's threads, and of
Jupyter's, that nobody releases. Lambdas, and what a notebook's cells define, have no module that another process could
import, so the standard pickle does not carry them. Nothing is written to a disk, and nothing leaves this machine,
except to the Ray cluster that the caller names.
"""

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import Task
from ternbus.edge.learn.task_loader import described
from ternbus.lab.notebook.frames import library
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.computation import Computation
from ternbus.lab.virtual.training import Place, Placing

MAIN_NAMES: Final = ("__file__", "__spec__")


def place_of(
    how: Computation, scenario: Scenario, task: Task, say: Callable[[str], None]
) -> AbstractContextManager[Place | Placing | None]:
    """The place where a task in memory trains. Raises `ConfigError` if it must travel and cannot."""
    if not how.elsewhere:
        return how.place(scenario, say)
    packed = _packed(task)
    with _main_unseen():
        return how.place(scenario, say, partial(pickle.loads, packed))


def _packed(task: Task) -> bytes:
    try:
        packed: bytes = library("cloudpickle", "'ternbus[notebook]'").dumps(task)
    except ConfigError:
        raise
    except Exception as error:  # of any object's own code
        raise ConfigError(
            f"the task cannot travel to a worker process ({described(error)}): use jobs=1, or leave what holds a file, "
            "a lock or a connection out of the model, the data and the functions"
        ) from error
    return packed


@contextmanager
def _main_unseen() -> Iterator[None]:
    """Processes that start in this block do not run the caller's script again, which cloudpickle does not need."""
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {name: vars(main).pop(name) for name in MAIN_NAMES if name in vars(main)}
    main.__spec__ = None  # which multiprocessing reads
    try:
        yield
    finally:
        vars(main).update(kept)
