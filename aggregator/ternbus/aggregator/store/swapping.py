"""The replacement of a folder's state by another. After a kill at any moment `settle` makes it the old or the new one.

The new state is prepared as a folder in DIR, and the old state is kept in DIR. Between the two there is no ledger, and
every command tells the operator to finish the replacement.
"""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker import files, store_format
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError

REPLACED: Final = "replaced"  # by a restore; with the time behind it: what was there before
DAMAGED: Final = "damaged"  # replaced by a repair
COMING: Final = "coming.partial"
STAMP: Final = "%Y%m%dT%H%M%SZ"


def swap(partial: Path, directory: Path, old: Iterable[Path], called: str) -> Path | None:
    """Move ``old`` out of a folder and all of ``partial`` into it; the folder that keeps ``old``, if there was any.

    The caller holds the folder's lock, and has settled it.
    """
    for path in partial.rglob("*"):
        files.sync(path)
    files.sync(partial)
    if moving := sorted(old, key=_is_not_ledger):  # the ledger first: without it there is none
        aside = directory / f"{called}.partial"
        aside.mkdir(mode=0o700)
        for path in moving:
            path.rename(aside / path.name)
            reached("moved-aside")
        files.sync(aside)
        files.sync(directory)
    partial.rename(directory / COMING)
    files.sync(directory)
    reached("coming")
    return _finish(directory)


def settle(directory: Path) -> bool:
    """Go on where a process was killed in `swap`: what came is put in its place, or else all is put back.

    Returns whether something new was put in its place.
    """
    if (directory / COMING).exists():
        _finish(directory)
        return True
    for aside in _leaving(directory):
        for path in sorted(aside.iterdir(), key=_is_not_ledger, reverse=True):
            path.rename(directory / path.name)
        aside.rmdir()
        files.sync(directory)
    return False


def check(directory: Path) -> None:
    """Raise ConfigError for a folder whose ledger was being replaced."""
    if not (directory / LEDGER).exists() and ((directory / COMING).exists() or _leaving(directory)):
        raise ConfigError(f"a restore or a repair of {directory} was cut short: run it again, and nothing is lost")


def _finish(directory: Path) -> Path | None:
    for copy in store_format.copies(directory / COMING):
        if (directory / copy.name).exists():  # of what was there before; this one is of a backup, which is elsewhere
            shutil.rmtree(copy)
    for path in sorted((directory / COMING).iterdir(), key=_is_not_ledger, reverse=True):
        if path.name == LEDGER:
            files.sync(directory)
            reached("ledger-coming")
        path.rename(directory / path.name)
    files.sync(directory)
    reached("ledger-moved")
    kept = None
    for aside in _leaving(directory):
        kept = _unused(directory, aside.stem)
        aside.rename(kept)
    (directory / COMING).rmdir()
    files.sync(directory)
    return kept


def _leaving(directory: Path) -> list[Path]:
    return [path for called in (REPLACED, DAMAGED) if (path := directory / f"{called}.partial").exists()]


def _unused(directory: Path, called: str) -> Path:
    stamp, number = time.strftime(STAMP, time.gmtime()), 1
    path = directory / f"{called}-{stamp}"
    while path.exists():
        number += 1
        path = directory / f"{called}-{stamp}-{number}"
    return path


def _is_not_ledger(path: Path) -> bool:
    return path.name != LEDGER
