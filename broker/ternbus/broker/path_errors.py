"""What an error of the system says about a path: what could not be done, to what, why, and what to do."""

import errno
import shlex
from pathlib import Path
from typing import Final

from ternbus.broker.errors import FORBIDDEN

DISK: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
WRITES: Final = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what comes of nothing but a write
WRITABLE_AGAIN: Final = (
    "if it was writable before, look at dmesg for errors of the disk, check it with fsck, and mount it for writing"
)
MAKE_ROOM: Final = "make room or choose another disk"
ON_THE_WAY: Final = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}


def sentence(error: OSError, path: str | Path, what: str = "") -> str:
    """Begins with ``what`` could not be done, where the caller knows it; ``path`` is for an error that names none."""
    name = str(error.filename or path)
    return f"{what or _attempt(error)}{name}: {_reason(error, Path(name))}"


def _attempt(error: OSError) -> str:
    return "cannot write " if error.errno in WRITES else "cannot use "


def _reason(error: OSError, path: Path) -> str:
    """The system's words, or plainer ones that a look at the path gives, and what to do where that is known."""
    said = error.strerror or str(error)
    if error.errno in FORBIDDEN:
        return f"{said}; check the permissions of the file and of its folder"
    if error.errno == errno.EROFS:
        return f"{said}; choose another place; {WRITABLE_AGAIN}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"{said}; {MAKE_ROOM}"
    if error.errno == errno.EISDIR and path.is_dir():
        return "it is a folder, not a file; give the path of a file"
    if error.errno in ON_THE_WAY:
        return _in_the_way(path) or said
    return said


def _in_the_way(path: Path) -> str:
    """Why a path leads nowhere: a file where a folder is needed, or a folder that is missing; empty if neither."""
    for each in (*reversed(path.parents), path):
        if each.exists() and not each.is_dir():
            return f"{'it' if each == path else each} is a file, not a folder; give another path"
    return "" if path.parent.exists() else f"there is no folder {path.parent}; make it, or correct the path"


def quoted(path: Path) -> str:
    """The path as a shell takes it, for the commands in errors."""
    return shlex.quote(str(path))
