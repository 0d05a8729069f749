"""The runbook, docs/operations.md: its commands do what it says, with real processes."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.commands import typed
from ternbus.aggregator.shell import backup
from ternbus.aggregator.store import status as statuses
from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.broker.server import running

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
WITHIN_S = 600.0  # ends a wait for what never comes


def printed(section: str) -> list[list[str]]:
    """The words after `ternbus` of the commands in a section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line.split() for line in re.findall(r"^ternbus (.*)$", text, flags=re.MULTILINE)]


class Machine:
    """The folder in which the page's commands are run, with a folder for /backups in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.agg, self.backups = folder, folder / "agg", folder / "backups"

    def named(self, *words: str) -> list[str]:
        made = backup.found_in(self.backups, "lab")[-1].name if self.backups.exists() else ""
        return [re.sub(r"lab-\d{8}T\d{6}Z", made, word).replace("/backups", str(self.backups)) for word in words]

    def do(self, *words: str) -> str:
        return typed(self.folder, *self.named(*words))

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen([sys.executable, "-m", "ternbus", *self.named(*words)], cwd=self.folder) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(WITHIN_S)

    @property
    def version(self) -> int:
        return int(statuses.read(self.agg)["version"])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def until_the_end() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_federation_is_backed_up_lost_and_restored_with_an_empty_broker(
    tmp_path: Path, until_the_end: ExitStack
) -> None:
    """The device runs on all the while, and nobody tells it anything."""
    machine = Machine(tmp_path)
    software = running.choose(running.Engine.AUTO)
    (make_backup,) = printed("Back up, once a day")
    (prune,) = printed("A full disk")
    checks, restores, repairs = (printed(each) for each in ("Check", "Restore on the same machine", "Damage"))
    with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        url, port = broker.url, broker.endpoint.port
        machine.do("edge", "init-model", "digits-numpy", "m.safetensors")
        machine.do(
            *("aggregator", "init", "agg", "--federation", "lab", "--broker", url, "--model", "m.safetensors"),
            *("--set", "merge.buffer_size=1"),
        )
        machine.do("aggregator", "invite", "agg", "pi", "--out", ".")
        with machine.running("aggregator", "run", "agg"):
            with machine.running("edge", "join", "pi.toml", "pi", "--task", "digits-numpy") as joining:
                assert joining.wait(WITHIN_S) == 0
            device = until_the_end.enter_context(machine.running("edge", "run", "pi", "--min-seconds", "0.2"))
            wait_for(lambda: machine.version >= 2)
            machine.do(*make_backup)
            for words in checks:
                machine.do(*words)
            newest = machine.version
            wait_for(lambda: machine.version > newest)
    shutil.rmtree(tmp_path / "agg")
    shutil.rmtree(tmp_path / "broker")
    (restored,) = map(int, re.findall(r"continues at version (\d+)", machine.do(*restores[0])))
    assert restored > RESTORE_LEAP
    with running.start(software, host="127.0.0.1", port=port, directory=tmp_path / "broker"):
        with machine.running(*restores[1]):
            wait_for(lambda: machine.version > restored)  # the device follows
            assert device.poll() is None
        until_the_end.close()
    assert "has no rows to archive" in machine.do(*prune)  # with so few versions
    (snapshot,) = machine.agg.glob("vectors/*-server.f32")
    snapshot.write_bytes(snapshot.read_bytes()[:-1])
    assert "goes on from version" in machine.do(*repairs[0])
    machine.do(*checks[0])
    assert repairs[1] == restores[1]
    elsewhere = Machine(tmp_path / "new")
    elsewhere.folder.mkdir()
    elsewhere.backups = machine.backups
    made = backup.found_in(machine.backups, "lab")[-1]
    shutil.copytree(made, elsewhere.folder / made.name)
    on_a_new_machine = printed("Restore on a new machine")
    assert "continues at version" in elsewhere.do(*on_a_new_machine[0])
    elsewhere.do(*checks[0])
    assert on_a_new_machine[1] == restores[1]
