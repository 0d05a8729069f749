"""A folder whose ledger is lost: every command says to restore a backup, and the restore works."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.small_world import LAB, Bench, initial_model, make_directory
from ternbus.aggregator.shell import administration, backup
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.migration import refusal
from ternbus.aggregator.store.schema import FORMAT
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.model_files import save_safetensors

COMMANDS = {
    "run": "run DIR",
    "init": f"init DIR --federation {LAB} --broker mqtt://127.0.0.1:1 --model MODEL",
    "up": "up DIR --model MODEL --port 0",
    "invite": "invite DIR pi --out OUT",
    "status": "status DIR",
    "devices": "devices DIR",
    "pause": "pause DIR",
    "export": "export DIR OUT/m.safetensors",
    "log": "log show DIR",
    "verify": "log verify DIR",
    "backup": "backup DIR OUT",
    "check": "check DIR",
    "repair": "repair DIR",
    "restored": "restored DIR",
    "prune": "prune DIR",
}


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A folder without its ledger, a backup of it beside, and a model."""
    directory = make_directory(tmp_path / "agg")
    Bench(directory).close()
    backup.backup(directory, tmp_path / "out", None, "test")
    for path in directory.glob(f"{LEDGER}*"):
        path.unlink()
    save_safetensors(tmp_path / "model.safetensors", initial_model(), {})
    return directory


@pytest.mark.parametrize("left", [administration.KEY, administration.TOML])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_to_restore_a_backup(lost: Path, command: str, left: str) -> None:
    for name in {administration.KEY, administration.TOML} - {left}:
        (lost / name).unlink()
    places = {"DIR": lost, "MODEL": lost.parent / "model.safetensors", "OUT": lost.parent / "out"}
    words = [re.sub("DIR|MODEL|OUT", lambda found: str(places[found[0]]), word) for word in COMMANDS[command].split()]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, CorruptError), done.output  # exit code 2
    said = f"{lost / LEDGER} is missing: restore a backup: ternbus aggregator restore BACKUP {lost}"
    assert str(done.exception) == said


def test_what_it_says_to_do_works(lost: Path) -> None:
    out = lost.parent / "out"
    (made,) = backup.found_in(out, LAB)
    with pytest.raises(ConfigError, match=f"holds backups; name one of them: {re.escape(str(made))}"):
        check(out)
    assert CliRunner().invoke(app, ["restore", str(made), str(lost)]).exit_code == 0
    assert check(lost).faults == ()


def test_a_ledger_that_is_lost_under_a_running_aggregator_is_named_and_no_empty_one_is_made(tmp_path: Path) -> None:
    bench = Bench(make_directory(tmp_path / "agg"))
    path = tmp_path / "agg" / LEDGER
    with ThreadPoolExecutor(1) as beside:
        ledger = Ledger(path, beside=beside)
        for each in path.parent.glob(f"{LEDGER}*"):
            each.rename(tmp_path / each.name)
        ledger._clear_log(beside)
        beside.submit(int).result()  # that was done
        with pytest.raises(CorruptError, match=r"ledger\.sqlite is missing: restore a backup"):
            ledger._clear_log(beside)
        assert not path.exists()
        ledger.close()
    bench.close()


@pytest.mark.parametrize("command", ["run", "up"])
def test_a_ledger_of_an_earlier_format_is_migrated_by_the_command_that_made_it(command: str, tmp_path: Path) -> None:
    if command == "up":
        (tmp_path / "broker").mkdir()
    assert f"`ternbus aggregator {command} {tmp_path}` migrates it" in str(refusal(tmp_path / LEDGER, FORMAT - 1))
