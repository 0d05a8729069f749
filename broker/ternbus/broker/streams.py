"""Standard input, output and error as a process may find them: closed, or of an encoding that lacks characters."""

import codecs
import os
import sys
from io import TextIOWrapper
from typing import Final

ERRORS: Final = "ternbus"


def prepare_streams() -> None:
    """Let printing never raise an exception for a closed stream or for a character; call this first in a process.

    Python has None for a closed stream. The next file that is opened would get its number, and what a library prints
    would be written into that file. A file name that is not text is printed as the bytes that it has, and any other
    character that the encoding lacks as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    codecs.register_error(ERRORS, _encoded)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not a test's or a notebook's
            stream.reconfigure(errors=ERRORS)


def _encoded(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
