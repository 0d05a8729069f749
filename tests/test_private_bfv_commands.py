"""Encrypted sums on the command line, in a simulation and in real processes: only where every side asks for them."""

import io
import json
import stat
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.noise_task import Noise
from support.noise_task import memory as ledger_of
from ternbus.aggregator.shell import administration
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.sums import bfv
from ternbus.command import main
from ternbus.edge.shell.directory import Settings as DeviceSettings
from ternbus.edge.shell.private_options import pinned
from ternbus.helper.shell.directory import HelperDirectory
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.private import Private
from ternbus.lab.scenario.scenario import End, Fault, Scenario, Speeds
from ternbus.lab.virtual.simulate import Simulation

pytest.importorskip("tenseal")

URL = "mqtt://127.0.0.1:1"
SCENARIO = Scenario(
    devices=6,
    speeds=Speeds(sigma=0.5, median_s=10.0),
    private=Private(helpers=1, min=3),
    aggregator={"merge.buffer_size": 4},
    end=End(versions=5),
)


def ternbus(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(map(str, arguments)))
    assert isinstance(done.value.code, int)
    return done.value.code


def helper(folder: Path, *options: str) -> Path:
    assert ternbus("helper", "init", folder, "--federation", "lab", "--broker", URL, *options) == 0
    return folder / "card.toml"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"w": np.ones((20, 20), np.float32)}, {})
    return path


def test_a_helper_keeps_its_key_and_tells_both_sides_of_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bureau"
    card = helper(folder, "--private-kind", "bfv")
    said = capsys.readouterr().out
    assert "ternbus aggregator init AGG … --private --private-kind bfv --helper card.toml" in said
    assert "ternbus edge join … --private --private-kind bfv --helper" in said
    assert tomllib.loads(card.read_text())["kind"] == "bfv"
    assert stat.S_IMODE((folder / "bfv.key").stat().st_mode) == 0o600
    home = HelperDirectory(folder)
    key = home.bfv_key(home.settings())
    assert key is not None
    bfv.check_key(key.public)
    assert ternbus("helper", "status", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "bfv"
    assert ternbus("helper", "init", folder, "--private-kind", "mask") == 2
    (folder / "bfv.key").write_bytes(key.content[:-1])
    with pytest.raises(ConfigError, match="not as it was written"):
        home.bfv_key(home.settings())
    (folder / "bfv.key").unlink()
    with pytest.raises(ConfigError, match=r"bfv.key is missing, .* make another helper"):
        home.bfv_key(home.settings())


def test_a_helper_of_masks_has_no_such_key_and_an_unknown_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helper(tmp_path / "bureau")
    home = HelperDirectory(tmp_path / "bureau")
    assert home.bfv_key(home.settings()) is None
    assert not (tmp_path / "bureau" / "bfv.key").exists()
    assert "kind" not in (tmp_path / "bureau" / "helper.toml").read_text()
    about = ("--federation", "lab", "--broker", URL, "--private-kind", "ckks")
    assert ternbus("helper", "init", tmp_path / "other", *about) == 2
    assert "kind = 'ckks': write one of mask, bfv" in capsys.readouterr().err


def test_an_aggregator_is_made_for_the_kind_that_its_operator_and_its_helper_chose(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks, encrypted = helper(tmp_path / "1"), helper(tmp_path / "2", "--private-kind", "bfv")
    about = ("--federation", "lab", "--broker", URL, "--model", model)
    private = (*about, "--private", "--private-kind", "bfv")
    assert ternbus("aggregator", "init", tmp_path / "agg", *private, "--helper", encrypted) == 0
    settings = administration.load_settings(tmp_path / "agg").private
    assert settings is not None
    assert settings.kind == "bfv"
    for options, said in (
        ((*private, "--helper", masks), "is of a helper of kind mask: give --private-kind mask, or another card"),
        ((*about, "--private", "--helper", encrypted), "is of a helper of kind bfv: give --private-kind bfv"),
        ((*about, "--private-kind", "bfv"), "--private-kind is for private sums: add --private"),
    ):
        assert ternbus("aggregator", "init", tmp_path / "other", *options) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_device_keeps_the_kind_that_its_owner_joined_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = pinned(True, ["ab" * 32], 3, "", 0, kind="bfv")
    assert sums is not None
    kept: dict[str, Any] = {
        "federation": "lab", "device": "pi", "broker": URL, "aggregator_key": "cd" * 32, "task": "digits",
        "helpers": "ab" * 32, "private_min": "3", "private_kind": "bfv",
    }  # fmt: skip
    assert DeviceSettings(**kept).sums == sums
    assert DeviceSettings(**{**kept, "private_kind": ""}).sums == replace(sums, kind="mask")
    with pytest.raises(ConfigError, match="--private-kind and --private-colluding are for private sums: add --private"):
        pinned(False, [], None, "", 0, kind="bfv")
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match=r"pip install 'ternbus\[he\]'"):
        pinned(True, ["ab" * 32], 3, "", 0, kind="bfv")


def test_no_part_of_ternbus_imports_tenseal_before_it_is_needed() -> None:
    parts = "ternbus.edge, ternbus.edge.shell.cli, ternbus.helper.shell.cli, ternbus.aggregator.shell.cli, ternbus.lab"
    program = f"import sys, {parts}; sys.exit('tenseal' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- a simulation


def simulated(wanted: Scenario, folder: Path | None = None) -> Simulation:
    simulation = Simulation(wanted, Noise(), Lines(io.StringIO()), folder)
    simulation.run()
    return simulation


def encrypted(wanted: Scenario) -> Scenario:
    assert wanted.private is not None
    return replace(wanted, private=replace(wanted.private, kind="bfv"))


def test_a_simulated_federation_of_either_kind_has_the_same_versions() -> None:
    masks, sums = simulated(SCENARIO), simulated(encrypted(SCENARIO))
    assert ledger_of(sums).digests == ledger_of(masks).digests
    assert sums.report(1.0)["counts"] == masks.report(1.0)["counts"]
    assert sums.report(1.0)["bytes_up"] == simulated(encrypted(SCENARIO)).report(1.0)["bytes_up"]


def test_after_kills_of_aggregator_helper_and_device_the_versions_are_those_of_masks(tmp_path: Path) -> None:
    kills = ((1, "aggregator"), (2, "helper:0"), (3, "device:1"))
    wanted = replace(SCENARIO, faults=tuple(Fault(kill=who, after_version=at) for at, who in kills))
    masks, sums = simulated(wanted, tmp_path / "masks"), simulated(encrypted(wanted), tmp_path / "sums")
    assert sums.aggregator.core.model.version == 5
    assert sums.aggregator.core.model.digest == masks.aggregator.core.model.digest
    masks.close()
    sums.close()


def test_a_scenario_says_the_kind_and_takes_one_helper_for_it() -> None:
    made = scenario.parse({"private": {"helpers": 1, "min": 3, "kind": "bfv"}})
    assert made.private == Private(helpers=1, min=3, kind="bfv")
    with pytest.raises(ConfigError, match=r'private.kind = "bfv" takes one helper'):
        scenario.parse({"private": {"helpers": 2, "min": 3, "kind": "bfv"}})
    with pytest.raises(ConfigError, match=r"private.kind = 'plain' must be one of mask, bfv"):
        scenario.parse({"private": {"helpers": 1, "min": 3, "kind": "plain"}})


# -- real processes


@pytest.mark.slow
def test_real_processes_make_versions_of_encrypted_sums(tmp_path: Path) -> None:
    (tmp_path / "scenario.toml").write_text(
        'task = "digits-numpy"\ndevices = 3\nend.versions = 1\nspeeds.median_s = 0.1\n'
        '[private]\nhelpers = 1\nmin = 3\nkind = "bfv"\n'
    )
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ternbus", "lab", "run", str(tmp_path / "scenario.toml"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["private"]["sets"] >= 1
    assert report["counts"]["merged"] >= 3
    assert report["counts"]["invalid"].keys() <= {"closed"}  # what devices sent when it ended
    assert 'kind = "bfv"' in (out / "aggregator" / "aggregator.toml").read_text()
