"""The user whose folder a command works in: under root, a command leaves no file that this user cannot use."""

import os
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

import ternbus
from ternbus.broker.errors import ConfigError


def as_owner(folder: Path) -> Path:
    """The argument of a command as it is, after root has become the owner of the folder."""
    act_as_owner(folder)
    return folder


def act_as_owner(folder: Path) -> None:
    """Under root, take over the user and the groups of the folder's owner for the rest of this process.

    A folder that does not exist yet counts as its nearest parent that does. Does nothing for a user other than root,
    or for a folder of root. What only root may read has to be read before. ConfigError, with what to do, if this
    process may not change its user, or if the owner cannot read Python or Ternbus: a command imports much of them only
    when it needs it.
    """
    if os.geteuid() != 0:
        return
    about = next(each for each in (folder, *folder.absolute().parents) if each.exists()).stat()
    if about.st_uid == 0:
        return
    try:
        owner = pwd.getpwuid(about.st_uid)
    except KeyError:  # a user that this machine has no name for, as in a container
        owner = None
    user = owner.pw_name if owner is not None else about.st_uid
    installed = [(what, place) for what, place in _installation() if place.exists()]  # else inside an archive
    try:
        if owner is None:
            os.setgroups([about.st_gid])
        else:
            os.initgroups(owner.pw_name, about.st_gid)
        os.setgid(about.st_gid)
        os.setuid(about.st_uid)
    except OSError as error:
        raise ConfigError(
            f"{folder} belongs to user {user}, and root cannot become this user here ({error.strerror}): "
            "run the command as this user"
        ) from error
    for what, place in installed:
        if not os.access(place, os.R_OK | os.X_OK):
            raise ConfigError(
                f"{what} in {place} cannot be read by user {user}, to whom {folder} belongs: install Ternbus with its "
                f"Python where {user} can read them, such as /opt/ternbus, or run the command as {user} with an "
                "installation of its own"
            )
    if owner is not None:
        os.environ["HOME"] = owner.pw_dir  # libraries keep caches there


def _installation() -> Iterator[tuple[str, Path]]:
    """Where a command imports from when it is under way, and what it starts processes by."""
    for portion in ternbus.__path__:
        yield "Ternbus", Path(portion)
    yield "a library of Ternbus", Path(typer.__file__).parent
    yield "Python", Path(os.__file__).parent
    yield "Python", Path(sys.executable)
