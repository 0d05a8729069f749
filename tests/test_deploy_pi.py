"""The installer of deploy/pi: what it would run and refuses. By hand it was run too; it changes the machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ternbus.command import COMMANDS

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
SCRIPT = DEPLOY / "pi" / "install.sh"


def install(*options: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)


def test_a_dry_run_prints_each_command_and_runs_none(tmp_path: Path) -> None:
    invitation, data = tmp_path / "my pi.toml", Path("/usr")  # a folder that the service can read
    invitation.touch()
    done = install(
        "--invitation", invitation, "--task", "digits", "--data", data, "--torch", "--dry-run", "--", "--width", 0.5
    )
    assert (done.returncode, done.stderr) == (0, "")
    commands = done.stdout.splitlines()
    assert all(command.startswith("+ ") for command in commands)
    (pip,) = (command for command in commands if "/bin/pip install" in command)
    assert pip.endswith(f" {DEPLOY.parent}[torch]")
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in pip
    assert f"-c {DEPLOY.parent}/constraints.txt" in pip
    (join,) = (command.split() for command in commands if " edge join " in command)
    assert join[join.index("--task") :] == ["--task", "digits", "--data", str(data), "--width", "0.5"]
    assert join[join.index("edge") - 1] == "/opt/ternbus/bin/ternbus"
    assert "edge" in COMMANDS
    unit = (DEPLOY / "systemd" / "ternbus-edge.service").read_text()
    assert f"ExecStart=/opt/ternbus/bin/ternbus edge run --stay {join[join.index('join') + 2]}\n" in unit
    assert commands[-1] == "+ systemctl restart ternbus-edge.service"


def test_without_a_service_data_may_be_anywhere_and_gets_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    options = ["--invitation", SCRIPT, "--task", "digits-numpy", "--no-service", "--dry-run", "--data", "data"]
    done = install(*options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (join,) = (line.split() for line in done.stdout.splitlines() if " edge join " in line)
    assert join[join.index("--data") + 1] == str((tmp_path / "data").resolve())


def test_without_a_service_nothing_of_systemd_is_touched(tmp_path: Path) -> None:
    invitation = tmp_path / "pi.toml"
    invitation.touch()
    done = install("--invitation", invitation, "--task", "digits-numpy", "--no-service", "--dry-run")
    assert done.returncode == 0
    assert "systemctl" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no invitation is given: add --invitation FILE"),
        (["--invitation"], "--invitation needs a value"),
        (["--invitation", "missing.toml", "--task", "digits"], "missing.toml cannot be read"),
        (["--invitation", SCRIPT], "no task is given: add --task TASK"),
        (["--invitation", SCRIPT, "--task", "digits", "--data", "/no/where"], "/no/where is not a folder"),
        (["--nonsense"], "unknown option --nonsense: see --help"),
        (["--invitation", SCRIPT, "--task", "digits", "--data", "/tmp"], "the service cannot read /tmp: move it"),
        (
            ["--invitation", SCRIPT, "--task", "/home/pi/task.py:TASK"],
            "the service cannot read /home/pi/task.py:TASK: move it",
        ),
    ],
)
def test_a_mistake_is_said_in_a_line_before_anything_is_done(options: list[object], message: str) -> None:
    done = install(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("install.sh: ")
    assert message in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_passes() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
