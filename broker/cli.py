"""`ternbus broker …`: run a broker on this machine until a signal comes."""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Never

import typer

from broker.running import Engine, RunningBroker, choose, is_loopback, start

app = typer.Typer(no_args_is_help=True, help="Run a broker: mosquitto, or nats-server from its wheel.")


class _StopRequested(Exception):  # noqa: N818 - no error: SIGTERM or SIGINT has come
    pass


@app.callback()
def _options() -> None:
    """Without a callback typer would make a lone command the whole program."""


@app.command()
def up(
    engine: Annotated[Engine, typer.Option(help="auto: mosquitto if there is one, else nats-server.")] = Engine.AUTO,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 1883,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    directory: Annotated[Path, typer.Option("--dir", help="What the broker keeps.")] = Path("ternbus-broker"),
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready in JSON.")] = False,
) -> None:
    """Run a broker that keeps what it holds in DIR; one line says when it answers. Ctrl-C or SIGTERM ends it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        software = choose(engine)
        if not is_loopback(host):
            _warn(f"{host} is open to the network, without TLS: anybody there can read and disturb, though not forge")
        with start(software, host=host, port=port, directory=directory) as broker:
            typer.echo(_announcement(broker, as_json))
            code = broker.wait()
            _warn(f"{software} ended by itself with code {code}; its last lines:\n{broker.last_lines()}")
            raise typer.Exit(1)
    except _StopRequested:
        return


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
