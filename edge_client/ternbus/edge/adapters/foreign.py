"""What all adapters need around code of other libraries: fixed random numbers, and arguments that are functions."""

import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ternbus.broker.errors import ConfigError

SEEDS = 2**32  # numpy's global generator takes no larger seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and (if it is loaded) torch, and restore their states after.

    Code that was written for one machine draws from them, and must give the same model for the same seed.
    """
    torch: Any = sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that users' code has
    state = torch.get_rng_state() if torch is not None else None
    random.seed(seed)
    np.random.seed(seed % SEEDS)  # noqa: NPY002 - likewise
    if torch is not None:
        torch.manual_seed(seed)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # the threads of processes side by side would wait for each other by spinning
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 - likewise
        if torch is not None and state is not None:
            torch.set_rng_state(state)


def check_functions(task: str, **functions: object) -> None:
    """Raise `ConfigError` for an argument of a task that is no function, and is not None."""
    for name, given in functions.items():
        if given is not None and not callable(given):
            raise ConfigError(f"the task {task}: {name} is {type(given).__name__}, but must be a function")


def check_tables(task: str, **tables: object) -> None:
    """Raise `ConfigError` for an argument of a task that is no dict."""
    for name, given in tables.items():
        if not isinstance(given, Mapping):
            raise ConfigError(f"the task {task}: {name} is {given!r}, but must be a dict")


def check_lists(task: str, **lists: object) -> None:
    """Raise `ConfigError` for an argument of a task that is no list of texts, and is not None."""
    for name, given in lists.items():
        if given is None:
            continue
        if (
            isinstance(given, str)
            or not isinstance(given, Collection)
            or not all(isinstance(one, str) for one in given)
        ):
            raise ConfigError(f"the task {task}: {name} is {given!r}, but must be a list of texts")
