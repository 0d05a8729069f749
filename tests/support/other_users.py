"""Whether other users of this machine can run Python and Ternbus, as root's commands on their folders need it."""

import os
import stat
import sys
from pathlib import Path

import pytest
import typer

import ternbus

OTHER = 12_345  # no user of this machine


def closed_to_others() -> Path | None:
    """The first place on the way to Python, its libraries or Ternbus that other users cannot read."""
    python = (Path(sys.executable), Path(sys.executable).resolve(), Path(sys.prefix), Path(sys.base_prefix))
    for place in (*python, Path(typer.__file__).parent, *map(Path, ternbus.__path__)):
        for each in (place, *place.parents):
            if each.stat().st_mode & (stat.S_IROTH | stat.S_IXOTH) != stat.S_IROTH | stat.S_IXOTH:
                return each
    return None


_CLOSED = closed_to_others()
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
readable_by_others = pytest.mark.skipif(_CLOSED is not None, reason=f"other users cannot read {_CLOSED}")
