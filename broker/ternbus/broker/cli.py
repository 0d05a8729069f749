"""The commands `ternbus broker …`: make a broker with TLS, issue certificates, run a broker, show its refusals."""

import json
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final, Never

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.files import make_folder, write_secret, write_text
from ternbus.broker.folder_owner import as_owner
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY
from ternbus.broker.path_errors import quoted
from ternbus.broker.plain_help import command_group
from ternbus.broker.protocol.endpoint import is_loopback
from ternbus.broker.protocol.identity import reader_user
from ternbus.broker.protocol.topics import of_reader
from ternbus.broker.server import refusals as counts
from ternbus.broker.server.running import HOME, Engine, RunningBroker, choose, is_home, start
from ternbus.broker.stop_signals import ignore_stops, on_stop
from ternbus.broker.text_table import text_table

if TYPE_CHECKING:
    from ternbus.broker.server.directory import BrokerDirectory, Credentials

app = command_group("Run a broker: mosquitto, or nats-server from its wheel.")

DIRECTORY: Final = Path("ternbus-broker")
PORT: Final = 1883
HOST: Final = "127.0.0.1"


DirToRead = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the broker.")]
Dir = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the broker.", callback=as_owner)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
EngineOption = Annotated[
    Engine, typer.Option(help="Broker software; auto takes mosquitto where it is installed, else nats-server.")
]


class _StopRequested(Exception):  # noqa: N818 - not an error: SIGTERM or SIGINT arrived
    pass


@app.command()
def init(
    directory: Dir,
    *,
    name: Annotated[
        list[str], typer.Option(metavar="HOST", help="Host name or address of the broker for devices; repeatable.")
    ],
    engine: EngineOption = Engine.AUTO,
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free port and keeps it.")] = 8883,
    listen: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on. [default: 127.0.0.1 if every --name is on this machine, else all addresses]"
        ),
    ] = None,
) -> None:
    """Make a broker with mutual TLS: a certificate authority, the broker's certificate and its settings.

    Only clients with a certificate of this authority can connect.

    Example: ternbus broker init bus --name 192.168.1.10 --name bus.example.org
    """
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

    home = BrokerDirectory.create(directory, names=name, port=port, engine=engine, listen=listen)
    typer.echo(f"{directory}: {home.url}, TLS 1.3, for clients with a certificate from {directory}/tls/ca.pem")
    typer.echo(f"keep {directory}/tls/ca.key secret: its holder can make certificates")
    typer.echo(f"next: ternbus broker up {quoted(directory)}")
    init = f"ternbus aggregator init AGG --federation NAME --broker-dir {quoted(directory)}"
    typer.echo(f"and:  {init} --model MODEL.safetensors")


@app.command()
def up(
    place: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory of the broker's data. [default: ternbus-broker]")
    ] = None,
    *,
    engine: EngineOption = Engine.AUTO,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help=f"TCP port, without TLS only; 0 takes a free port. [default: {PORT}]"),
    ] = None,
    host: Annotated[str | None, typer.Option(help=f"Address to listen on, without TLS only. [default: {HOST}]")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Directory of the broker's data, instead of DIR.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when the broker is ready, for scripts.")] = False,
) -> None:
    """Run a broker with its data in DIR and print a line when it accepts connections.

    Ctrl-C, SIGTERM or SIGHUP stops it.

    The broker uses TLS if `ternbus broker init` made DIR; otherwise it serves this machine only, without TLS.

    Example: ternbus broker up bus
    """
    if place is not None and directory is not None:
        raise ConfigError("two directories given: use either DIR or --dir")
    directory = as_owner(place or directory or DIRECTORY)
    is_new = not directory.exists()
    on_stop(_stop)
    try:
        with _start(directory, engine, host, port) as broker:
            typer.echo(_announcement(broker, is_new, as_json))
            code = broker.wait(_warn)
            _warn(f"{broker.software} ended unexpectedly with exit code {code}; its last lines:\n{broker.last_lines()}")
            raise typer.Exit(EXIT_FAILED)
    except _StopRequested:
        return


def _start(directory: Path, engine: Engine, host: str | None, port: int | None) -> RunningBroker:
    if is_home(directory):
        if host is not None or port is not None:
            raise ConfigError(
                f"--host and --port do not apply to a broker with TLS: change listen or port in {directory / HOME}"
            )
        from ternbus.broker.server import tls_service  # noqa: PLC0415 - certificates take a library that only few need

        return tls_service.start(_home(directory), engine)
    software = choose(engine)
    host = host or HOST
    if not is_loopback(host):
        _warn(
            f"{host} accepts connections from the network without TLS: other machines can read and block messages, "
            f"but not forge them; for TLS run: ternbus broker init {quoted(directory)} --name {host}"
        )
    return start(software, host=host, port=PORT if port is None else port, directory=directory)


@app.command()
def certificate(
    directory: DirToRead,  # the certificates go elsewhere, where root may write and the owner perhaps not
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Names of devices, aggregator-FEDERATION, or aggregator_help_HELPER."),
    ],
    *,
    federation: Annotated[str, typer.Option(help="Federation of these names.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder to write; each name gets FOLDER/NAME with certificate, key and ca.pem."
        ),
    ],
) -> None:
    """Make certificates by hand, for an aggregator that runs on another machine than the broker.

    On the broker's own machine, `ternbus aggregator invite` makes those of devices and helpers.

    Example: ternbus broker certificate bus aggregator-lab pi-1 --federation lab --out certificates
    """
    home = _home(directory)
    for name in names:
        _write_credentials(out / name, home.issue(name, federation))
        typer.echo(str(out / name))


@app.command()
def admit(
    directory: DirToRead,  # as in `certificate`
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the reader, such as home-assistant.")],
    *,
    read: Annotated[
        bool, typer.Option("--read", help="It may read what the aggregator shows, and publish nothing.")
    ] = False,
    federation: Annotated[
        str | None, typer.Option(help="Federation that it may read. [default: the only one on this broker]")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder to write; FOLDER/NAME gets certificate, key and ca.pem.")
    ],
) -> None:
    """Admit a client that is no member of the federation, such as Home Assistant, to the broker.

    It gets a certificate, and what the access list allows a reader. docs/home-assistant.md says what there is to read.

    Example: ternbus broker admit bus home-assistant --read --out readers
    """
    if not read:
        raise ConfigError(f"what may {name} do? Add --read; devices are invited with: ternbus aggregator invite")
    home = _home(directory)
    issued, of = home.admit(name, federation)
    _write_credentials(out / name, issued)
    user = reader_user(name)
    typer.echo(f"{out / name}: client id {user}, for {home.url}")
    typer.echo(f"it may read {' and '.join(of_reader(of))}")


@app.command()
def renew(
    directory: Dir,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Renew all clients' certificates too, not only those that expire within a year."),
    ] = False,
) -> None:
    """Renew the broker's certificate, and clients' certificates that expire within a year; print the changed files.

    The broker's new certificate is for the names in broker.toml. A running broker loads it at once. A running broker
    also renews its certificate without this command, 60 days before expiry. Clients' keys do not change: the old
    certificate works until it expires, and the new one must be copied to the device.

    Example: ternbus broker renew bus
    """
    home = _home(directory)
    for path in home.renew(everything=everything):
        typer.echo(str(path))


@app.command()
def status(directory: Dir, as_json: AsJson = False) -> None:
    """Show the broker's address and when its certificates expire.

    Example: ternbus broker status bus
    """
    from ternbus.broker.server import certificates  # noqa: PLC0415 - a library that only few need

    home = _home(directory)
    now = certificates.now()
    rows: list[dict[str, Any]] = [
        {
            "file": place,
            "name": named.name,
            "federation": named.federation,
            "until": named.until.date().isoformat(),
            "days_left": int(named.days_left(now)),
        }
        for place, named in home.certificates().items()
    ]
    if as_json:
        typer.echo(json.dumps({"url": home.url, "certificates": rows}))
        return
    typer.echo(f"{home.url}, engine {home.settings().engine}\n")
    columns = {"certificate of": "<", "federation": "<", "valid until": "<", "days left": ">"}
    cells = ([row[name] for name in ("name", "federation", "until", "days_left")] for row in rows)
    typer.echo("\n".join(text_table(columns, cells)))


@app.command()
def refusals(directory: Dir, as_json: AsJson = False) -> None:
    """Show refused connections and requests: count, client, reason, and the client's last request.

    The client is the name in its certificate. `?` stands for clients without a certificate, `*` for all clients
    after the first 200. If the access list denies a device, the device is faulty or its key was stolen: run
    `ternbus aggregator revoke AGG DEVICE`. Counts are kept over restarts. To reset them, stop the broker and remove
    refusals.json.

    Example: ternbus broker refusals bus
    """
    _home(directory)
    path = directory / counts.FILE
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory} has no refusals.json: the broker has not run yet; run: ternbus broker up {quoted(directory)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; stop the broker and remove the file") from error
    if as_json:
        typer.echo(text)
        return
    typer.echo(f"since {found['since']}: {sum(row['count'] for row in found['refused'])} refused")
    for row in found["refused"]:
        wanted = f": {row['detail']}" if row["detail"] else ""
        why = counts.REASONS.get(row["reason"], row["reason"])
        typer.echo(f"{row['count']:>8}  {row['client']:<24} {why}\n{'':>10}last {row['last']}{wanted}")


def _write_credentials(folder: Path, issued: "Credentials") -> None:
    make_folder(folder, 0o700)
    write_secret(folder / TLS_KEY, issued.key.encode())
    write_text(folder / CERTIFICATE, issued.certificate)
    write_text(folder / CA, issued.authority)


def _home(directory: Path) -> "BrokerDirectory":
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

    home = BrokerDirectory(directory.absolute())
    home.settings()
    return home


def _stop(_signal: int, _frame: FrameType | None) -> Never:
    ignore_stops()
    raise _StopRequested


def _announcement(broker: RunningBroker, is_new: bool, as_json: bool) -> str:
    if not as_json:
        # who mistyped the folder of a broker with TLS gets another broker without
        new = ", a new folder, without TLS; `ternbus broker init` makes one with TLS" if is_new else ""
        return f"{broker.software} ready on {broker.url} (data in {broker.directory}{new})"
    return json.dumps(
        {
            "engine": broker.software.engine,
            "version": broker.software.version,
            "url": broker.url,
            "host": broker.endpoint.host,
            "port": broker.endpoint.port,
            "dir": str(broker.directory),
            "pid": broker.pid,
        }
    )


def _warn(text: str) -> None:
    typer.echo(f"ternbus broker: {text}", err=True)
