"""The free share of the file system of a directory."""

import os
from pathlib import Path


def free(directory: Path) -> float:
    """The part of it that this user may fill, from 0 to 1; 1 where the file system does not say."""
    try:
        about = os.statvfs(directory)
    except OSError:  # what is read or written there says more
        return 1.0
    return about.f_bavail / about.f_blocks if about.f_blocks else 1.0
