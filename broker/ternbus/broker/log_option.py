"""The option `--log` of all services."""

from enum import StrEnum
from typing import Annotated

import typer


class LogFormat(StrEnum):
    """How a service writes its log."""

    TEXT = "text"
    JSON = "json"


LogOption = Annotated[LogFormat, typer.Option("--log", help="Format of the log: text, or json with one object a line.")]
