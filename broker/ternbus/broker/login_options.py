"""The options of commands that log in to a broker with a password."""

from pathlib import Path
from typing import Annotated

import typer

PasswordFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="File with the broker's password in its first line; mode 0600, with TLS or --no-tls only."
    ),
]
NoTls = Annotated[
    bool,
    typer.Option("--no-tls", help="Send the password unencrypted, on a network where you trust everyone."),
]
