"""Commands of `ternbus` in this process: as a user types them, without the second that a process takes to import."""

from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path

from typer.testing import CliRunner, Result

from ternbus.broker.complaint import complaint
from ternbus.command import app


def typed(folder: Path, *words: object, code: int = 0, environment: Mapping[str, str] | None = None) -> str:
    """All that a command prints that is typed in a folder; it must end with this exit code.

    Commands that serve until they are stopped, or replace their process as `ternbus edge run` does, are none of these.
    """
    done, complained = _ended(folder, words, environment)
    ended = done.exit_code if complained is None else complained[1]
    said = done.output if complained is None else f"{done.output}ternbus: {complained[0]}\n"
    assert ended == code, said
    return said


def printed(folder: Path, *words: object, environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a command that succeeds."""
    done, complained = _ended(folder, words, environment)
    assert (done.exit_code, complained) == (0, None), done.output
    return done.stdout


def _ended(
    folder: Path, words: tuple[object, ...], environment: Mapping[str, str] | None
) -> tuple[Result, tuple[str, int] | None]:
    """How a command ended, and the line and exit code of the exception that ended it; a bug is raised."""
    with chdir(folder):
        done = CliRunner().invoke(app, [*map(str, words)], env=environment)
        if not isinstance(done.exception, Exception):
            return done, None
        known = complaint(done.exception)  # in that folder: it may look at the path
    if known is None:
        raise done.exception
    return done, known
