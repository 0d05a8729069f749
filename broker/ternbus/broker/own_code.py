"""Which frames of a traceback are of the user's own code: of a task, a script or a cell of a notebook."""

import re
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Final

OURS: Final = "ternbus"  # a namespace package: a folder of this name would become a part of it
STANDARD_LIBRARY: Final = traceback.__file__.removesuffix("traceback.py")
TRAVELLED: Final = "<dynamic-code>"  # the file of a notebook's function that cloudpickle has brought to this process
FRAME: Final = re.compile(r'^  File "(.+)", line [0-9]+, in .*\n(?:    .*\n)*', re.MULTILINE)  # of a traceback's text
CELL: Final = "<ipython-input-"  # of IPython in a terminal; a notebook's cells have a path


def is_own(file: str) -> bool:
    """Whether the file is of the user's code, and not of an installed package or of Python."""
    is_file = file[:1] != "<" and "-packages" not in file and not file.startswith(STANDARD_LIBRARY)
    return is_file or file == TRAVELLED or file.startswith(CELL)


def own_frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of the traceback that run the user's own code, and their lines, the outermost first."""
    return ((frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _runs_own(frame))


def own_part(trace: str) -> str:
    """A traceback's text without the frames of Ternbus, of installed packages and of Python."""
    components = [module for name, module in [*sys.modules.items()] if re.fullmatch(rf"{OURS}\.\w+", name)]
    roots = tuple(f"{root}/" for each in components for root in getattr(each, "__path__", ()))
    return FRAME.sub(lambda frame: frame[0] if is_own(frame[1]) and not frame[1].startswith(roots) else "", trace)


def _runs_own(frame: FrameType) -> bool:
    """By name, Ternbus is known wherever its source lies, also where it is installed as editable."""
    spec = frame.f_globals.get("__spec__")  # the name of a module that runs as a program is `__main__`
    top = str(getattr(spec, "name", frame.f_globals.get("__name__", ""))).partition(".")[0]
    return top != OURS and is_own(frame.f_code.co_filename)
