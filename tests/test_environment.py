"""Faults of a task, its data and its surroundings end every command in words, never in a traceback of ours."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import typed
from support.edge_processes import Server, answering, edge
from ternbus.aggregator.settings import from_table
from ternbus.aggregator.shell import transport
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import check_readable
from ternbus.command import _expanded

pytestmark = pytest.mark.slow
HEAD = "from ternbus.edge.tasks.digits_numpy import DigitsNumpy\n\n\nclass Own(DigitsNumpy):\n    "
TASKS = {  # the module's text, and what is said of it
    "syntax": ("def (\n", "odd.py, line 1: SyntaxError"),
    "import": ("import nothing_there\n", "install it, or put nothing_there.py beside the task"),
    "recursion": ("def again():\n    again()\n\n\nagain()\n", "odd.py, line 2: RecursionError"),
    "exit": ("import sys\n\nsys.exit(0)\n", "odd.py, line 3: sys.exit(0) during the import"),
    "kind": ("TASK = 7\n", "odd:TASK is not a task: a task needs name"),
    "name": (f"{HEAD}pass\n\n\nTASK = Own(name=None)\n", "name is NoneType, but must be a text"),
    "plan": (f"{HEAD}pass\n\n\nTASK = Own(default_plan=None)\n", "default_plan is NoneType, but must be a dict"),
    "signature": (f"{HEAD}def initial(self): ...\n\n\nTASK = Own()\n", "initial() takes 1 positional argument"),
    "model": (f"{HEAD}def initial(self, seed): return [1]\n\n\nTASK = Own()\n", "initial() returned no tensors"),
    "tensor": (f"{HEAD}def initial(self, seed): return {{'w': 'x'}}\n\n\nTASK = Own()\n", "returned 'w' as str"),
    "leaves": (f"{HEAD}def initial(self, seed): raise SystemExit(0)\n\n\nTASK = Own()\n", "sys.exit(0)"),
}
COMMANDS = {
    "check": ["edge", "check", "odd:TASK"],
    "init-model": ["edge", "init-model", "odd:TASK", "model.safetensors"],
    "simulate": ["lab", "simulate", "--task", "odd:TASK", "--devices", "2", "--versions", "1"],
    "run": ["lab", "run", "--task", "odd:TASK", "--devices", "2", "--versions", "1"],
}
RETURNS_ODD = """def evaluator(self, **_): return Odd()


class Odd:
    samples = 1

    def evaluate(self, _): return 5


TASK = Own()
"""
LATE = {  # what only a training or an evaluation meets; the exit code of a simulation
    "trainer": (f"{HEAD}def trainer(self): ...\n\n\nTASK = Own()\n", "unexpected keyword argument 'data'", 2),
    "none": (f"{HEAD}def trainer(self, **_): return None\n\n\nTASK = Own()\n", "'NoneType' object has no attribute", 1),
    "evaluator": (f"{HEAD}def evaluator(self, **_): return None\n\n\nTASK = Own()\n", "has no attribute 'evaluate'", 2),
    "evaluation": (HEAD + RETURNS_ODD, "object has no attribute", 2),
}
OPENS = """def trainer(self, *, data, partition):
        open(data / "x").close()
        return super().trainer(data=None, partition=partition)


TASK = Own()
"""
GOOD = HEAD + OPENS
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def ternbus(folder: Path, *arguments: object, shell: str = "", **environment: str) -> tuple[int, str]:
    """The exit code of a command, and what it printed; ``shell`` is what follows it in a shell's line."""
    command = [sys.executable, "-m", "ternbus", *map(str, arguments)]
    line = ["bash", "-c", f'"$@" {shell}', "bash", *command] if shell else command
    ran = subprocess.run(
        line, cwd=folder, env={**os.environ, **environment}, capture_output=True, timeout=120, check=False
    )
    text = (ran.stdout + ran.stderr).decode(errors="replace")
    assert "Traceback" not in text, text
    return ran.returncode, text


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with answering(tmp_path) as started:
        yield started


def typed_with(name: str, text: str, tmp_path: Path, command: str, code: int) -> str:
    """What a command says of a task with a name that no other test has, since modules stay in this process."""
    (tmp_path / f"{name}.py").write_text(text)
    return typed(tmp_path, *(word.replace("odd:", f"{name}:") for word in COMMANDS[command]), code=code)


@pytest.mark.parametrize("command", ["check", "init-model", "simulate"])
@pytest.mark.parametrize("fault", TASKS)
def test_a_task_that_is_none_is_a_mistake_in_words(tmp_path: Path, fault: str, command: str) -> None:
    text, said = TASKS[fault]
    name = f"odd_{fault}_{command.replace('-', '_')}"
    assert said.replace("odd", name) in typed_with(name, text, tmp_path, command, 2)


@pytest.mark.parametrize(("fault", "command"), [("syntax", "check"), ("model", "run")])
def test_a_process_says_so_too(tmp_path: Path, fault: str, command: str) -> None:
    text, said = TASKS[fault]
    (tmp_path / "odd.py").write_text(text)
    code, out = ternbus(tmp_path, *COMMANDS[command])
    assert (code, said in out) == (2, True), out


@pytest.mark.parametrize("fault", LATE)
def test_a_task_that_fails_later_is_named_too(tmp_path: Path, fault: str) -> None:
    text, said, ends = LATE[fault]
    out = typed_with(f"late_{fault}", text, tmp_path, "check", 2)
    assert said in out or "it must return an Evaluation" in out
    assert said in typed_with(f"late_{fault}", text, tmp_path, "simulate", ends)


def test_data_that_are_not_there_keep_the_invitation_unspent(server: Server, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    task, invitation = str(tmp_path / "good.py"), server.invite(tmp_path, "pi")
    for typo in ("typo", "~/no/such/folder", "good.py/typo"):
        code, out = ternbus(tmp_path, "edge", "join", invitation, "pi", "--task", task, "--data", typo)
        assert (code, "does not exist; correct the path" in out) == (2, True), out
    assert not (tmp_path / "pi").exists()
    data = tmp_path / "data"
    data.mkdir()
    (data / "x").write_text("")
    code, out = server.until_ended(edge("join", invitation, tmp_path / "pi", "--task", task, "--data", data))
    assert code == 0, out
    (data / "x").unlink()
    assert "missing data" in failed(tmp_path)
    data.rmdir()
    assert "missing data" in failed(tmp_path)
    data.write_text("a file")
    assert "missing data" in failed(tmp_path)
    (tmp_path / "good.py").unlink()
    assert f"no file {task}; correct the path" in failed(tmp_path)


def failed(folder: Path) -> str:
    code, out = ternbus(folder, "edge", "run", "pi", "--timeout", "5")
    assert code == 2, out
    return out


@pytest.mark.parametrize(
    "command",
    [["lab", "run"], ["lab", "simulate"], ["lab", "experiment", "staleness"], ["edge", "check", "digits"]],
    ids=" ".join,
)
def test_the_folder_of_data_is_looked_for_first(tmp_path: Path, command: list[str]) -> None:
    code, out = ternbus(tmp_path, *command, "--data", "typo")
    assert (code, "typo does not exist; correct the path" in out) == (2, True), out


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_needs_no_open_stream(tmp_path: Path, closed: str) -> None:
    simulate = [
        "lab",
        "simulate",
        "--task",
        "digits-numpy",
        "--devices",
        "2",
        "--versions",
        "1",
        "--out",
        tmp_path / "o",
    ]
    assert ternbus(tmp_path, *simulate, shell=closed)[0] == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["accuracy"] > 0
    assert ternbus(tmp_path, "edge", "check", "digits-numpy", "--json", shell=closed)[0] == 0
    assert ternbus(tmp_path, "edge", "init-model", "digits-numpy", "m.safetensors", shell=closed)[0] == 0


def test_a_reader_may_leave_early_and_a_disk_may_be_full(tmp_path: Path) -> None:
    for command in (["lab", "example"], ["edge", "check", "digits-numpy", "--json"], ["edge", "--help"]):
        ternbus(tmp_path, *command, shell="| true")
        code, out = ternbus(tmp_path, *command, shell="> /dev/full")
        assert (code, "No space left on device: standard output" in out) == (1, True), out


def test_names_that_are_no_text_and_terminals_without_letters_are_survived(tmp_path: Path) -> None:
    name = os.fsdecode(b"d\xff\xc3\xa9")
    folder = tmp_path / name
    folder.mkdir()
    (folder / "x").write_text("")
    (tmp_path / "good.py").write_text(GOOD)
    for environment in ({}, ASCII):
        code, out = ternbus(
            tmp_path, "edge", "init-model", "digits-numpy", folder / "m.safetensors", "--force", **environment
        )
        assert code == 0, out
        code, out = ternbus(tmp_path, "edge", "check", "good:TASK", "--data", folder, **environment)
        assert code == 0, out
        code, out = ternbus(tmp_path, "edge", "check", "good:TASK", "--data", folder / "no", **environment)
        assert code == 2, out
        code, out = ternbus(tmp_path, "aggregator", "status", folder / "agg", **environment)
        assert (code, "holds no aggregator" in out) == (2, True), out
        code, out = ternbus(tmp_path, "broker", "up", folder / "bus", "--port", "0", **environment)
        assert (code, "not UTF-8: rename the file or folder" in out) == (2, True), out
        code, out = ternbus(tmp_path, "lab", "example", **environment)
        assert code == 0, out
    code, out = ternbus(tmp_path, "edge", "status", tmp_path / "pi", HOME="")
    assert code == 2, out


def test_a_home_is_found_behind_a_tilde_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _expanded("--out=~/x") == f"--out={tmp_path}/x"
    assert [_expanded(each) for each in ("~/x", "x~", "--plan", "a=~", "~")] == [
        f"{tmp_path}/x",
        "x~",
        "--plan",
        "a=~",
        str(tmp_path),
    ]
    code, out = ternbus(tmp_path, "edge", "init-model", "digits-numpy", "~/m.safetensors")
    assert (code, (tmp_path / "m.safetensors").exists()) == (0, True), out
    (tmp_path / "scenario.toml").write_text(
        'task = "digits-numpy"\ndevices = 2\ndata = "~/no"\nend = { versions = 1 }\n'
    )
    code, out = ternbus(tmp_path, "lab", "simulate", "~/scenario.toml", "--out=~/out")
    assert (code, f"data: {tmp_path}/no does not exist" in out) == (2, True), out
    table = {
        "federation": "lab",
        "broker": "mqtts://127.0.0.1:1",
        "transport": {"username": "agg", "password_file": "~/secret"},
    }
    (tmp_path / "secret").write_text("word\n")
    (tmp_path / "secret").chmod(0o600)
    transport.connect(tmp_path / "elsewhere", from_table(table), lambda _: None)  # raises an error if it finds none


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_data_that_this_user_cannot_read_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    with pytest.raises(ConfigError, match="cannot read"):
        check_readable(tmp_path, "data")
    tmp_path.chmod(0o700)
