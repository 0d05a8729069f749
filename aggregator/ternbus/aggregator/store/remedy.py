"""What the operator is told to do about damaged or missing files, as the end of an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ternbus.broker import files
from ternbus.broker.errors import CorruptError
from ternbus.broker.path_errors import quoted

BROKER: Final = "broker"  # the folder of the broker that `ternbus aggregator up` made


def start_command(directory: Path) -> str:
    """The command that starts what is in the directory: `run` would wait for the broker that `up` made there."""
    return "up" if (directory / BROKER).is_dir() else "run"


def remedy(directory: Path) -> str:
    """The commands for a directory that holds what was never written to it."""
    shown = quoted(directory)
    return (
        f"run `ternbus aggregator check {shown}` to see what is damaged, then restore it from a backup or run "
        f"`ternbus aggregator repair {shown}`"
    )


def restore_backup(directory: Path) -> str:
    """The command for a directory of which too little is left."""
    return f"restore a backup: ternbus aggregator restore BACKUP {quoted(directory)}"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """CorruptError where DIR/FOLDER/FILE is missing; StorageError where the disk cannot read it."""
    with files.storing(path):
        try:
            yield
        except FileNotFoundError as error:
            raise CorruptError(f"cannot read {path}: {error.strerror}; {remedy(path.parent.parent)}") from error
