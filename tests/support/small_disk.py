"""Disks that take nothing: without room, where the command's first argument is the most bytes of a file; read-only."""

import os
from pathlib import Path

import pytest

LIMITED = (
    "import resource, signal, sys\n"
    "from ternbus.command import main\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
    "main(sys.argv[2:])\n"
)


def make_read_only(patch: pytest.MonkeyPatch) -> None:
    """Have the system say that every file system is mounted for reading only; writes succeed all the same."""
    told = os.statvfs

    def read_only(folder: Path) -> os.statvfs_result:
        found = told(folder)
        return os.statvfs_result((*found[:8], found.f_flag | os.ST_RDONLY, *found[9:]))

    patch.setattr(os, "statvfs", read_only)
