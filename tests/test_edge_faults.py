"""What goes wrong around a device's process: its task, its data, its disk, its end."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.commands import typed
from support.edge_processes import Server, answering, edge, joined
from support.other_users import ENVIRONMENT, OTHER, PYTHON, only_root, readable_by_others
from support.scripted_aggregator import FEDERATION
from ternbus import command
from ternbus.broker.errors import ConfigError, CorruptError, FederationError, StorageError
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.core.state import State
from ternbus.edge.learn.failure import explained
from ternbus.edge.shell import agent
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.options import Options
from ternbus.edge.store.outbox import FILE, Outbox

INVITATION = Invitation(
    federation=FEDERATION,
    device="pi",
    broker="mqtt://127.0.0.1:1",
    aggregator_key=Identity.generate().public.hex(),
    code="c" * 32,
)
TASK = """
import ctypes
import threading
from pathlib import Path

from ternbus.edge.tasks.digits_numpy import DigitsNumpy

HERE = Path(__file__).parent


class Trainer:
    def __init__(self, inner):
        self.inner = inner
        self.samples = inner.samples

    def evaluate(self, tensors):
        return self.inner.evaluate(tensors)

    def train(self, *start, **about):
        (HERE / "data").stat()
        if (HERE / "hang").exists():
            (HERE / "hangs").touch()
            threading.Thread(target=ctypes.CDLL(None).sleep, args=(3600,)).start()
            ctypes.CDLL(None).sleep(3600)
        return self.inner.train(*start, **about)


class Mine(DigitsNumpy):
    def trainer(self, *, data, partition):
        return Trainer(super().trainer(data=None, partition=partition))


TASK = Mine()
"""
NEEDS_DATA = """
from ternbus.edge.tasks.digits_numpy import DigitsNumpy


class Mine(DigitsNumpy):
    def trainer(self, *, data, partition):
        (data / "train.npz").read_bytes()


TASK = Mine()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with answering(tmp_path) as server:
        yield server


@pytest.mark.slow
def test_a_task_that_fails_recovers_and_one_that_hangs_holds_no_stop(server: Server, tmp_path: Path) -> None:
    """SIGHUP comes while the task's code is in a C function, and in a thread of its own, for an hour."""
    (tmp_path / "mine.py").write_text(TASK)
    process = edge("run", joined(server, tmp_path, task=f"{tmp_path}/mine.py:TASK"), "--json")
    server.until(lambda: server.statuses and server.statuses[-1].failing)
    failing = server.statuses[-1]
    assert failing.state == "idle"
    assert failing.failing == f"missing data: {tmp_path}/data: No such file or directory"
    (tmp_path / "data").touch()
    server.until(lambda: server.updates)
    assert server.statuses[-1].failing == ""
    (tmp_path / "hang").touch()
    server.until((tmp_path / "hangs").exists)
    process.send_signal(signal.SIGHUP)
    code, said = server.until_ended(process)
    assert code == 0, said
    assert '"stopped: SIGHUP"' in said
    server.until(lambda: server.statuses[-1].state == "offline")


@pytest.mark.slow
def test_a_full_disk_ends_a_device_in_one_line_and_the_broker_says_that_it_is_offline(
    server: Server, tmp_path: Path
) -> None:
    folder = joined(server, tmp_path)
    process = edge("run", folder)
    server.until(lambda: server.updates)
    # Not the clean end: the broker publishes the last will.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, 1))
    code, said = server.until_ended(process)
    assert code == 1, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"ternbus: {folder / FILE}: ")
    server.until(lambda: server.statuses[-1].state == "offline")
    code, said = server.until_ended(edge("run", folder, "--versions", 1))
    assert code == 0, said


def write_invitation(folder: Path) -> Path:
    path = folder / "pi.toml"
    path.write_text(INVITATION.dumps())
    path.chmod(0o600)
    return path


def exit_code(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(each) for each in arguments])
    return ended.value.code


def test_a_folder_of_data_that_is_not_there_costs_no_invitation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "digits-numpy", "--data", tmp_path / "typo", "--timeout", 1]
    assert exit_code("edge", "join", write_invitation(tmp_path), tmp_path / "pi", *arguments) == 2
    assert capsys.readouterr().err == (f"ternbus: --data: {tmp_path}/typo does not exist; correct the path\n")
    assert not (tmp_path / "pi").exists()


def member(folder: Path, *, task: str, data: Path | None = None) -> DeviceDirectory:
    """The folder of a device that has joined."""
    home = DeviceDirectory(folder)
    settings = home.prepare(INVITATION, task=task, data=data, partition="all")
    home.write(replace(settings, code=""))
    key = home.identity().key_id
    with Outbox(folder, key) as outbox:
        outbox.save(State(key=key, enrolled=True), None, {})
    return home


@pytest.mark.parametrize("stdin", ["", *(pytest.param(each, marks=pytest.mark.slow) for each in ("<&-", "</dev/null"))])
def test_leaving_without_a_terminal_needs_the_option_that_confirms(tmp_path: Path, stdin: str) -> None:
    member(tmp_path / "pi", task="digits-numpy")
    said = "ternbus: pi is not removed: there is no terminal to ask for confirmation; add --yes\n"
    if not stdin:
        assert typed(tmp_path, "edge", "leave", "pi", code=2) == said
    else:
        line = f"{sys.executable} -m ternbus edge leave pi {stdin}"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert (tmp_path / "pi" / FILE).exists()


def ended_by(home: DeviceDirectory) -> FederationError:
    """What ends `ternbus edge run` before it connects."""
    with pytest.raises(FederationError) as raised:
        agent.serve(home, "train", Options(timeout_s=0.0), lambda _: None)
    return raised.value


def test_data_that_have_vanished_are_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "needs_data.py").write_text(NEEDS_DATA)
    (tmp_path / "data").mkdir()
    home = member(tmp_path / "pi", task=f"{tmp_path}/needs_data.py:TASK", data=tmp_path / "data")
    (tmp_path / "data").rmdir()
    error = ended_by(home)
    assert isinstance(error, ConfigError)
    assert str(error) == (
        f"the task {tmp_path}/needs_data.py:TASK fails: missing data: {tmp_path}/data/train.npz: "
        "No such file or directory"
    )


def test_a_task_that_needs_data_says_so_if_none_were_named(tmp_path: Path) -> None:
    (tmp_path / "needs_some.py").write_text(NEEDS_DATA)
    error = ended_by(member(tmp_path / "pi", task=f"{tmp_path}/needs_some.py:TASK"))
    assert isinstance(error, ConfigError)
    assert str(error).startswith(
        f"the task {tmp_path}/needs_some.py:TASK fails: a bug in the task: needs_some.py, line 7: TypeError: "
    )
    assert str(error).endswith("; if it needs data, name their folder with --data")


def test_a_corrupt_outbox_is_named(tmp_path: Path) -> None:
    home = member(tmp_path / "pi", task="digits-numpy")
    (home.folder / FILE).write_bytes(b"never written by us " * 100)
    error = ended_by(home)
    assert isinstance(error, CorruptError)
    assert str(home.folder / FILE) in str(error)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ValueError("odd"), ConfigError),
        (FileNotFoundError(2, "No such file or directory", "/srv/data"), ConfigError),
        (OSError(5, "Input/output error", "/srv/data"), StorageError),
        (MemoryError(), StorageError),
        (SystemExit("enough"), ConfigError),
        (ConfigError("no data in /srv"), ConfigError),
    ],
    ids=repr,
)
def test_what_may_work_another_time_is_told_from_a_mistake(raised: BaseException, kind: type[Exception]) -> None:
    with pytest.raises(kind), explained("mine:TASK"):
        raise raised


@pytest.mark.slow
@only_root
@readable_by_others
def test_commands_of_root_leave_only_files_of_the_folders_owner() -> None:
    with tempfile.TemporaryDirectory() as name:  # every pytest that starts closes its own folder to other users
        folder = Path(name)
        folder.chmod(0o711)
        (folder / "new").mkdir()
        home = member(folder / "pi", task="digits-numpy")
        for each in [folder / "new", home.folder, *home.folder.iterdir()]:
            os.chown(each, OTHER, OTHER)
        invitation = write_invitation(folder)  # only root may read it
        assert as_root("join", invitation, folder / "new", "--task", "digits-numpy", "--timeout", 0) == 1
        assert as_root("status", home.folder) == 0
        made = {each: each.stat().st_uid for device in ("pi", "new") for each in (folder / device).iterdir()}
        assert {each.name for each in made} >= {FILE, "device.key", "edge.toml", "lock"}
        assert set(made.values()) == {OTHER}


def as_root(*arguments: object) -> int:
    """The exit code of `ternbus edge`."""
    command = [PYTHON, "-m", "ternbus", "edge", *map(str, arguments)]
    return subprocess.run(command, timeout=60, check=False, env=ENVIRONMENT).returncode


def test_a_device_that_stays_makes_no_model_of_its_own(tmp_path: Path) -> None:
    home = DeviceDirectory(tmp_path / "pi")
    settings = home.prepare(INVITATION, task="digits-numpy", data=None, partition="all", hold_out=0.2)
    agent.check(settings, Options(stays=True))
    agent.check(settings, Options(fine_tune=1.0))
    with pytest.raises(ConfigError, match="--fine-tune works when the federation closes, and --stay waits"):
        agent.check(settings, Options(fine_tune=1.0, stays=True))
