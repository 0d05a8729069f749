"""Standard output for the JSON of a command alone, whatever the code of a task prints meanwhile."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import IO, Final

STDOUT: Final = 1
STDERR: Final = 2


@contextmanager
def json_output(wanted: bool) -> Iterator[IO[str]]:
    """The stream for a command's own output: standard output.

    If JSON is ``wanted``, all else that is printed in this block goes to standard error, since what a task prints is no
    JSON. This holds for its libraries in C and for processes that start in the block, too.
    """
    own = sys.stdout
    if not wanted:
        yield own
        return
    own.flush()
    if not _is_process_output(own):  # a test or a notebook has replaced it
        with redirect_stdout(sys.stderr):
            yield own
        return
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        with os.fdopen(kept, "w", encoding=own.encoding, errors=own.errors, closefd=False) as stream:
            yield stream
    finally:
        own.flush()  # what the task printed, while it still leads to standard error
        os.dup2(kept, STDOUT)
        os.close(kept)


def _is_process_output(stream: IO[str]) -> bool:
    try:
        return stream.fileno() == STDOUT
    except OSError:  # io.UnsupportedOperation
        return False
