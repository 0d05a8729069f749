"""`ternbus broker …`: make a broker with TLS and its certificates; run a broker until a signal comes."""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final, Never

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.files import write_secret
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY
from ternbus.broker.protocol.endpoint import is_loopback
from ternbus.broker.server import refusals as counts
from ternbus.broker.server.running import HOME, Engine, RunningBroker, choose, is_home, start
from ternbus.broker.text_table import text_table

if TYPE_CHECKING:
    from ternbus.broker.server.directory import BrokerDirectory

app = typer.Typer(no_args_is_help=True, help="Run a broker: mosquitto, or nats-server from its wheel.")

DIRECTORY: Final = Path("ternbus-broker")
PORT: Final = 1883
HOST: Final = "127.0.0.1"

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The broker's directory.")]
Out = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
EngineOption = Annotated[Engine, typer.Option(help="auto: mosquitto if there is one, else nats-server.")]


class _StopRequested(Exception):  # noqa: N818 - no error: SIGTERM or SIGINT has come
    pass


@app.command()
def init(
    directory: Dir,
    *,
    name: Annotated[
        list[str], typer.Option(metavar="HOST", help="Host name or address by which devices reach it; repeatable.")
    ],
    engine: EngineOption = Engine.AUTO,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one, from now on.")] = 8883,
    listen: Annotated[
        str | None, typer.Option(help="The address to listen on; default: all, if others are to reach it.")
    ] = None,
) -> None:
    """Make a broker that nobody enters without a certificate: an authority, and the broker's own certificate.

    Example: ternbus broker init bus --name 192.168.1.10 --name bus.example.org
    """
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

    home = BrokerDirectory.create(directory, names=name, port=port, engine=engine, listen=listen)
    typer.echo(f"{directory}: {home.url}, TLS 1.3, for who has a certificate of {directory}/tls/ca.pem")
    typer.echo(f"keep {directory}/tls/ca.key to yourself: whoever has it makes certificates")
    typer.echo(f"next: ternbus broker up {directory}")
    typer.echo(
        f"and:  ternbus aggregator init AGG --federation NAME --broker-dir {directory} --model MODEL.safetensors"
    )


@app.command()
def up(
    place: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="What the broker keeps.")] = None,
    *,
    engine: EngineOption = Engine.AUTO,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"Without TLS; 0: any free one. [default: {PORT}]")
    ] = None,
    host: Annotated[str | None, typer.Option(help=f"Without TLS: the address to listen on. [default: {HOST}]")] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="The same as DIR.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready in JSON.")] = False,
) -> None:
    """Run a broker that keeps what it holds in DIR; one line says when it answers. Ctrl-C or SIGTERM ends it.

    With TLS where `ternbus broker init` made DIR, else without, for this machine. DIR is `ternbus-broker` if not given.
    """
    if place is not None and directory is not None:
        raise ConfigError("the directory is given twice: leave out --dir")
    directory = place or directory or DIRECTORY
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        with _start(directory, engine, host, port) as broker:
            typer.echo(_announcement(broker, as_json))
            code = broker.wait()
            _warn(f"{broker.software} ended by itself with code {code}; its last lines:\n{broker.last_lines()}")
            raise typer.Exit(EXIT_FAILED)
    except _StopRequested:
        return


def _start(directory: Path, engine: Engine, host: str | None, port: int | None) -> RunningBroker:
    if is_home(directory):
        if host is not None or port is not None:
            raise ConfigError(f"where it listens is in {directory / HOME}; leave out --host and --port")
        from ternbus.broker.server import tls_service  # noqa: PLC0415 - certificates take a library that only few need

        return tls_service.start(_home(directory), engine)
    software = choose(engine)
    host = host or HOST
    if not is_loopback(host):
        _warn(
            f"{host} is open to the network, without TLS: anybody there can read and disturb, though not forge; "
            f"with TLS: ternbus broker init {directory} --name {host}"
        )
    return start(software, host=host, port=PORT if port is None else port, directory=directory)


@app.command()
def certificate(
    directory: Dir,
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Devices, or aggregator-FEDERATION.")],
    *,
    federation: Annotated[str, typer.Option(help="Theirs.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Write FOLDER/NAME/ with certificate, key and ca.pem.")],
) -> None:
    """Make certificates by hand, for an aggregator on another machine. `aggregator invite` makes its devices' itself.

    Example: ternbus broker certificate bus aggregator-lab pi-1 --federation lab --out certificates
    """
    home = _home(directory)
    for name in names:
        issued = home.issue(name, federation)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_secret(folder / TLS_KEY, issued.key.encode())
        (folder / CERTIFICATE).write_text(issued.certificate)
        (folder / CA).write_text(issued.authority)
        typer.echo(str(folder))


@app.command()
def renew(
    directory: Dir,
    everything: Annotated[
        bool, typer.Option("--all", help="Clients' certificates too, however long they last.")
    ] = False,
) -> None:
    """Renew the broker's certificate, for the names in broker.toml, and those of clients that end within a year.

    A running broker takes it up at once, and needs nobody for it: 60 days before the end it does this itself. Keys
    of clients stay, so what they have goes on to work until its end; a renewed one is to be copied to its device.
    """
    home = _home(directory)
    for path in home.renew(everything=everything):
        typer.echo(str(path))


@app.command()
def status(directory: Dir, as_json: AsJson = False) -> None:
    """Show the broker's address, and until when its certificates last."""
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
    columns = {"certificate of": "<", "federation": "<", "until": "<", "days": ">"}
    cells = ([row[name] for name in ("name", "federation", "until", "days_left")] for row in rows)
    typer.echo("\n".join(text_table(columns, cells)))


@app.command()
def refusals(directory: Dir, as_json: AsJson = False) -> None:
    """Show what the broker refused: how often, whom, why, and what that one wanted last.

    A client is the name in its certificate, `?` whoever proved none, `*` those beyond the first 200. What an access
    list denies is a device that is broken, or not its owner's any more: ternbus aggregator revoke AGG DEVICE.
    Counts outlive restarts; to begin anew remove refusals.json while the broker is stopped.
    """
    _home(directory)
    path = directory / counts.FILE
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"nothing was counted in {directory}: `ternbus broker up {directory}` does it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; remove it while the broker is stopped") from error
    if as_json:
        typer.echo(text)
        return
    typer.echo(f"since {found['since']}: {sum(row['count'] for row in found['refused'])} refused")
    for row in found["refused"]:
        wanted = f": {row['detail']}" if row["detail"] else ""
        why = counts.REASONS.get(row["reason"], row["reason"])
        typer.echo(f"{row['count']:>8}  {row['client']:<24} {why}\n{'':>10}last {row['last']}{wanted}")


def _home(directory: Path) -> "BrokerDirectory":
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

    home = BrokerDirectory(directory.absolute())
    home.settings()
    return home


def _stop(_signal: int, _frame: FrameType | None) -> Never:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # once is enough: the second would disturb the first
    raise _StopRequested


def _announcement(broker: RunningBroker, as_json: bool) -> str:
    if not as_json:
        return f"{broker.software} ready on {broker.url} (data in {broker.directory})"
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
