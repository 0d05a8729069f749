"""The user whose folder a command works in: under root, a command leaves no file that this user cannot use."""

import os
import pwd
from pathlib import Path

from ternbus.broker.errors import ConfigError


def act_as_owner(folder: Path) -> None:
    """Under root, take over the user and the groups of the folder's owner for the rest of this process.

    A folder that does not exist yet counts as its nearest parent that does. Does nothing for a user other than root,
    or for a folder of root. What only root may read has to be read before. ConfigError, with what to do, if this
    process may not change its user.
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
    try:
        if owner is None:
            os.setgroups([about.st_gid])
        else:
            os.initgroups(owner.pw_name, about.st_gid)
        os.setgid(about.st_gid)
        os.setuid(about.st_uid)
    except OSError as error:
        user = owner.pw_name if owner is not None else about.st_uid
        raise ConfigError(
            f"{folder} belongs to user {user}, and root cannot become this user here ({error.strerror}): "
            "run the command as this user"
        ) from error
    if owner is not None:
        os.environ["HOME"] = owner.pw_dir  # libraries keep caches there
