"""Memory that a process frees and soon takes again: the C library keeps it, in place of giving it back each time."""

import ctypes
import os
from typing import Final

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST: Final = 2**25  # the most that an old glibc takes for M_MMAP_THRESHOLD
LARGEST_32: Final = 2**19  # and on a processor of 32 bits
OWN: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")  # of the environment
TUNABLES: Final = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")  # of its GLIBC_TUNABLES


def keep_freed(kept_bytes: int, largest: int = LARGEST) -> None:
    """Have the process keep what it frees for the next version or step of training.

    It gives back what is free at the end of a thread's heap beyond ``kept_bytes``, and a piece above ``largest`` bytes
    at once; an old glibc takes no more than LARGEST there. By default glibc gives smaller ones back each time, too, and
    the system clears each page anew. Other C libraries have no `mallopt`, and are left as they are; so is glibc where
    the environment says how it allocates. Either limit alone would fix the other one at its default, where it is worst.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or any(name in os.environ for name in OWN) or any(name in tunables for name in TUNABLES):
        return
    if any(mallopt(M_MMAP_THRESHOLD, limit) for limit in (largest, LARGEST, LARGEST_32)):
        mallopt(M_TRIM_THRESHOLD, kept_bytes)
