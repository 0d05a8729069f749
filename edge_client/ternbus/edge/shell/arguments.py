"""What the commands of `ternbus edge` have in common. It imports little: see `run_commands`."""

from pathlib import Path
from typing import Annotated

import typer

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The device's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object per line and event, for scripts.")]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Longest wait for broker, aggregator or model; no limit by default."),
]
Stay = Annotated[
    bool, typer.Option("--stay", help="Wait while the federation is closed, for `aggregator resume`; for services.")
]
Reports = Annotated[
    bool,
    typer.Option(
        "--report-metrics",
        help="Send each version's metrics on the held-out data, and class counts; the broker can read them.",
    ),
]
FineTune = Annotated[
    float,
    typer.Option(
        min=0,
        max=1e4,
        metavar="EPOCHS",
        help="Epochs of fine-tuning before the device stops; the personal model is DIR/personal.safetensors.",
    ),
]
