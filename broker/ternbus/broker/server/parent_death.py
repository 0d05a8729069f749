"""Run a command that ends when its parent does, however the parent ends; usable as a script: nothing but stdlib.

A parent that is killed with SIGKILL can clean up nothing. On Linux the kernel can be asked to send a signal to a child
at that moment. The request must come from the child, is kept over exec, and is dropped when a process changes its
user: so a command started through here must not do that. It is not made in a ``preexec_fn``, since forking a process
with threads to run Python in the child may deadlock.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Final

PR_SET_PDEATHSIG: Final = 1
OPEN_FILES: Final = 65536


def command(arguments: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The command line that runs ``arguments`` tied to the calling process, whose thread must outlive the command."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *(os.fspath(each) for each in arguments)]


def tie(parent: int) -> None:
    """Make this process end with its parent; on systems other than Linux do nothing."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it died before the request was made
            sys.exit(1)


def main(parent: int, arguments: list[str]) -> None:
    """Become the command."""
    tie(parent)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))  # a connection is a file; the usual limit is 1,024
    os.execv(arguments[0], arguments)  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
