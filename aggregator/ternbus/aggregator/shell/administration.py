"""An aggregator's directory: commands create, open and change it, also while a process serves it."""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events, first_version, records
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import transport
from ternbus.aggregator.store import archives, control, lost_ledger, membership, private_rows, swapping, tags
from ternbus.aggregator.store.ledger import KINDS, LEDGER, Ledger, reading, writing
from ternbus.aggregator.store.recovery import recover
from ternbus.aggregator.store.remedy import remedy
from ternbus.aggregator.store.vectors import VECTORS
from ternbus.broker import files
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError, CorruptError, ProtocolError
from ternbus.broker.files import load_toml, read_key, write_key, write_text
from ternbus.broker.model_files import load_metadata, load_safetensors, save_safetensors
from ternbus.broker.protocol.identity import Identity, check_device, helper_user
from ternbus.broker.protocol.invitation import HELPER, Invitation
from ternbus.broker.protocol.schema import Schema, to_tensors, to_vector, vector_digest
from ternbus.broker.protocol.task_plan import TaskPlan
from ternbus.broker.protocol.tensor_kinds import TensorKinds, version_metadata

KEY: Final = lost_ledger.KEY
TOML: Final = lost_ledger.TOML
PARTIAL: Final = lost_ledger.PARTIAL
WHY_CHARS_MAX: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstModel:
    """The model file of a new federation: tensors, their kinds, and what its task says of plans."""

    tensors: dict[str, npt.NDArray[np.float32]]
    kinds: TensorKinds
    plan: TaskPlan

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; ConfigError if it is none, or states what does not fit."""
        tensors, metadata = load_safetensors(path), load_metadata(path)
        kinds = TensorKinds.of_metadata(metadata, tensors, str(path))
        return cls(tensors=tensors, kinds=kinds, plan=TaskPlan.from_metadata(metadata, path))


def create(
    directory: Path,
    *,
    federation: str,
    broker: str,
    model: Mapping[str, npt.NDArray[Any]],
    settings: Mapping[str, object] | None = None,
    dense: Sequence[str] = (),
    kinds: TensorKinds | None = None,
    credentials: transport.Credentials | None = None,
) -> Settings:
    """Make an aggregator: keys, settings, and version 0 from ``model`` (name -> array, any float type).

    Without ``kinds`` the names of the tensors tell which are statistics and which never negative.
    ``credentials`` are its own ones, where no authority is set that makes them. Nothing is left behind where it fails.
    ConfigError where the directory holds one already, or must not be written.
    """
    directory = directory.resolve()
    swapping.check(directory)
    if (directory / LEDGER).exists():
        raise ConfigError(f"{directory} holds an aggregator already; choose another directory")
    if lost_ledger.is_lost(directory / LEDGER):
        raise lost_ledger.missing(directory / LEDGER)
    chosen = configuration.new_home(settings or {})
    table = configuration.with_overrides({"federation": federation, "broker": broker}, chosen)
    checked = configuration.from_table(table, "--set")
    kinds = TensorKinds.by_name(model) if kinds is None else kinds
    kinds.check(model)
    schema = Schema.of({name: array.shape for name, array in model.items()}, [*dense, *kinds.dense])
    if checked.private is not None:
        checked.private.check_model(schema)
    vector = to_vector(schema, model)
    # within a directory that is there: its owner may write into it, and perhaps not beside it
    partial = directory / PARTIAL if directory.exists() else directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with files.naming(directory, instead_of=partial):
            partial.mkdir(parents=True, mode=0o700)
        _fill(partial, checked, schema, vector, kinds)
        transport.equip(partial, checked, credentials, directory)
        _move_into(partial, directory)
    except OSError as error:
        raise files.fault(error, directory, "cannot make ") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checked


def _fill(
    directory: Path, settings: Settings, schema: Schema, vector: npt.NDArray[np.float32], kinds: TensorKinds
) -> None:
    identity = Identity.generate()
    write_key(directory / KEY, identity.seed)
    write_text(directory / TOML, configuration.dumps(settings))
    facts = {"federation": settings.federation, "schema": schema.encoded, "slots": settings.downlink.slots}
    facts[KINDS] = kinds.dumps()
    with closing(Ledger.create(directory / LEDGER, facts)) as ledger:
        ledger.write(first_version.make(settings, identity, schema, vector).records)


def _move_into(partial: Path, directory: Path) -> None:
    """The finished directory in one step, or into an empty or foreign one file by file, the ledger last."""
    if partial.parent != directory:
        partial.rename(directory)
        return
    for name in (KEY, TOML, *transport.FILES, VECTORS, LEDGER):
        if (partial / name).exists():
            (partial / name).rename(directory / name)


def load_settings(directory: Path) -> Settings:
    swapping.check(directory)
    if not (directory / LEDGER).exists():
        raise lost_ledger.missing(directory / LEDGER)
    path = directory / TOML
    if not path.exists():
        raise ConfigError(f"{path} does not exist; restore it from a backup")
    return configuration.from_table(load_toml(path), str(path))


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """``control.exclusive``, after settings and key were read: a mistake in them leaves an older ledger as it is."""
    load_settings(directory)
    read_key(directory / KEY)
    with control.exclusive(directory, patience_s=2.0):
        yield


def open_core(directory: Path, ledger: Ledger, software: str) -> Core:
    """The core as the ledger has it, under the settings of now."""
    settings = load_settings(directory)
    if settings.federation != ledger.fact("federation"):
        raise ConfigError(
            f"{directory / TOML} names federation {settings.federation!r}, the ledger {ledger.fact('federation')!r}: "
            "a federation cannot be renamed; put the old name back"
        )
    try:
        with ledger.naming():
            return recover(ledger, settings, Identity(read_key(directory / KEY)), software)
    except ProtocolError as error:  # of what was a valid message when it was written
        raise CorruptError(f"{ledger.path}: {error}; {remedy(directory)}") from error


def invite(
    directory: Path,
    *devices: str,
    evaluators: Sequence[str] = (),
    helpers: Sequence[str] = (),
    certificates: Path | None = None,
    expires_in_s: float | None = None,
) -> list[Invitation]:
    """One new invitation for each device, evaluator and helper, in force when this returns.

    It replaces one of before, and ends after ``expires_in_s``, or as aggregator.toml says. With TLS it carries a
    certificate: out of ``certificates``/DEVICE, or made by the broker's authority.
    """
    settings, identity = load_settings(directory), Identity(read_key(directory / KEY))
    _check_helpers(settings, helpers, directory)
    now = time.time()
    expires_at = now + (settings.invitations.expire_after_s if expires_in_s is None else expires_in_s)
    expires = datetime.fromtimestamp(expires_at, UTC)
    members = [check_device(each) for each in dict.fromkeys((*devices, *evaluators))]
    named = [*((each, None) for each in members), *((each, HELPER) for each in dict.fromkeys(helpers))]
    invitations = [
        replace(_invitation(directory, settings, identity, name, certificates, role=role), expires=expires)
        for name, role in named
    ]
    codes = {invitation.device: invitation.code for invitation in invitations if invitation.role is None}
    helper_codes = {invitation.device: invitation.code for invitation in invitations if invitation.role == HELPER}
    with writing(directory) as ledger, ledger.transaction():
        membership.invite(ledger.db, codes, now, expires_at, evaluators)
        private_rows.invite(ledger.db, helper_codes, now, expires_at)
    reached("invited")
    _tell(directory, control.INVITATIONS)
    return invitations


def _check_helpers(settings: Settings, helpers: Sequence[str], directory: Path) -> None:
    known = () if settings.private is None else tuple(settings.private.helpers)
    for name in helpers:
        if name not in known:
            named = f"known are {', '.join(known)}" if known else "it has no private sums"
            raise ConfigError(
                f"{directory / TOML} names no helper {name!r}, {named}; a helper is named with its key in "
                "private.helpers, or with `aggregator init --private --helper FILE`"
            )


def _invitation(
    directory: Path, settings: Settings, identity: Identity, name: str, certificates: Path | None, *, role: str | None
) -> Invitation:
    client = helper_user(name) if role == HELPER else name  # the name at the broker
    credentials = transport.for_device(directory, settings, client, certificates)
    return Invitation(
        federation=settings.federation,
        device=name,
        role=role,
        broker=settings.broker,
        aggregator_key=identity.public.hex(),
        code=secrets.token_urlsafe(24),
        ca=credentials.ca,
        certificate=credentials.certificate,
        key=credentials.key,
    )


def flush_counts(directory: Path) -> None:
    """Have a running aggregator write its counters down; FederationError where it does not answer."""
    _tell(directory, control.COUNTS)


def _tell(directory: Path, what: str) -> None:
    try:
        control.ask(directory, what)
    except control.NotRunningError:
        return  # the next start reads it from the ledger


def change_state(directory: Path, what: str, software: str) -> None:
    """Pause, resume or close; by the running aggregator, or here, to be published by the next."""
    request(directory, what, "", software)


def cancel(directory: Path, device: str, software: str) -> None:
    """Make a device's invitation void, in force when this returns. ConfigError where it has no open one."""
    request(directory, control.CANCEL, device, software)


def revoke(directory: Path, device: str, software: str, *, why: str = "", keep: bool = False) -> int:
    """Put a device out for good, in force when this returns; how many of its updates were dropped, in all.

    The device is told ``why``. Its updates that wait to be merged are dropped unless ``keep``.
    """
    if len(why) > WHY_CHARS_MAX or not why.isprintable():
        raise ConfigError(f"invalid --reason: write one line of at most {WHY_CHARS_MAX} characters")
    request(directory, control.REVOKE, json.dumps({"device": device, "why": why, "keep": keep}), software)
    with reading(directory) as ledger:
        return membership.dropped(ledger.db, device)


def request(directory: Path, what: str, argument: str, software: str) -> None:
    """Have the running aggregator do it, or do it here; done and on disk when this returns."""
    load_settings(directory)  # or there is none
    try:
        control.ask(directory, what, argument)
    except control.NotRunningError:
        _apply(directory, software, lambda core, ledger: core.handle(control.event(ledger, what, argument), 0.0))


def prune(directory: Path, keep_versions: int) -> archives.Pruned:
    """Move old rows of the ledger to an archive; ConfigError where a process serves the directory."""
    settings = load_settings(directory)
    with control.exclusive(directory), writing(directory) as ledger:
        return archives.prune(ledger, keep_versions, settings.staleness.max)


def restored(directory: Path, software: str, clock_s: float) -> int:
    """Take note that this directory came from a backup; returns the version at which it goes on."""
    load_settings(directory)
    _apply(directory, software, lambda core, _: core.restored(clock_s))
    return tensors_of(directory, None)[0]


def _apply(directory: Path, software: str, change: Callable[[Core, Ledger], list[events.Action]]) -> None:
    """Change the state on disk while no process serves the directory; ConfigError where it cannot be changed so."""
    with exclusive(directory), writing(directory) as ledger:
        core = open_core(directory, ledger, software)
        actions = [*core.start(0.0), *change(core, ledger)]  # the first are what changed settings ask for
        batch = [action.record for action in actions if isinstance(action, events.Save)]
        ledger.write(batch)
        for record in batch:
            if isinstance(record, records.RequestDone) and record.error:
                raise ConfigError(record.error)


def tensors_of(directory: Path, version: int | None) -> tuple[int, bytes, dict[str, npt.NDArray[np.float32]]]:
    """(version, digest, tensors) of a kept version, the newest by default."""
    with reading(directory) as ledger:
        number = ledger.version if version is None else version
        vector = tags.vector_of(ledger, number)
        return number, vector_digest(vector), to_tensors(ledger.schema(), vector)


def export(directory: Path, out: Path, version: int | None = None) -> tuple[int, bytes]:
    """Write a kept version, the newest by default, to a model file; its version and digest."""
    number, digest, tensors = tensors_of(directory, version)
    with reading(directory) as ledger:
        kinds = ledger.kinds()
    save_safetensors(out, tensors, kinds.metadata() | version_metadata(number, digest))
    return number, digest
