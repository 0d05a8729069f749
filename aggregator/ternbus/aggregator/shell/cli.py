"""The commands `ternbus aggregator …`: create, run, watch and control an aggregator."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.aggregator.core.findings import unmerged
from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.shell import (
    administration,
    dashboard_process,
    dashboard_token,
    examination,
    helper_cards,
    log_commands,
    membership_commands,
    metrics_command,
    quickstart,
    recovery_commands,
    rollback,
    statistics_command,
    status_command,
    status_text,
    trace_command,
    version_commands,
)
from ternbus.aggregator.shell.arguments import (
    AllowPlanKeys,
    AsJson,
    Dir,
    DirAsRoot,
    HelperCards,
    Private,
    PrivateKind,
    Settings,
)
from ternbus.aggregator.shell.service import Service
from ternbus.aggregator.shell.transport import in_folder as credentials_in
from ternbus.aggregator.store import control, private_status
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import blaming
from ternbus.aggregator.transport_settings import TransportSettings
from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.files import read_password
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.kept_memory import keep_freed
from ternbus.broker.log_levels import ERROR, WARNING
from ternbus.broker.log_option import LogFormat, LogOption
from ternbus.broker.log_output import LogOutput, take_library_lines
from ternbus.broker.login_options import NoTls, PasswordFile
from ternbus.broker.path_errors import quoted
from ternbus.broker.plain_help import command_group
from ternbus.broker.plural import counted
from ternbus.broker.protocol.endpoint import check_login, is_loopback
from ternbus.broker.server.running import Engine, RunningBroker
from ternbus.broker.stop_signals import on_stop
from ternbus.broker.sums.terms import MASK
from ternbus.broker.toml import toml_value
from ternbus.broker.version import software

KEPT_BYTES: Final = 2**26  # of memory between merges

app = command_group("Run the server: accept updates, merge them, publish the model.")
app.add_typer(log_commands.app, name="log")

Username = Annotated[
    str, typer.Option(metavar="NAME", help="User name at the broker. [default: aggregator-FEDERATION]")
]

Tls = Annotated[
    bool | None,
    typer.Option(
        "--tls/--no-tls",
        help="TLS for the broker, for the first start. [default: TLS if other machines reach the host]",
    ),
]
EngineName = Annotated[
    Engine, typer.Option(help="Broker software; auto takes mosquitto where it is installed, else nats-server.")
]


@app.command()
def init(
    directory: DirAsRoot,
    *,
    federation: Annotated[str, typer.Option(help="Name of the federation: a-z, 0-9, '-'; at most 32 characters.")],
    model: Annotated[
        Path, typer.Option(help="Initial model, a safetensors file; `ternbus edge init-model` makes one.")
    ],
    broker: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Broker's URL as devices reach it: mqtt://HOST:PORT or mqtts://HOST:PORT."),
    ] = None,
    broker_dir: Annotated[
        Path | None,
        typer.Option(help="Directory of a broker on this machine (`ternbus broker init`), instead of --broker."),
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder with ca.pem, certificate.pem and certificate.key for the broker."),
    ] = None,
    username: Username = "",
    password_file: PasswordFile = None,
    no_tls: NoTls = False,
    settings: Settings = None,
    allowed: AllowPlanKeys = None,
    private: Private = False,
    private_kind: PrivateKind = "",
    helpers: HelperCards = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Tensors that always travel as float32, for example 'fc.*'; repeatable."),
    ] = None,
) -> None:
    """Make a federation in DIR: its key, its ledger, aggregator.toml and version 0 of the model.

    Example: ternbus aggregator init agg --federation lab --broker-dir bus --model m.safetensors
    """
    first = administration.FirstModel.load(model)
    overrides = PlanCheck.settings(first.plan, allowed or ())
    overrides |= dict(_override(text) for text in settings or [])
    overrides |= _private(federation, helpers or (), private_kind, private=private)
    if broker_dir is not None:
        overrides["transport.authority"] = str(broker_dir.resolve())
    url = _broker_url(broker, broker_dir)
    credentials = credentials_in(tls) if tls is not None else None
    act_as_owner(directory)
    overrides |= _login(url, username, password_file, no_tls=no_tls)
    administration.create(
        directory,
        federation=federation,
        broker=url,
        model=first.tensors,
        settings=overrides,
        dense=dense or (),
        kinds=first.kinds,
        credentials=credentials,
    )
    tensors, elements = counted(len(first.tensors), "tensor"), sum(array.size for array in first.tensors.values())
    typer.echo(f"{directory}: federation {federation!r}, {tensors}, {elements:,} parameters")
    shown, invited = quoted(directory), "--helper NAME" if private else "DEVICE"
    typer.echo(f"next: ternbus aggregator run {shown}   and   ternbus aggregator invite {shown} {invited}")


def _private(federation: str, helpers: Sequence[Path], kind: str, *, private: bool) -> dict[str, object]:
    """As settings."""
    if private and not helpers:
        raise ConfigError("--private needs a helper: add --helper FILE, the card.toml of `ternbus helper init`")
    if (helpers or kind) and not private:
        raise ConfigError(f"{'--helper' if helpers else '--private-kind'} is for private sums: add --private")
    return helper_cards.settings_of(helpers, federation, kind or MASK) if private else {}


def _broker_url(broker: str | None, broker_dir: Path | None) -> str:
    if broker is not None and broker_dir is None:
        return broker
    if broker is not None or broker_dir is None:
        raise ConfigError("no broker: give either --broker mqtts://HOST:PORT or --broker-dir DIR")
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

    return BrokerDirectory(broker_dir.absolute()).url


def _login(url: str, username: str, password_file: Path | None, *, no_tls: bool) -> dict[str, object]:
    """As settings. The password itself stays in its file, and goes into no invitation; the directory's owner reads it.

    Raises `ConfigError` where this user, as whom `run` reads it, cannot, and where it would be sent unencrypted.
    """
    check_login(url, password_file, no_tls=no_tls)
    entries: dict[str, object] = {}
    if username:
        entries["transport.username"] = username
    if password_file is not None:
        read_password(password_file)  # a mistake is best said before
        entries["transport.password_file"] = str(password_file.resolve())
    if no_tls:
        entries["transport.no_tls"] = True
    return entries


def _override(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"invalid --set {text}: write SECTION.KEY=VALUE, for example merge.buffer_size=1")
    return key, toml_value(value)


@app.command()
def run(
    directory: Dir,
    *,
    username: Username = "",
    password_file: PasswordFile = None,
    no_tls: Annotated[
        bool,
        typer.Option(
            "--no-tls",
            help="Send the password of --password-file unencrypted; that of aggregator.toml needs transport.no_tls.",
        ),
    ] = False,
    dashboard: dashboard_process.Address = None,
    dashboard_hosts: dashboard_process.Hosts = None,
    log: LogOption = LogFormat.TEXT,
) -> None:
    """Serve the federation in DIR until Ctrl-C, SIGTERM or SIGHUP; accepted updates are merged before that.

    A broker that is not there yet is waited for. With --dashboard a browser shows the federation; whoever logs in with
    the token of `ternbus aggregator dashboard-token` can also act there.

    Example: ternbus aggregator run agg --dashboard 127.0.0.1:8080
    """
    settings = administration.load_settings(directory)
    transport = replace(settings.transport, no_tls=True) if no_tls else settings.transport
    if username:
        transport = replace(transport, username=username)
    if password_file is not None:
        transport = replace(transport, password_file=str(password_file.resolve()))
    transport.check(settings.broker, "--no-tls")
    _serve(directory, log, transport, listener=dashboard_process.listen(dashboard, dashboard_hosts or ()))


def _serve(
    directory: Path,
    log: LogFormat,
    transport: TransportSettings | None = None,
    broker: RunningBroker | None = None,
    listener: dashboard_process.Listener | None = None,
) -> None:
    keep_freed(KEPT_BYTES)
    say = LogOutput(as_json=log == LogFormat.JSON)
    take_library_lines(say)
    beside = dashboard_process.beside(listener, directory, say, as_json=log == LogFormat.JSON)
    service = Service(directory, software(), say, transport, beside)
    for warning in administration.load_settings(directory).warnings:
        say(f"{directory / administration.TOML}: {warning}", level=WARNING)
    on_stop(lambda *_: service.stop())
    ended = quickstart.watch(broker, service.stop, say) if broker is not None else []
    service.run()
    if broker is not None and ended:
        lines = f"{broker.software} ended by itself with code {ended[0]}; its last lines:\n{broker.last_lines()}"
        say(lines, level=ERROR, event="broker-ended")
        raise typer.Exit(EXIT_FAILED)
    say("stopped", event="stopped")


@app.command()
def up(
    directory: Dir,
    *,
    model: Annotated[
        Path | None, typer.Option(help="Initial model, a safetensors file; needed at the first start.")
    ] = None,
    devices: Annotated[
        list[str] | None, typer.Option("--invite", metavar="DEVICE", help="Device to invite; repeatable.")
    ] = None,
    evaluators: Annotated[
        list[str] | None, typer.Option("--evaluator", metavar="NAME", help="Evaluator to invite; repeatable.")
    ] = None,
    federation: Annotated[
        str | None,
        typer.Option(help=f"Name of the federation, for the first start. [default: {quickstart.FEDERATION}]"),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help=f"Address of this machine for devices, for the first start. [default: {quickstart.HOST}]"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="TCP port for the first start; 0 takes a free port. [default: 8883, without TLS 1883]",
        ),
    ] = None,
    tls: Tls = None,
    engine: EngineName = Engine.AUTO,
    dashboard: dashboard_process.Address = None,
    dashboard_hosts: dashboard_process.Hosts = None,
    log: LogOption = LogFormat.TEXT,
) -> None:
    """Run a broker and an aggregator together, and make both at the first start.

    If other machines reach the address, the broker uses TLS 1.3 and admits only invited devices: each invitation
    carries a certificate.

    Example: ternbus aggregator up home --model model.safetensors --host 192.168.1.10 --invite pi-1 --invite pi-2
    """
    say = LogOutput(as_json=log == LogFormat.JSON)
    listener = dashboard_process.listen(dashboard, dashboard_hosts or ())
    first = quickstart.First(model=model, federation=federation, host=host, port=port, tls=tls)
    quickstart.check_names(first, devices or (), evaluators or ())
    with quickstart.start_broker(directory, engine, first) as broker:
        if not broker.endpoint.tls and not is_loopback(broker.endpoint.host):
            open_to = f"{broker.url} is open to the network, without TLS"
            say(f"{open_to}: anybody there can read and disturb, though not forge", level=WARNING)
        say(f"{broker.software} ready on {broker.url}", event="broker-ready", fields={"url": broker.url})
        for path in quickstart.prepare(directory, first, broker.url, devices or (), evaluators or ()):
            say(f"invitation, to be copied to the device: {path}", event="invitation", fields={"path": str(path)})
        _serve(directory, log, broker=broker, listener=listener)


for each in (membership_commands.invite, membership_commands.invitations, membership_commands.revoke):
    app.command()(each)
recovery_commands.add_to(app)


app.command()(status_command.status)
app.command()(metrics_command.metrics)
app.command()(trace_command.trace)
app.command()(statistics_command.statistics)


@app.command()
def devices(directory: Dir, as_json: AsJson = False) -> None:
    """List the devices that joined.

    Example: ternbus aggregator devices agg
    """
    with blaming(directory):
        found = status_command.looked(directory, examination.INTERVALS).found
        typer.echo(json.dumps(found["devices"]) if as_json else "\n".join(status_text.device_table(found)))


@app.command()
def pause(directory: Dir) -> None:
    """Pause training: devices follow the model but do not train. It takes effect before the command ends.

    A closed federation stays closed: only `resume` opens it again.

    Example: ternbus aggregator pause agg
    """
    administration.change_state(directory, control.PAUSE, software())
    typer.echo("paused")


@app.command()
def resume(directory: Dir) -> None:
    """Resume training after `pause` or `close`.

    Example: ternbus aggregator resume agg
    """
    administration.change_state(directory, control.RESUME, software())
    typer.echo("open")


@app.command()
def close(directory: Dir) -> None:
    """End training: accepted updates are merged, devices discard the others and stop.

    Accepted updates of fewer devices than merge.min_devices are not merged: they stay in the ledger, and are merged
    after `resume`, once enough devices have contributed. With private sums the federation pauses until helpers have
    opened what is on its way, at most private.close_wait_s; the rest is dropped, and the log names it.

    Example: ternbus aggregator close agg
    """
    administration.change_state(directory, control.CLOSE, software())
    private = private_status.read(directory, administration.load_settings(directory)).get("private")
    if private is not None and private["closing"]:
        typer.echo("paused; it closes when the helpers have answered: see `ternbus aggregator status`")
        return
    count = statuses.read(directory)["counts"]["unmerged"]
    left = f"; {unmerged(count)}, of too few devices (merge.min_devices)"
    typer.echo(f"closed{left if count else ''}")


app.command("dashboard-token")(dashboard_token.dashboard_token)
app.command()(version_commands.versions)
app.command()(version_commands.tag)
app.command()(rollback.rollback)
app.command()(version_commands.export)
