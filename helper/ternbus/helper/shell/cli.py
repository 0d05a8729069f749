"""The commands `ternbus helper …`: make a helper, run it, say which devices there are, look at what it did."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.files import is_exposed, load_toml, read_password
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.log_option import LogFormat, LogOption
from ternbus.broker.login_options import NoTls, PasswordFile
from ternbus.broker.plain_help import command_group
from ternbus.broker.protocol.endpoint import check_login
from ternbus.broker.protocol.identity import check_device, is_public_key
from ternbus.broker.protocol.invitation import HELPER, Invitation
from ternbus.broker.sums.terms import AGGREGATOR, BFV, MASK, OWN
from ternbus.helper.core.state import State
from ternbus.helper.shell import inspection_commands, process
from ternbus.helper.shell.arguments import AsJson, Dir
from ternbus.helper.shell.directory import YES, HelperDirectory, Settings
from ternbus.helper.shell.printer import Printer
from ternbus.helper.store import store as stores
from ternbus.helper.store.store import HelperStore
from ternbus.helper.store.tables import FILE

NAME: Final = "helper"
MIN: Final = 5

app = command_group("Run a helper of private sums: open sums of updates, never a single one.")


Roster = Annotated[
    str,
    typer.Option(
        help=f"Who says which devices there are: {AGGREGATOR}, or {OWN} (`ternbus helper admit`), which protects from "
        f"an aggregator that lies, too. [default: {AGGREGATOR}]"
    ),
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The helper's directory.")],
    *,
    federation: Annotated[str, typer.Option(metavar="NAME", help="Federation to open sums for.")] = "",
    broker: Annotated[str, typer.Option(metavar="URL", help="Broker: mqtt://HOST:PORT or mqtts://HOST:PORT.")] = "",
    invitation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of `ternbus aggregator invite AGG --helper NAME`.")
    ] = None,
    name: Annotated[str, typer.Option(help=f"Helper's name in the federation. [default: {NAME}]")] = "",
    roster: Roster = "",
    least: Annotated[
        int | None, typer.Option("--min", help=f"Smallest number of devices in a sum. [default: {MIN}]")
    ] = None,
    private_kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help=f"Kind of the sums: {MASK}, or {BFV}, encrypted, for parties that all follow the protocol. "
            f"[default: {MASK}]",
        ),
    ] = "",
    username: Annotated[
        str, typer.Option(metavar="NAME", help="User name at the broker, if it is not aggregator_help_NAME.")
    ] = "",
    password_file: PasswordFile = None,
    no_tls: NoTls = False,
) -> None:
    """Make a helper: its key, its settings, and DIR/card.toml for the aggregator's operator.

    Run it again with `--invitation` when the operator has sent one: the next `ternbus helper run` then enrolls.
    The owners of the devices pin the key that is printed. A helper protects them if another party than the
    aggregator's runs it, on a machine of its own.

    Example: ternbus helper init bureau --federation lab --broker mqtt://192.168.1.10 --roster own --min 5
    """
    asked = _load_invitation(invitation) if invitation is not None else None
    act_as_owner(directory)
    if url := asked.broker if asked is not None else broker:
        check_login(url, password_file, no_tls=no_tls)
    if password_file is not None:
        read_password(password_file)  # a mistake is best said before
    home = HelperDirectory(directory)
    options = {
        "federation": federation, "broker": broker, "helper": name, "roster": roster, "username": username,
        "kind": private_kind,
        "password_file": str(password_file.resolve()) if password_file is not None else "",
        "no_tls": YES if no_tls else "",
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value} | ({} if least is None else {"min": least})
    if home.exists:
        _invite(home, asked, given)
    else:
        _make(home, asked, given)
        if asked is not None:
            text = (
                "held no helper: the one made now has a new key, and the aggregator refuses it unless private.helpers"
            )
            typer.echo(f"ternbus: {home.folder} {text} of aggregator.toml names that key", err=True)
    _say_what_is_next(home)


@app.command()
def run(directory: Dir, as_json: AsJson = False, log: LogOption = LogFormat.TEXT) -> None:
    """Run the helper until a signal ends it: enroll if need be, then answer the aggregator.

    The exit code is 2 if the database is an older copy than what others have seen: see `ternbus helper restored`. It
    is 3 if the aggregator has refused or revoked the helper.

    Example: ternbus helper run bureau
    """
    printer = Printer(as_json=as_json or log == LogFormat.JSON)
    try:
        code = printer.finish(process.run(HelperDirectory(directory), printer))
    except BrokenPipeError:  # who read the log has ended
        code = EXIT_FAILED
    raise typer.Exit(code)


@app.command()
def admit(
    directory: Dir,
    device: Annotated[str, typer.Argument(metavar="NAME", help="Device's name.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="Device's public key, 64 hex digits.")],
) -> None:
    """Put a device on the helper's own roster, also while the helper runs; a second key replaces the first.

    Get the key from the device's owner, not from the aggregator: it is `public_key` in `ternbus edge status` there. An
    aggregator can make devices up, and a sum of one real device and made-up ones shows what the real one sent.

    Example: ternbus helper admit bureau pi-7 3b6a27bc…
    """
    home = HelperDirectory(directory)
    if home.settings().roster != OWN:
        raise ConfigError(
            f'{home.folder} takes the aggregator\'s roster: set roster = "{OWN}" in helper.toml and restart the helper'
        )
    check_device(device)
    if not is_public_key(key):
        raise ConfigError(f"{key!r} is not a public key of 64 hex digits: copy it whole")
    changed = stores.admit(directory, device, bytes.fromhex(key), time.time())
    typer.echo(f"{device} is on the roster" if changed else f"{device} was on the roster with this key already")


for _command in (inspection_commands.roster, inspection_commands.status, inspection_commands.log):
    app.command()(_command)


@app.command()
def restored(directory: Dir) -> None:
    """Make a new box key, after helper.db was lost, damaged, or replaced by an older copy.

    An older copy has forgotten which sets were opened, so it could open a device's update twice. Under the new key no
    update that was sent before is opened any more: the aggregator drops those, and the devices send new ones. Never
    put a copy of helper.db back without this command.

    Example: ternbus helper restored bureau
    """
    home = HelperDirectory(directory)
    settings = home.settings()
    with home.locked():
        try:
            store = HelperStore(home.folder, settings.roster)
        except CorruptError:
            typer.echo(
                f"{FILE} was damaged and is in {home.move_database_aside()} now; the old box keys are in it, so it is "
                "removed with the next new one",
                err=True,
            )
            store = HelperStore(home.folder, settings.roster)
        now = time.time()
        enrolled = bool(settings.aggregator_key) and not settings.code  # whatever the database says
        with store:
            before = store.state or State.new(os.urandom, now)
            store.save(replace(before.restored(os.urandom, now), enrolled=enrolled))
    devices = stores.summary(home.folder).devices
    typer.echo(f"the new box key has the number {stores.summary(home.folder).state.box_key.number}")
    if settings.roster == OWN:
        typer.echo(f"devices on the roster: {devices}; `ternbus helper roster {home.quoted}` lists them")
    typer.echo(f"next:  ternbus helper run {home.quoted}")


def _make(home: HelperDirectory, asked: Invitation | None, given: Mapping[str, object]) -> None:
    """Make a new helper of the options, and of the invitation for what they leave out."""
    defaults: dict[str, object] = {"helper": NAME, "roster": AGGREGATOR, "min": MIN}
    if asked is not None:
        defaults |= {"federation": asked.federation, "helper": asked.device, "broker": asked.broker}
    table = {**defaults, **given}
    if missing := [f"--{key}" for key in ("federation", "broker") if key not in table]:
        raise ConfigError(f"{' and '.join(missing)} is missing: give it, or the --invitation that has it")
    settings = Settings.from_table(table, "ternbus helper init")
    settings = settings if asked is None else settings.invited(asked)
    home.make(settings.kind)
    with home.locked():
        if asked is not None:
            home.write_certificates(asked)
        with HelperStore(home.folder, settings.roster) as store:
            if store.state is None:
                store.save(State.new(os.urandom, time.time()))
        home.write(settings)  # last: it marks the directory as complete


def _invite(home: HelperDirectory, asked: Invitation | None, given: Mapping[str, object]) -> None:
    """Take an invitation for a helper that is there."""
    settings = home.settings()
    if asked is None:
        raise ConfigError(
            f"{home.folder} has a helper already: give the --invitation of the aggregator, or change helper.toml"
        )
    if differs := [key for key, value in given.items() if getattr(settings, key) != value]:
        raise ConfigError(f"{home.folder} has a helper with another {differs[0]}: change helper.toml, or leave it out")
    invited = settings.invited(asked)
    stores.check(home.folder)
    with home.locked():
        home.write_certificates(asked)
        with HelperStore(home.folder, settings.roster) as store:
            if store.state is not None:
                store.save(replace(store.state, enrolled=False))
        home.write(invited)


def _say_what_is_next(home: HelperDirectory) -> None:
    settings, key = home.settings(), home.identity().public.hex()
    kind = "" if settings.kind == MASK else f" --private-kind {settings.kind}"
    card = home.write_card(settings)
    typer.echo(f"helper {settings.helper} of {settings.federation}, key {key}")
    if settings.aggregator_key:
        typer.echo(f"next:  ternbus helper run {home.quoted}")
    else:
        typer.echo(f"give {card} to the aggregator's operator, who runs:")
        typer.echo(f"  ternbus aggregator init AGG … --private{kind} --helper card.toml")
        typer.echo(f"  ternbus aggregator invite AGG --helper {settings.helper}")
        typer.echo(f"then:  ternbus helper init {home.quoted} --invitation FILE")
    typer.echo(f"owners of devices pin the key: ternbus edge join … --private{kind} --helper {key}")


def _load_invitation(path: Path) -> Invitation:
    """The invitation in a file, which root may read for the owner of the directory; a warning if others can read it."""
    invitation = Invitation.from_table(load_toml(path), str(path))
    invitation.check_role(HELPER, str(path))
    if is_exposed(path):
        typer.echo(
            f"ternbus: warning: other users can read {path}, which contains a secret: chmod 600 {path}", err=True
        )
    return invitation
