"""A command that root runs in another user's folder leaves only files of that user."""

import os
import subprocess
import tempfile
from pathlib import Path

from support.other_users import ENVIRONMENT, OTHER, PYTHON, only_root, readable_by_others
from ternbus.broker.folder_owner import act_as_owner

WRITE = """
import sys
from pathlib import Path
from ternbus.broker.files import write_secret
from ternbus.broker.folder_owner import act_as_owner
folder = Path(sys.argv[1])
act_as_owner(folder)
folder.mkdir(exist_ok=True)
write_secret(folder / "made", b"by the command")
"""


def written(folder: Path) -> tuple[int, int]:
    """The user and the group of a file that a process writes into the folder."""
    subprocess.run([PYTHON, "-c", WRITE, str(folder)], check=True, env=ENVIRONMENT)
    about = (folder / "made").stat()
    return about.st_uid, about.st_gid


@only_root
@readable_by_others
def test_root_writes_as_the_folders_owner() -> None:
    with tempfile.TemporaryDirectory() as name:  # every pytest that starts closes its own folder to other users
        folder = Path(name)
        folder.chmod(0o711)
        mine, theirs = folder / "mine", folder / "theirs"
        mine.mkdir()
        theirs.mkdir()
        os.chown(theirs, OTHER, OTHER)
        assert written(mine) == (0, 0)
        assert written(theirs) == (OTHER, OTHER)
        assert written(theirs / "new") == (OTHER, OTHER)


def test_the_owner_stays_who_it_is(tmp_path: Path) -> None:
    before = os.getresuid(), os.getresgid(), os.getgroups()
    act_as_owner(tmp_path)
    act_as_owner(tmp_path / "not" / "there")
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == before
