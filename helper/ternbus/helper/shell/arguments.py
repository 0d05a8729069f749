"""What the commands of `ternbus helper` have in common."""

from pathlib import Path
from typing import Annotated

import typer

from ternbus.broker.folder_owner import as_owner

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The helper's directory.", callback=as_owner)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
