"""An aggregator's directory: made, opened, and changed by commands, whether or not a process serves it."""

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aggregator import downlink, events, optimizer, records, requests, transport
from aggregator import settings as configuration
from aggregator.core import Core
from aggregator.ledger import Ledger
from aggregator.outlet import Outlet
from aggregator.recovery import recover
from aggregator.settings import Settings
from broker.errors import ConfigError
from broker.identity import Identity, check_device
from broker.invitation import Invitation
from broker.messages import CLOSED, OPEN, PAUSED
from broker.schema import Schema, to_tensors, to_vector, vector_digest

KEY: Final = "aggregator.key"
TOML: Final = "aggregator.toml"
LEDGER: Final = "ledger.sqlite"
STATES: Final = {requests.PAUSE: PAUSED, requests.RESUME: OPEN, requests.CLOSE: CLOSED}


def create(
    directory: Path,
    *,
    federation: str,
    broker: str,
    model: Mapping[str, npt.NDArray[Any]],
    settings: Mapping[str, object] | None = None,
    dense: Sequence[str] = (),
    certificates: Path | None = None,
) -> Settings:
    """Make an aggregator: keys, settings, and version 0 from ``model`` (name -> array, any float type).

    ``certificates`` is a folder with its own ones, where no authority is set that makes them. Nothing is left behind
    where it fails. ConfigError where the directory holds one already, or cannot be written.
    """
    directory = directory.resolve()
    if (directory / LEDGER).exists() or (directory / KEY).exists():
        raise ConfigError(f"{directory} holds an aggregator already; choose another directory")
    table = configuration.with_overrides({"federation": federation, "broker": broker}, settings or {})
    checked = configuration.from_table(table, "--set")
    schema = Schema.of({name: array.shape for name, array in model.items()}, dense)
    vector = to_vector(schema, model)
    partial = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        _fill(partial, checked, schema, vector)
        transport.equip(partial, checked, certificates, directory)
        _move_into(partial, directory)
    except OSError as error:
        raise ConfigError(f"cannot make {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checked


def _fill(directory: Path, settings: Settings, schema: Schema, vector: npt.NDArray[np.float32]) -> None:
    identity = Identity.generate()
    identity.save(directory / KEY)
    (directory / TOML).write_text(configuration.dumps(settings), encoding="utf-8")
    facts = {"federation": settings.federation, "schema": schema.encoded, "slots": settings.downlink.slots}
    ledger = Ledger.create(directory / LEDGER, facts)
    try:
        _first_version(ledger, settings, identity, schema, vector)
    finally:
        ledger.close()


def _first_version(
    ledger: Ledger, settings: Settings, identity: Identity, schema: Schema, vector: npt.NDArray[np.float32]
) -> None:
    batch: list[records.Record] = []
    outlet = Outlet(settings, identity, schema, batch.append, 0)
    digest = vector_digest(vector)
    named, frames = outlet.snapshot(0, digest, vector, 0)
    head = outlet.head(version=0, digest=digest, snapshot=named, state=OPEN)
    server = optimizer.init(settings.optimizer.name, vector)
    encoding, body = downlink.encoded_block(downlink.next_block(schema, settings.downlink.codec, vector, vector))
    batch += [
        records.VersionMade(
            version=0,
            digest=digest,
            updates=0,
            staleness_mean=0.0,
            staleness_max=0,
            codec=settings.downlink.codec,
            encoding=encoding,
            body=body,
        ),
        records.SnapshotTaken(version=0, published=vector, server=server, named=named, optimizer=settings.optimizer),
        records.FramesKept(frames=(*frames, head)),
    ]
    ledger.write(batch)


def _move_into(partial: Path, directory: Path) -> None:
    """The finished directory in one step, or into an empty or foreign one file by file, the ledger last."""
    if not directory.exists():
        partial.rename(directory)
        return
    for name in (KEY, TOML, *transport.FILES, LEDGER):
        if (partial / name).exists():
            (partial / name).rename(directory / name)


def load_settings(directory: Path) -> Settings:
    if not (directory / LEDGER).exists():
        raise ConfigError(f"{directory} holds no aggregator; make one with: ternbus aggregator init {directory} …")
    return configuration.load(directory / TOML)


def open_core(directory: Path, ledger: Ledger, software: str) -> Core:
    """The core as the ledger has it, under the settings of now."""
    settings = load_settings(directory)
    if settings.federation != ledger.fact("federation"):
        raise ConfigError(
            f"{directory / TOML} says federation {settings.federation!r}, the ledger {ledger.fact('federation')!r}: "
            "a federation cannot be renamed"
        )
    return recover(ledger, settings, Identity.load(directory / KEY), software)


def invite(directory: Path, *devices: str, certificates: Path | None = None) -> list[Invitation]:
    """One new invitation for each device, in force when this returns; an open one of before is replaced.

    With TLS it carries the device's certificate: out of ``certificates``/DEVICE, or made by the broker's authority.
    """
    settings, identity = load_settings(directory), Identity.load(directory / KEY)
    invitations = [_invitation(directory, settings, identity, check_device(each), certificates) for each in devices]
    ledger = Ledger(directory / LEDGER)
    try:
        with ledger.transaction():
            rows = [(invitation.device, invitation.code, time.time()) for invitation in invitations]
            ledger.db.executemany("INSERT OR REPLACE INTO invitations VALUES (?, ?, ?)", rows)
    finally:
        ledger.close()
    _tell(directory, requests.INVITATIONS)
    return invitations


def _invitation(
    directory: Path, settings: Settings, identity: Identity, device: str, certificates: Path | None
) -> Invitation:
    papers = transport.for_device(directory, settings, device, certificates)
    return Invitation(
        federation=settings.federation,
        device=device,
        broker=settings.broker,
        aggregator_key=identity.public.hex(),
        code=secrets.token_urlsafe(24),
        ca=papers.ca,
        certificate=papers.certificate,
        key=papers.key,
    )


def flush_counts(directory: Path) -> None:
    """Have a running aggregator write its counters down; ConfigError where it does not answer."""
    _tell(directory, requests.COUNTS)


def _tell(directory: Path, what: str) -> None:
    try:
        requests.ask(directory, what)
    except requests.NotRunningError:
        return  # the next start reads it from the ledger


def change_state(directory: Path, what: str, software: str) -> None:
    """Pause, resume or close; by the running aggregator, or here, to be published by the next."""
    load_settings(directory)  # or there is none
    try:
        requests.ask(directory, what)
    except requests.NotRunningError:
        _apply(directory, software, lambda core: core.handle(events.StateRequested(state=STATES[what]), 0.0))


def restored(directory: Path, software: str) -> int:
    """Take note that this directory came from a backup; returns the version at which it goes on."""
    load_settings(directory)
    _apply(directory, software, Core.restored)
    return tensors_of(directory, None)[0]


def _apply(directory: Path, software: str, change: Callable[[Core], list[events.Action]]) -> None:
    """Change the state on disk while no process serves the directory."""
    with requests.exclusive(directory, patience_s=2.0):
        ledger = Ledger(directory / LEDGER)
        try:
            actions = change(open_core(directory, ledger, software))
            ledger.write([action.record for action in actions if isinstance(action, events.Save)])
        finally:
            ledger.close()


def tensors_of(directory: Path, version: int | None) -> tuple[int, bytes, dict[str, npt.NDArray[np.float32]]]:
    """(version, digest, tensors) of a kept version, the newest by default."""
    ledger = Ledger(directory / LEDGER, read_only=True)
    try:
        number = int(ledger.fact("version")) if version is None else version
        vector = ledger.vector(number)
        return number, vector_digest(vector), to_tensors(ledger.schema(), vector)
    finally:
        ledger.close()
