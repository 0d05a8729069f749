"""The command `ternbus aggregator metrics`."""

from pathlib import Path
from typing import Annotated

import typer

from ternbus.aggregator.shell.arguments import DirAsRoot
from ternbus.aggregator.store.ledger import blaming
from ternbus.broker import files
from ternbus.broker.files import replacing, storing
from ternbus.broker.folder_owner import act_as_owner


def metrics(
    directory: DirAsRoot,
    textfile: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File to write instead, atomically, for the textfile collector of node_exporter; it ends in .prom.",
        ),
    ] = None,
) -> None:
    """Print the metrics of an aggregator in the text format of Prometheus, also while none runs.

    docs/metrics.md lists them. `aggregator run --dashboard` serves the same at /metrics.

    It needs the extra `dashboard`.

    Example: ternbus aggregator metrics agg --textfile /var/lib/prometheus/node-exporter/ternbus.prom
    """
    from ternbus.aggregator.dashboard.metrics import exposition  # noqa: PLC0415 - a library that only this needs

    if textfile is None:
        act_as_owner(directory)
    with blaming(directory):
        body, _ = exposition(directory)
    if textfile is None:
        typer.echo(body.decode(), nl=False)
        return
    with storing(textfile), replacing(textfile) as partial:
        files.write_text(partial, body.decode())
