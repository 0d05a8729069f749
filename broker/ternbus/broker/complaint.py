"""What a command says when it ends by an exception, and with which exit code."""

import sqlite3
import sys
from collections.abc import Callable
from typing import Final

from ternbus.broker.errors import WRONG_PATH, ConfigError, CorruptError, FederationError, ProtocolError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_FAILED
from ternbus.broker.path_errors import DISK, sentence
from ternbus.broker.streams import prepare_streams

NAMELESS: Final = "standard output, or a file that the system does not name"  # every file of ours is named


def complaint(error: Exception) -> tuple[str, int] | None:
    """The line that a command prints when it ends by this exception, and its exit code; None for a bug."""
    match error:
        case ConfigError() | CorruptError():
            return str(error), EXIT_CONFIG
        case ProtocolError():
            return None  # who reads what a peer sent handles it
        case FederationError() | sqlite3.Error():
            return str(error), EXIT_FAILED
        case BrokenPipeError():
            return None
        case OSError():
            return _of_the_system(error), EXIT_CONFIG if error.errno in WRONG_PATH else EXIT_FAILED
        case _:
            return None


def _of_the_system(error: OSError) -> str:
    if error.filename:
        return sentence(error, error.filename)
    return f"{error.strerror or error}{f': {NAMELESS}' if error.errno in DISK else ''}"


def end_in_words(main: Callable[[], None]) -> None:
    """Run the main function of a process without a command line, and let it end by an exception as a command does."""
    prepare_streams()
    try:
        main()
    except Exception as error:
        if (known := complaint(error)) is None:
            raise
        text, code = known
        sys.stderr.write(f"ternbus: {text}\n")
        sys.exit(code)
