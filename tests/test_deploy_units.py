"""The systemd units of deploy/: valid to systemd, and in agreement with the command that they start."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from ternbus.broker.exit_codes import EXIT_BUDGET, EXIT_CONFIG, EXIT_REFUSED
from ternbus.command import COMMANDS

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "systemd"
ACTIONS = {
    "aggregator": ["run"],
    "broker": ["up"],
    "edge": ["run", "--stay"],
    "evaluator": ["evaluate", "--stay"],
    "helper": ["run"],
}
UNITS = [FOLDER / f"ternbus-{name}.service" for name in ACTIONS]
BACKUP = [FOLDER / f"ternbus-backup.{kind}" for kind in ("service", "timer")]
METRICS = [FOLDER / f"ternbus-metrics.{kind}" for kind in ("service", "timer")]


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys are case-sensitive, as systemd reads them
    parser.read(unit)
    return parser["Service"]


def test_there_is_a_unit_for_each_role_and_one_for_backups_and_one_for_metrics() -> None:
    assert set(FOLDER.iterdir()) == {*UNITS, *BACKUP, *METRICS}


def test_the_backup_s_timer_starts_a_backup_that_may_write_where_it_writes() -> None:
    settings = service(BACKUP[0])
    _, *command, keep, number = settings["ExecStart"].split()
    assert command == ["aggregator", "backup", "/var/lib/ternbus/aggregator", "/var/backups/ternbus"]
    assert settings["ReadWritePaths"].split() == command[2:]
    assert (keep, int(number) > 1, settings["Type"]) == ("--keep", True, "oneshot")


def test_the_aggregator_may_write_what_its_dashboard_writes_and_ends_before_the_broker() -> None:
    aggregator, broker = UNITS[0], UNITS[1]
    bus = f"/var/lib/{service(broker)['StateDirectory']}"  # an invitation leaves a certificate there
    backups = service(BACKUP[0])["ReadWritePaths"].split()[1]  # a revocation a list
    assert service(aggregator)["ReadWritePaths"].split() == [f"-{backups}", f"-{bus}"]  # "-": if it is there
    assert broker.name in aggregator.read_text().split("\nAfter=", 1)[1].partition("\n")[0].split()


def test_metrics_are_written_where_the_unit_may_write_and_others_may_read() -> None:
    settings = service(METRICS[0])
    _, *command, directory, option, file = settings["ExecStart"].split()
    assert (command, option) == (["aggregator", "metrics"], "--textfile")
    assert settings["ReadWritePaths"].split() == [directory, str(Path(file).parent)]
    assert (Path(file).suffix, settings["UMask"]) == (".prom", "0022")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_it_starts_a_command_that_exists_in_the_folder_that_systemd_makes(unit: Path) -> None:
    settings = service(unit)
    program, command, *words, folder = settings["ExecStart"].split()
    assert program == "/opt/ternbus/bin/ternbus"
    assert command in COMMANDS
    assert words == ACTIONS[unit.stem.removeprefix("ternbus-")]
    assert folder == f"/var/lib/{settings['StateDirectory']}"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_crash_is_restarted_and_a_configuration_error_is_not(unit: Path) -> None:
    settings = service(unit)
    assert settings["Restart"] == "on-failure"
    codes = [EXIT_CONFIG, EXIT_REFUSED, EXIT_BUDGET]
    assert settings["RestartPreventExitStatus"].split() == [str(code) for code in codes]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", [*UNITS, BACKUP[0], METRICS[0]], ids=lambda unit: unit.stem)
def test_systemd_accepts_it(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name  # with a program that exists on this machine, or systemd complains of that
    copy.write_text(unit.read_text().replace("/opt/ternbus/bin/ternbus", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])
