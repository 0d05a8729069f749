"""Repair of a damaged folder: it goes on from the last sound version, with numbers that no device has seen."""

import shutil
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Save
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.versions import PublishedState, Versions, leap_of
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration, checking
from ternbus.aggregator.shell.administration import KEY
from ternbus.aggregator.store import control, merge_log, rebuilding, revocations, salvage, swapping, tags
from ternbus.aggregator.store.bodies import BODIES
from ternbus.aggregator.store.ledger import KINDS, LEDGER, Ledger
from ternbus.aggregator.store.remedy import restore_backup
from ternbus.aggregator.store.salvage import Salvaged, Sound
from ternbus.aggregator.store.vectors import VECTORS
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.files import read_key
from ternbus.broker.plural import counted
from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.merge_log import FIRST
from ternbus.broker.protocol.messages import PAUSED
from ternbus.broker.protocol.model_messages import SnapshotRef
from ternbus.broker.protocol.tensor_kinds import TensorKinds

STATE: Final = (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", BODIES, VECTORS, merge_log.FOLDER)
NAMED_MAX: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair did; ``aside`` is None where there was nothing to repair."""

    aside: Path | None
    version: int
    done: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def repair(directory: Path, *, clock_s: float | None = None) -> Repaired:
    """Replace what is damaged; what was there is kept in a folder beside.

    ``clock_s`` is the time of day, now by default.
    ConfigError where a process serves the folder, or its settings or key are damaged; CorruptError where no version
    is sound.
    """
    held = files.lock(directory / control.LOCK) if directory.exists() else None
    if held is None and directory.exists():
        raise ConfigError(f"another process serves {directory}; stop it first")
    with held or nullcontext():
        swapping.settle(directory)
        settings = administration.load_settings(directory)
        identity = Identity(read_key(directory / KEY))
        checked = checking.check(directory)
        if not checked.faults:
            return Repaired(aside=None, version=checked.version)
        partial = directory / "repairing.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            snapshots_only = all(".f32" in fault for fault in checked.faults)
            clock_s = time.time() if clock_s is None else clock_s
            done, lost, version = _make(
                directory, partial, settings, identity, clock_s=clock_s, snapshots_only=snapshots_only
            )
            left = checking.check(partial).faults
            if left:
                raise CorruptError(f"{directory} cannot be repaired: {left[0]}; {restore_backup(directory)}")
            old = [path for name in STATE if (path := directory / name).exists()]
            for path in [path for path in partial.iterdir() if path.name not in STATE]:
                path.unlink()  # it was for the check
            aside = swapping.swap(partial, directory, old, swapping.DAMAGED)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Repaired(aside=aside, version=version, done=tuple(done), lost=tuple(lost))


def _make(
    directory: Path, partial: Path, settings: Settings, identity: Identity, *, clock_s: float, snapshots_only: bool
) -> tuple[list[str], list[str], int]:
    """Snapshots alone are made anew with nothing lost; else a new ledger is made of what is sound."""
    _copy(directory, partial)
    if snapshots_only:
        with suppress(CorruptError), closing(Ledger(partial / LEDGER)) as ledger:
            return salvage.rebuild_snapshots(ledger), [], ledger.version
    found = salvage.salvage(directory, partial / "salvage", identity.public)
    sound = salvage.newest_sound(found, directory)
    if sound is None:
        raise CorruptError(f"{directory}: no version is sound; {restore_backup(directory)}")
    shutil.rmtree(partial / "salvage")
    shutil.rmtree(partial / VECTORS, ignore_errors=True)
    for path in partial.glob(f"{LEDGER}*"):
        path.unlink()
    lost, version = _rebuild(partial, found, sound, settings, identity, clock_s=clock_s)
    done = [f"the federation goes on from version {sound.version}, as version {version}, with a new server state"]
    return done, lost, version


def _copy(directory: Path, partial: Path) -> None:
    """What a check needs, too."""
    partial.mkdir(mode=0o700)
    for name in (*STATE, KEY, administration.TOML, revocations.FILE):
        source = directory / name
        if source.is_dir():
            shutil.copytree(source, partial / name)
        elif source.exists():
            shutil.copy2(source, partial / name)


def _rebuild(
    partial: Path, found: Salvaged, sound: Sound, settings: Settings, identity: Identity, *, clock_s: float
) -> tuple[list[str], int]:
    lost, newest = list(found.lost), found.newest
    state, slots = found.facts.get("state", PAUSED), int(found.facts.get("slots", settings.downlink.slots))
    facts = {
        "federation": settings.federation,
        "schema": sound.schema.encoded,
        "slots": slots,
        "segment": max([0, *(int(path.stem.partition("-")[0]) for path in (partial / BODIES).glob("*.bodies"))]) + 1,
        "state": state,
        "version": newest,
        # a number that is lost is above what a clock in nanoseconds gives (docs/protocol.md, section 6)
        "seq": int(found.facts.get("seq", min(time.time_ns(), COUNTER_MAX // 2))),
        "session": int(found.facts.get("session", min(time.time_ns(), COUNTER_MAX // 2))),
    }
    numbers = leap_of(newest, clock_s)
    carried = (
        KINDS,
        tags.FACT,
        tags.BEST_FACT,
        *((merge_log.ARCHIVES, merge_log.COMPARED_FROM) if found.log_is_whole else ()),
    )
    facts |= {name: found.facts[name] for name in carried if name in found.facts}
    if not found.has_all_that_is_logged:
        facts[merge_log.COMPARED_FROM] = newest + numbers
    if not found.log_is_whole:  # the log begins anew, without what was before
        shutil.rmtree(partial / merge_log.FOLDER, ignore_errors=True)
    with closing(Ledger.create(partial / LEDGER, facts)) as ledger:
        lost += rebuilding.rebuild(found, ledger)
        ledger.write(_leap(found, sound, settings, identity, facts, numbers=numbers))
        version = ledger.version
    gone = [row for row in found.rows["versions"] if row[0] > sound.version]
    lost += [f"version {row[0]}, of {counted(row[3], 'update')}" for row in gone]
    return lost[:NAMED_MAX], version


def _leap(
    found: Salvaged, sound: Sound, settings: Settings, identity: Identity, facts: dict[str, object], *, numbers: int
) -> list[records.Record]:
    """The sound version again, ``numbers`` above the newest one that anybody may have seen."""
    newest, seq, session = (int(str(facts[name])) for name in ("version", "seq", "session"))
    frames = FrameWriter(settings, identity, sound.schema, seq)
    frames.leap(numbers)
    model = Model(
        settings=settings,
        schema=sound.schema,
        version=newest,
        published=sound.vector,
        server=optimizer.init(settings.optimizer, sound.vector),
        kinds=TensorKinds(),  # nothing is merged here
    )
    last = found.log[max(found.log)].hash if found.log and found.log_is_whole else FIRST
    published = PublishedState(
        state=str(facts["state"]),
        snapshot=SnapshotRef(version=newest, parts=1, content_bytes=1, place=1),  # until the leap makes one
        snapshot_seq=seq,
        sizes={topic: len(payload) for topic, payload in found.rows["frames"]},
        head_frame=b"",
        slots=int(str(facts["slots"])),
        recipe=Recipe.of(settings),
        log_hash=last,
    )
    actions = Versions(settings=settings, model=model, published=published, frames=frames).leap(numbers)
    saved = [action.record for action in actions if isinstance(action, Save)]
    return [records.SessionBegun(session=session + numbers), *saved]
