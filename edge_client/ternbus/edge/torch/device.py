"""The processor that trains: the CPU, or an accelerator that this machine has."""

import os
import re
from functools import cache
from typing import Final

import torch

from ternbus.broker.errors import ConfigError

AUTO: Final = "auto"
_NAME: Final = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


@cache
def chosen(name: object) -> torch.device:
    """The device of this name; for "auto" the first accelerator, else the CPU.

    Raises `ConfigError` for a name of no device, or of one that this machine does not have.
    """
    if name == AUTO:
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"device is {name!r}: it must be auto, cpu, cuda, cuda:N or mps")
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= (found := torch.cuda.device_count()):
        raise ConfigError(f'device is {name!r}, but this machine has {found} CUDA devices: use "auto" or "cpu"')
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError('device is "mps", which this machine does not have: use "auto" or "cpu"')
    return torch.device("cuda:0" if name == "cuda" else name)  # which has 8 bits for the number, so that 256 would be 0


def generators(device: torch.device) -> list[int]:
    """The numbers of the accelerators whose random numbers a training draws from, for `torch.random.fork_rng`."""
    return [device.index] if device.type == "cuda" else []


def threads() -> int:
    """The number of threads: `OMP_NUM_THREADS`, or one, since OpenMP's threads wait by spinning.

    If another process uses the same processors, two spinning threads are many times slower than one, and models of this
    size gain little from the second.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else 1


def free(device: torch.device) -> None:
    """Return unused memory, after an attempt that had too little."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
