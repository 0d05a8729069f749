"""The output folder of a lab run: the paths in it, and the removal of an earlier run's files."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import fault, lock

MARKER: Final = ".ternbus-lab.json"
ENTRIES: Final = (
    "aggregator", "broker", "devices", "helpers", "initial.safetensors", "invitations", "logs", "model.safetensors",
    "report.json", "report.png", "task.json",
)  # fmt: skip
_NAME: Final = re.compile(r"[a-z][a-z0-9.-]*")


class Output:
    """The output folder, locked for this run; every attribute is a path in it."""

    def __init__(self, folder: Path, lock: IO[bytes]) -> None:
        self.folder = folder
        self._lock = lock  # the lock holds while this file is open
        self.aggregator = folder / "aggregator"
        self.broker = folder / "broker"
        self.devices = folder / "devices"
        self.helpers = folder / "helpers"
        self.invitations = folder / "invitations"
        self.logs = folder / "logs"
        self.initial = folder / "initial.safetensors"
        self.task = folder / "task.json"
        self.model = folder / "model.safetensors"
        self.report = folder / "report.json"
        self.plot = folder / "report.png"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def device(self, name: str) -> Path:
        return self.devices / name

    def helper(self, name: str) -> Path:
        return self.helpers / name

    def invitation(self, name: str) -> Path:
        return self.invitations / f"{name}.toml"

    def release(self) -> None:
        self._lock.close()


def claim(folder: Path) -> Output:
    """Lock the folder and remove an earlier lab run's files, but no other files.

    Raises `ConfigError` if the folder has other files and no marker of a lab run, or if another run uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / MARKER
        if not marker.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and not from a lab run: give another folder with --out")
        held = lock(marker)
    except OSError as error:
        raise fault(error, folder, f"cannot write to {folder}; give another folder with --out: ") from error
    if held is None:
        raise ConfigError(f"another lab run is using {folder}: give another folder with --out")
    try:
        _take(folder, held)
    except BaseException:
        held.close()
        raise
    return Output(folder.resolve(), held)


def _take(folder: Path, marker: IO[bytes]) -> None:
    try:
        _remove(folder, _written(marker.read()))
    except OSError as error:
        raise fault(error, folder, "cannot replace; give another folder with --out: ") from error
    for name in ENTRIES:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} is not from a lab run: move it or give another folder with --out")
    marker.seek(0)
    marker.truncate()  # before all other files, so that a later run can replace an interrupted one
    marker.write(json.dumps({"wrote": ENTRIES}).encode() + b"\n")
    marker.flush()


def _written(text: bytes) -> list[str]:
    """The names in a marker, without names that lead out of the folder."""
    if not text:
        return []
    try:
        names = json.loads(text)["wrote"]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and _NAME.fullmatch(name)]


def _remove(folder: Path, names: Iterable[str]) -> None:
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
