"""What the commands of `ternbus aggregator` have in common."""

from pathlib import Path
from typing import Annotated

import typer

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the aggregator.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
