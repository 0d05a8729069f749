"""Backups of an aggregator's folder: made while a process serves it, checked, and named by federation and time."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration, checking, transport
from ternbus.aggregator.shell.administration import KEY, TOML
from ternbus.aggregator.store import copying, revocations, swapping
from ternbus.broker import files, toml
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError, CorruptError, StorageError
from ternbus.broker.files import expanded, load_toml, read_key
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.identity import Identity

MANIFEST: Final = checking.MANIFEST
PLACE: Final = "backups.toml"  # in an aggregator's folder: where its backups went
PLACES_MAX: Final = 16
NOT_COPIED: Final = "the list of revoked keys could not be copied beside the backups: "
LOCK: Final = "backup.lock"
SPREADING: Final = "revocations.lock"
SPREAD_WITHIN_S: Final = 60.0  # of a command, which has nothing else to do
FORMAT: Final = 1
BROKER: Final = (Path("broker", "broker.toml"), Path("broker", "tls"))  # of `ternbus aggregator up`


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished backup, those that were removed for it, and what it does not hold though the aggregator needs it."""

    path: Path
    version: int
    size_bytes: int
    removed: tuple[Path, ...]
    elsewhere: tuple[Path, ...]
    faults: tuple[str, ...]  # of the revocations beside backups: this one is whole all the same


def backup(directory: Path, out: Path, keep: int | None, software: str) -> Made:
    """Copy a folder to OUT/FEDERATION-TIME, and check the copy. ConfigError where it cannot be made.

    It has its name only when it is whole, durable and sound. The ``keep`` newest of this aggregator's backups stay.
    """
    settings = administration.load_settings(directory)
    public = Identity(read_key(directory / KEY)).public
    _check_place(directory, out, settings.federation)
    out.mkdir(parents=True, mode=0o700, exist_ok=True)
    held = files.lock(out / LOCK)
    if held is None:
        raise ConfigError(f"another backup is being made in {out}; try again when it is done")
    with held:
        path = out / f"{settings.federation}-{time.strftime(swapping.STAMP, time.gmtime())}"
        if path.exists():
            raise ConfigError(f"{path} is there already; try again in a second")
        for left in out.glob(f"{settings.federation}-*.partial"):  # of an attempt that was cut short
            shutil.rmtree(left)
        partial = path.with_name(f"{path.name}.partial")
        try:
            version = _fill(directory, partial, settings, public, software)
            _check(directory, partial)
            files.sync(partial)
            reached("backup-checked")
            partial.rename(path)
            reached("backup-renamed")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        files.sync(out)
        not_copied = spread_revocations(directory, settings.federation, out.resolve())
        faults = (*(NOT_COPIED + fault for fault in not_copied), *_remember(directory, out.resolve()))
        removed = _remove_old(out, settings.federation, public, keep)
    size_bytes = sum(each.stat().st_size for each in _files(path))
    return Made(
        path=path,
        version=version,
        size_bytes=size_bytes,
        removed=removed,
        elsewhere=_elsewhere(settings),
        faults=faults,
    )


def _check_place(directory: Path, out: Path, federation: str) -> None:
    """A backup within the folder is lost with it, and a backup is not to be removed by the next one of itself."""
    if out.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"{out} is in {directory}, and would be lost with it; name a folder outside it")
    if out.is_dir() and directory.resolve() in found_in(out.resolve(), federation):
        raise ConfigError(
            f"{directory} is a backup in {out}, not the aggregator's folder; to serve it, run: "
            f"ternbus aggregator restore {quoted(directory)} DIR"
        )


def _fill(directory: Path, partial: Path, settings: Settings, public: bytes, software: str) -> int:
    partial.mkdir(mode=0o700)
    version = copying.copy(directory, partial)
    wanted = [Path(name) for name in (KEY, TOML, revocations.FILE, *transport.FILES)]
    for source in (directory / each for each in (*wanted, *BROKER)):
        for each in _files(source) if source.is_dir() else [source]:
            if each.exists():
                target = partial / each.relative_to(directory)
                target.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
                with each.open("rb") as opened:
                    copying.copy_file(opened, target)
                files.sync(target.parent)
    about: dict[str, Any] = {
        "format": FORMAT,
        "federation": settings.federation,
        "aggregator_key": public.hex(),
        "version": version,
        "made_at": time.time(),
        "software": software,
        "files": {str(each.relative_to(partial)): files.digest(each).hex() for each in _files(partial)},
    }
    with files.replacing(partial / MANIFEST, mode=0o600) as manifest:
        files.write_text(manifest, toml.dumps(about, {("files",): "BLAKE2b-256 of each"}))
    return version


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _check(directory: Path, partial: Path) -> None:
    faults = checking.check(partial).faults
    if faults:
        raise CorruptError(
            f"the copy of {directory} is not sound, and was not kept: {faults[0]}; "
            f"run: ternbus aggregator check {quoted(directory)}"
        )


def _remember(directory: Path, out: Path) -> tuple[str, ...]:
    """Revocations are copied there from now on; why not, where the folder does not take that."""
    try:
        with files.storing(directory / PLACE):
            try:
                known = places(directory)
            except ConfigError:  # it is damaged, as `spread_revocations` says
                known = ()
            wanted = (*(each for each in known if each != out), out)[-PLACES_MAX:]
            if wanted != known:
                with files.replacing(directory / PLACE) as partial:
                    files.write_text(partial, toml.dumps({"out": list(map(str, wanted))}))
    except (ConfigError, StorageError) as error:
        return (f"later revocations will not be copied to {out}: {error}",)
    return ()


def places(directory: Path) -> tuple[Path, ...]:
    """Where backups of a folder went, the newest last; ConfigError where the file that says so is damaged."""
    path = directory / PLACE
    if not path.exists():
        return ()
    what_to_do = "it may be deleted: the next backup writes it anew"
    try:
        out = toml.loads(path.read_bytes(), str(path)).get("out")
    except ConfigError as error:
        raise ConfigError(f"{error}; {what_to_do}") from error
    named = [out] if isinstance(out, str) else out  # one place alone is of an older version
    if not isinstance(named, list) or not all(isinstance(each, str) and Path(each).is_absolute() for each in named):
        raise ConfigError(f"{path} does not name the folders of backups; {what_to_do}")
    return tuple(map(Path, named[-PLACES_MAX:]))


def _is_there(out: Path) -> bool:
    """A place with a mark of backups: where a disk is not mounted, its folder may be there, and empty."""
    return (out / LOCK).is_file()


def beside(out: Path, federation: str) -> Path:
    """The list of revoked keys beside a federation's backups."""
    return out / f"{federation}.{revocations.FILE}"


def spread_revocations(
    directory: Path, federation: str, *also: Path, patience_s: float = SPREAD_WITHIN_S
) -> tuple[str, ...]:
    """Copy the list of revoked keys beside all backups; what could not be copied, and why."""
    try:
        # the running process does so after a revocation, and the command that asked for it does, too
        held = files.lock(directory / SPREADING, patience_s=patience_s)
    except OSError as error:
        return (str(files.fault(error, directory / SPREADING)),)
    if held is None:
        return (f"another process is still copying it after {patience_s:.0f} s",)
    with held:
        return _spread_revocations(directory, federation, also)


def _spread_revocations(directory: Path, federation: str, also: Sequence[Path]) -> tuple[str, ...]:
    faults = []
    known: tuple[Path, ...] = ()
    try:
        known = places(directory)
    except OSError as error:
        faults.append(str(files.fault(error, directory / PLACE)))
    except ConfigError as error:
        faults.append(str(error))
    for out in dict.fromkeys((*known, *also)):
        path = beside(out, federation)
        try:
            listed = revocations.read(directory / revocations.FILE).keys.values()
            if listed and not _is_there(out):
                faults.append(f"{out} is away: mount it, or take it out of {directory / PLACE}")
            else:
                revocations.add(path, listed)
        except OSError as error:
            faults.append(str(files.fault(error, path)))
    return tuple(faults)


def found_in(out: Path, federation: str) -> list[Path]:
    """The finished backups of a federation, oldest first."""
    named = re.compile(re.escape(federation) + r"-\d{8}T\d{6}Z")
    return sorted(path for path in out.iterdir() if named.fullmatch(path.name) and (path / MANIFEST).exists())


def _remove_old(out: Path, federation: str, public: bytes, keep: int | None) -> tuple[Path, ...]:
    """Of this aggregator's; another one's may have the same federation's name."""
    ours = [path for path in found_in(out, federation) if _is_of(path, public)]
    removed = ours[: max(0, len(ours) - keep)] if keep is not None else []
    for path in removed:
        leaving = path.rename(path.with_name(f"{path.name}.partial"))  # half removed it must not look whole
        shutil.rmtree(leaving)
    return tuple(removed)


def _is_of(path: Path, public: bytes) -> bool:
    try:
        return load_toml(path / MANIFEST).get("aggregator_key") == public.hex()
    except ConfigError:
        return False


def _elsewhere(settings: Settings) -> tuple[Path, ...]:
    """What the settings name by a path outside the folder."""
    named = (settings.transport.authority, settings.transport.password_file)
    paths = (expanded(Path(each)) for each in named if each)
    return tuple(each for each in paths if each.is_absolute())
