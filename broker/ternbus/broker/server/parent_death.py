"""Run a command that ends with its parent process, even if the parent is killed; a script that needs only stdlib.

A parent that is killed with SIGKILL cannot end its children. On Linux, prctl(PR_SET_PDEATHSIG) makes the kernel send
a signal to the child at that moment. The child itself must make the call. The setting is kept over exec, and lost
when the process changes its user, so the command must not do that. The call is not made in a ``preexec_fn``: running
Python after a fork in a process with threads may deadlock.
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
    """The command line that runs ``arguments`` and ends with this process, whose calling thread must not end before."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *(os.fspath(each) for each in arguments)]


def tie(parent: int) -> None:
    """Make this process end with its parent; no effect on systems other than Linux."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # the parent ended before the call
            sys.exit(1)


def main(parent: int, arguments: list[str]) -> None:
    """Replace this process with the command, tied to ``parent``."""
    tie(parent)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (wanted, hard)
    )  # each connection needs a descriptor; the usual limit is 1,024
    os.execv(arguments[0], arguments)  # noqa: S606 - without a shell on purpose


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
