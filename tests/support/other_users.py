"""A Python with Ternbus that other users of this machine can run, as root's commands on their folders need it."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import typer

import ternbus

OTHER: Final = 12_345  # no user of this machine
PORTIONS: Final = [Path(each) for each in ternbus.__path__ if Path(each).is_dir()]  # a component's folder each
_LIBRARIES: Final = Path(typer.__file__).parent.parent


def _closed(*places: Path) -> Iterator[Path]:
    """What other users cannot read on the way to these places."""
    for place in places:
        for each in (place, *place.parents):
            if each.stat().st_mode & (stat.S_IROTH | stat.S_IXOTH) != stat.S_IROTH | stat.S_IXOTH:
                yield each


def _pythons() -> Iterator[Path]:
    """The Python of these tests, if others can run it; else the system's of the same version."""
    own = (Path(sys.executable), Path(sys.executable).resolve(), Path(sys.prefix), Path(sys.base_prefix))
    if not any(_closed(*own)):
        yield Path(sys.executable)
    system = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    if system.exists():
        yield system


PYTHON: Final = str(next(_pythons(), sys.executable))


def environment(*roots: Path) -> dict[str, str]:
    """For a process of `PYTHON` that takes Ternbus from these folders."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*roots, _LIBRARIES)))}


ENVIRONMENT: Final = environment(*(each.parent for each in PORTIONS))
_CLOSED: Final = next(_closed(Path(PYTHON), Path(PYTHON).resolve(), _LIBRARIES, *PORTIONS), None)
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
readable_by_others = pytest.mark.skipif(_CLOSED is not None, reason=f"other users cannot read {_CLOSED}")
