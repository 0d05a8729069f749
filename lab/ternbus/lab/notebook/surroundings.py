"""What a run leaves as it was in the caller's process, and how Ctrl-C ends it."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import numpy as np
import torch


@contextmanager
def untouched(seed: int) -> Iterator[None]:
    """Random numbers of Python, numpy and torch that begin with ``seed``; afterwards the caller's go on as before.

    torch's number of threads, its default dtype and whether it records gradients are put back, too.
    """
    python, arrays, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()  # noqa: NPY002 - the caller's
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    accelerators = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=accelerators):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - for the functions of the user's that draw from it
            torch.manual_seed(seed)
            torch.set_grad_enabled(True)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002 - the caller's
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)


class Interrupt:
    """A context in which the first Ctrl-C sets `came`, and the second one raises `KeyboardInterrupt` as usual.

    In a thread that is not the main one Python delivers no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
