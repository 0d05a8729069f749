"""What commands have in common that take an invitation or a task."""

from pathlib import Path
from typing import Annotated

import typer

from ternbus.broker.files import is_exposed, load_toml
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.protocol.endpoint import check_login
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.learn.task_loader import BUILT_IN_TASKS

TASKS = f"{', '.join(BUILT_IN_TASKS)}, or your own as MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE."
InvitationFile = Annotated[Path, typer.Argument(metavar="INVITATION.toml", help="File of `ternbus aggregator invite`.")]


def load_invitation(
    path: Path, directory: Path, password_file: Path | None = None, *, no_tls: bool = False
) -> Invitation:
    """The invitation in a file, which root may read for the owner of the device's directory. Raises `ConfigError`.

    So it does for a login that does not go with the invitation's broker. A warning on stderr if others can read it.
    """
    invitation = Invitation.from_table(load_toml(path), str(path))
    invitation.check_role(None, str(path))
    if is_exposed(path):
        typer.echo(
            f"ternbus: warning: other users can read {path}, which contains a secret: chmod 600 {path}", err=True
        )
    check_login(invitation.broker, password_file, no_tls=no_tls)
    act_as_owner(directory)
    return invitation
