"""With --json a command's standard output is JSON alone, whatever a task prints."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.edge_processes import Server, answering, edge
from ternbus.broker.json_output import json_output

LOUD = """
import os
from ternbus.edge.tasks.digits_numpy import DigitsNumpy

print("at the import")


class Loud(DigitsNumpy):
    def initial(self, seed):
        print("in the task")
        os.system("echo from a process")
        return super().initial(seed)


TASK = Loud()
"""
PRINTED = {"at the import", "in the task", "from a process"}


@pytest.fixture
def loud(tmp_path: Path) -> str:
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "grid.toml").write_text(
        'seeds = 1\n[scenario]\ntask = "loud.py"\ndevices = 2\nend = { versions = 1 }\n[axes.a]\none = {}\n'
    )
    return str(tmp_path / "loud.py")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with answering(tmp_path) as started:
        yield started


def ternbus(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ternbus", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["edge", "check", "loud:TASK"],
        ["lab", "partition", "--task", "loud:TASK", "--devices", "2"],
        ["lab", "simulate", "--task", "loud:TASK", "--devices", "2", "--versions", "1"],
        ["lab", "simulate", "--task", "loud:TASK", "--devices", "2", "--versions", "1", "--jobs", "2"],
        ["lab", "experiment", "grid.toml", "--jobs", "1"],
    ],
    ids=["check", "partition", "simulate", "workers", "experiment"],
)
@pytest.mark.usefixtures("loud")
def test_a_command_prints_json_alone(tmp_path: Path, command: list[str]) -> None:
    ran = ternbus(tmp_path, *command, "--json")
    json.loads(ran.stdout)
    assert set(ran.stderr.splitlines()) >= (PRINTED if "partition" not in command else {"at the import"})


@pytest.mark.slow
def test_without_json_a_task_prints_as_always(tmp_path: Path, loud: str) -> None:
    assert set(ternbus(tmp_path, "edge", "check", loud).stdout.splitlines()) >= PRINTED


@pytest.mark.slow
def test_a_device_prints_json_alone(server: Server, tmp_path: Path, loud: str) -> None:
    joining = edge("join", server.invite(tmp_path, "pi"), tmp_path / "pi", "--task", loud, "--json")
    running = ("run", tmp_path / "pi", "--versions", "1", "--json")
    for process in (joining, None):
        ended = process or edge(*running)
        server.until(lambda ended=ended: ended.poll() is not None)  # type: ignore[misc]
        out, err = ended.communicate()
        assert ended.returncode == 0, err
        assert [json.loads(line)["event"] for line in out.splitlines()][-1] == "stopped"
        assert set(err.splitlines()) >= PRINTED


def test_the_stream_of_a_test_or_a_notebook_is_kept_apart_too(capsys: pytest.CaptureFixture[str]) -> None:
    with json_output(True) as own:
        print("noise")
        own.write("{}")
    print("after")
    out, err = capsys.readouterr()
    assert (out, err) == ("{}after\n", "noise\n")
