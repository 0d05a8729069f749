"""Why the code of a task failed, in words for the device's owner: its data, the memory, or a bug."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ternbus.broker.errors import WRONG_PATH, ConfigError, FederationError, StorageError
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.learn.task_loader import code_errors, described, location_of
from ternbus.edge.plan.plan import Plan

TRACE_CHARS: Final = 10_000
IN_BATCH: Final = "in batch "
LOOK_AT: Final = "look at the task's model, loss and data"  # where no line of the task is in the traceback
NO_MEMORY: Final = ("out of memory", "not enough memory", "can't allocate memory")  # as PyTorch says it


def describe(error: BaseException) -> str:
    """The reason and what to do, in one line. For a bug, file and line of the task's own code are named.

    Without one, as where a layer of the model does not take the data, it says what to look at.
    """
    if isinstance(error, FederationError):
        return " ".join(str(error).split())
    if is_memory(error):
        return f"out of memory ({described(error)}): lower the plan's batch_size, or give the device less data"
    if isinstance(error, OSError) and error.filename is not None:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return f"{'missing data' if missing else 'cannot read data'}: {error.filename}: {error.strerror}"
    place = location_of(error)
    if place is None:
        return f"a bug in the task: {described(error)}{_batch_of(error)}; {LOOK_AT}"
    return f"a bug in the task: {Path(place[0]).name}, line {place[1]}: {described(error)}{_batch_of(error)}"


def note_batch(error: BaseException, number: int, count: int) -> None:
    """Have `describe`, and the traceback, say in which batch of a training it was raised, counted from 1."""
    error.add_note(f"{IN_BATCH}{number} of {count}")


def _batch_of(error: BaseException) -> str:
    """The note, in brackets; empty without one. What is not ours, such as notes of the task, is left out."""
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str) and note.startswith(IN_BATCH)]
    return f" ({notes[0]})" if notes else ""


@contextmanager
def looking_at_data(plan: Plan) -> Iterator[None]:
    """Around what a trainer does with data: whatever they bring about is a `TrainingError` where failures are hidden.

    A `ConfigError` has the device send nothing, and says that no data matter: the task cannot train by the plan.
    """
    try:
        yield
    except ConfigError as error:
        if not plan.hides_failures:
            raise
        raise TrainingError(str(error)) from error


@contextmanager
def explained(task: str, *, during: str = "", lacks_data: bool = False) -> Iterator[None]:
    """One line in place of any exception of the task's code that ends the process.

    `StorageError` if the disk or the memory may serve another time, else `ConfigError`. ``during`` is what was done, if
    the reader does not know. ``lacks_data``: no folder of data was named, which may be the reason.
    """
    fails = f"the task {task} fails in {during}" if during else f"the task {task} fails"
    try:
        yield
    except TrainingError as error:  # of an evaluation, which nobody tries again
        raise ConfigError(f"{fails}: {describe(error)}") from error
    except FederationError:
        raise
    except code_errors() as error:
        text = f"{fails}: {describe(error)}"
        if is_memory(error) or (isinstance(error, OSError) and error.errno not in WRONG_PATH):
            raise StorageError(text) from error
        raise ConfigError(text + data_hint(error, lacks_data=lacks_data)) from error


def data_hint(error: BaseException, *, lacks_data: bool) -> str:
    """What to do if the task's own code fails because no folder of data was named."""
    likely = isinstance(error, TypeError | AttributeError | OSError) and location_of(error) is not None
    return "; if it needs data, name their folder with --data" if lacks_data and likely else ""


def trace_of(error: BaseException) -> str:
    """The traceback of a bug; empty for any failure that `describe` names whole."""
    if isinstance(error, FederationError | OSError) or is_memory(error):
        return ""
    return "".join(traceback.format_exception(error)).rstrip()[-TRACE_CHARS:]


def is_memory(error: BaseException) -> bool:
    """Whether it says that the memory, of the machine or of its accelerator, does not suffice."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in described(error) for text in NO_MEMORY)
    )
