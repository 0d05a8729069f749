"""Memory that a process frees and soon takes again: the C library keeps it, in place of giving it back each time."""

import ctypes
import os
from typing import Final

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST: Final = 2**25  # the most that every glibc takes for M_MMAP_THRESHOLD
OWN: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # of the environment


def keep_freed(kept_bytes: int, largest: int = LARGEST) -> None:
    """Have the process keep up to so many bytes that it frees, for the next version or step of training.

    A piece above ``largest`` bytes goes back at once; an old glibc takes no more than LARGEST there. glibc would give
    smaller ones back each time, too, and the system clears each page anew. Other C libraries have no `mallopt`, and are
    left as they are; so is glibc where the environment says how it allocates. Either limit alone would fix the other
    one at its default, where it is worst.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for name in OWN):
        return
    if any(mallopt(M_MMAP_THRESHOLD, limit) for limit in (largest, LARGEST)):
        mallopt(M_TRIM_THRESHOLD, kept_bytes)
