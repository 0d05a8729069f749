"""The `ternbus` command as a process: what it imports, what it prints, how it exits."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ternbus.command import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

# Stands in for the lab's command line, each command one way in which a real one may end.
FAKE_LAB = """
import sys
import typer
from pathlib import Path
from ternbus.broker.errors import ConfigError, CorruptError, FederationError, LinkError, StorageError
from ternbus.broker.files import write_secret, write_text

app = typer.Typer()

@app.command()
def modules() -> None:
    print(*sys.modules)

@app.command()
def misconfigured() -> None:
    raise ConfigError("no aggregator.toml in DIR; run `ternbus aggregator init DIR` first")

@app.command()
def unreachable() -> None:
    raise LinkError("127.0.0.1:1 refuses the connection")

@app.command()
def storage() -> None:
    raise StorageError("agg/ledger.sqlite: database or disk is full")

@app.command()
def unanswered() -> None:
    raise FederationError("the aggregator did not answer")

@app.command()
def corrupt() -> None:
    raise CorruptError("agg/ledger.sqlite: malformed")

@app.command()
def write(path: Path) -> None:
    write_text(path, "text")

@app.command()
def keep(path: Path) -> None:
    write_secret(path, b"x" * 1000)

@app.command()
def buggy() -> None:
    secret_seed = "4f2c"
    raise ZeroDivisionError

@app.command()
def wait() -> None:
    print("waiting", flush=True)
    sys.stdin.read()

@app.command()
def chatty() -> None:
    for line in range(100_000):
        print(line)
"""


# The command as it is, but `lab` is the module beside it.
WITH_FAKE_LAB = """
from ternbus.command import COMMANDS, Command, main

COMMANDS["lab"] = Command("fake_lab", "Stands in for the lab.")
main()
"""


@pytest.fixture
def fake_lab(tmp_path: Path) -> Path:
    """A folder in which `python -c WITH_FAKE_LAB` finds the stand-in."""
    (tmp_path / "fake_lab.py").write_text(FAKE_LAB)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ternbus", *arguments]


def faked(*arguments: str) -> list[str]:
    return [sys.executable, "-c", WITH_FAKE_LAB, "lab", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return ended(command(*arguments), ROOT)


def ended(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def loaded_by(*arguments: str) -> tuple[list[str], set[str]]:
    """The lines that a command prints, and the modules that are loaded when it has finished."""
    code = f"import sys; from ternbus.command import main\ntry: main({arguments!r})\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    return lines, set(modules.split())


def test_help_names_every_command_and_imports_none() -> None:
    lines, modules = loaded_by("--help")
    for name, entry in COMMANDS.items():
        assert any(f" {name} " in line and entry.help in line for line in lines)
        assert entry.module not in modules


def test_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"ternbus {version('ternbus')}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: ternbus {name} " in done.stdout
    assert COMMANDS[name].help in done.stdout


def each_command(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and, if it is a group, those within, each with the words that call it."""
    yield words, command
    for name, within in getattr(command, "commands", {}).items():
        yield from each_command((*words, name), within)


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_where_the_terminal_is_narrow(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words, command in each_command((name,), get_command(import_module(COMMANDS[name].module).app)):
        said = command.get_help(command.make_context(" ".join(words), [], resilient_parsing=True))
        assert max(map(len, said.splitlines())) <= columns
        within = [each.help.split(".")[0] for each in getattr(command, "commands", {}).values()]
        for text in [*(each.help for each in command.params), *within]:
            assert "".join(text.split()) in "".join(said.split())
        assert {option for each in command.params for option in each.opts if option[0] == "-"} <= {*said.split()}
        assert not re.search(r"\w-$", said, re.MULTILINE)  # a name that is broken cannot be copied


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("broker", {"ternbus.aggregator", "ternbus.edge", "ternbus.lab", "torch", "matplotlib"}),
        ("aggregator", {"ternbus.edge", "ternbus.lab", "torch", "matplotlib"}),
        ("edge", {"ternbus.aggregator", "ternbus.lab", "torch", "matplotlib"}),
        ("helper", {"ternbus.aggregator", "ternbus.edge", "ternbus.lab", "torch", "matplotlib", "cryptography"}),
        ("lab", {"torch"}),
    ],
)
def test_a_command_imports_only_its_own_side(name: str, absent: set[str]) -> None:
    _, modules = loaded_by(name, "--help")
    assert COMMANDS[name].module in modules
    assert not modules & absent


# Ctrl-C in the middle of an import: when the module of that name is looked for.
INTERRUPTED = """
import signal, sys

class Finder:
    def find_spec(self, name, *rest):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""
_scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
SCRIPT = "from {} import {} as main; main()".format(*_scripts["ternbus"].split(":"))


@pytest.mark.parametrize("name", ["typer", "ternbus.broker.complaint", "ternbus.aggregator.shell.cli"])
@pytest.mark.parametrize("entry", [SCRIPT, "import runpy; runpy.run_module('ternbus', run_name='__main__')"])
def test_an_interrupt_while_the_command_is_imported_is_no_traceback(name: str, entry: str) -> None:
    code = INTERRUPTED.format(name=name) + entry
    done = ended([sys.executable, "-P", "-c", code, "aggregator", "--help"], ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["numpy", "ternbus.edge.shell.agent"])
def test_an_interrupt_while_a_device_s_process_is_imported_is_no_traceback(name: str) -> None:
    entry = "import runpy; runpy.run_module('ternbus.edge.shell', run_name='__main__')"
    done = ended([sys.executable, "-P", "-c", INTERRUPTED.format(name=name) + entry, "{}"], ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_unknown_command_is_a_usage_error_that_suggests_the_nearest() -> None:
    done = run("agregator")
    assert done.returncode == 2
    assert "Did you mean 'aggregator'?" in done.stderr


def test_a_configuration_error_is_one_line_and_exit_code_2(fake_lab: Path) -> None:
    done = ended(faked("misconfigured"), fake_lab)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ternbus: no aggregator.toml in DIR; run `ternbus aggregator init DIR` first\n"


def test_an_unreachable_broker_is_one_line_and_exit_code_1(fake_lab: Path) -> None:
    done = ended(faked("unreachable"), fake_lab)
    assert (done.returncode, done.stderr) == (1, "ternbus: 127.0.0.1:1 refuses the connection\n")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["storage"], 1, "agg/ledger.sqlite: database or disk is full"),
        (["unanswered"], 1, "the aggregator did not answer"),
        (["corrupt"], 2, "agg/ledger.sqlite: malformed"),
        (
            ["write", "/dev/full"],
            1,
            "cannot write /dev/full: No space left on device; make room or choose another disk",
        ),
        (["write", "none/file"], 2, "cannot use none/file: there is no folder none; make it, or correct the path"),
        (["write", "."], 2, "cannot use .: it is a folder, not a file; give the path of a file"),
    ],
)
def test_a_fault_of_a_disk_is_one_line_that_names_the_file(
    fake_lab: Path, command: list[str], code: int, said: str
) -> None:
    done = ended(faked(*command), fake_lab)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"ternbus: {said}\n")


def test_a_file_that_a_full_disk_takes_a_part_of_is_named(fake_lab: Path) -> None:
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
    done = ended([sys.executable, "-c", limited + WITH_FAKE_LAB, "lab", "keep", "secret"], fake_lab)
    assert (done.returncode, done.stderr) == (1, "ternbus: cannot write secret: File too large\n")
    assert sorted(path.name for path in fake_lab.iterdir() if path.suffix != ".py" and path.is_file()) == []


@pytest.mark.parametrize("name", ["chatty", "modules"])
def test_standard_output_on_a_full_disk_is_one_line_that_names_it(fake_lab: Path, name: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            faked(name), cwd=fake_lab, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("ternbus: No space left on device: standard output")


def test_a_bug_ends_in_a_plain_traceback_without_the_values_of_variables(fake_lab: Path) -> None:
    done = ended(faked("buggy"), fake_lab)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.endswith("ZeroDivisionError\n")
    assert "secret_seed = '4f2c'" not in done.stderr


def test_ctrl_c_exits_130_and_prints_nothing(fake_lab: Path) -> None:
    with subprocess.Popen(
        faked("wait"),
        cwd=fake_lab,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize("name", ["chatty", "modules"])  # more than the pipe holds, and less than the buffer
def test_a_reader_that_has_gone_is_no_traceback(fake_lab: Path, name: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            faked(name),
            cwd=fake_lab,
            env=environment(),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", COMMANDS["edge"].alone)
def test_a_device_s_service_is_started_without_what_its_process_imports(name: str) -> None:
    """The libraries and the core are imported once, by the process that replaces the command."""
    lines, modules = loaded_by("edge", name, "--help")
    assert any(f"Usage: ternbus edge {name} " in line for line in lines)
    assert not modules & {"numpy", "nacl", "paho", "ternbus.edge.core", COMMANDS["edge"].module}


def test_commands_that_are_loaded_alone_are_those_of_their_group() -> None:
    for entry in COMMANDS.values():
        registered = {each.callback for each in import_module(entry.module).app.registered_commands}
        for name, module in entry.alone.items():
            alone = import_module(module).app.registered_commands
            assert [each.callback in registered for each in alone if each.callback.__name__ == name] == [True]


def test_the_process_of_a_device_does_without_the_command_line_s_libraries() -> None:
    """They would take 12 MB of a small device's memory for as long as it runs."""
    code = "import sys, ternbus.edge.shell.process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"typer", "click", "rich", "pydantic", "subprocess"} & set(done.stdout.split())
