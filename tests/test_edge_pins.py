"""`ternbus edge join --private`: what the owner pins is kept with the device, shown, and excludes what breaks it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.private_sums import helper_key
from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_REFUSED
from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.core.actions import Stop
from ternbus.edge.core.state import State
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.shell import agent, cli, key_rotation
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.options import Options
from ternbus.edge.store.outbox import Outbox

ONE, TWO = (helper_key(number).public for number in (1, 2))
INVITATION = Invitation(
    federation="lab",
    device="pi",
    broker="mqtt://127.0.0.1:1",
    aggregator_key=Identity(b"a" * 32).public.hex(),
    code="c" * 32,
)


@pytest.fixture
def join(tmp_path: Path) -> Callable[..., Any]:
    """Run `edge join` where there is no broker: what it is told is written before."""
    invitation = tmp_path / "pi.toml"
    invitation.write_text(INVITATION.dumps())
    invitation.chmod(0o600)

    def run(*options: object) -> Any:
        line = ["join", invitation, tmp_path / "pi", "--timeout", "0", *options]
        return CliRunner().invoke(cli.app, [str(word) for word in line]).exception

    return run


def test_an_invitation_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    invitation = tmp_path / "pi.toml"
    invitation.write_text(INVITATION.dumps())
    invitation.chmod(0o644)
    line = ["join", str(invitation), str(tmp_path / "pi"), "--task", "digits-numpy", "--timeout", "0"]
    assert f"ternbus: warning: other users can read {invitation}" in CliRunner().invoke(cli.app, line).output


def joined(folder: Path, sums: SumPolicy | None) -> DeviceDirectory:
    home = DeviceDirectory(folder)
    settings = home.prepare(INVITATION, task="digits-numpy", data=None, partition="all", hold_out=0.2, sums=sums)
    home.write(replace(settings, code=""))
    return home


def test_join_keeps_what_it_is_told(join: Callable[..., Any], tmp_path: Path) -> None:
    pins = ["--private", "--helper", ONE.hex(), "--helper", TWO.hex(), "--private-min", 7, "--private-roster", "own"]
    join("--task", "digits-numpy", *pins)
    settings = DeviceDirectory(tmp_path / "pi").settings()
    assert settings.sums == SumPolicy(helpers=(ONE, TWO), min=7, roster="own")


def test_the_smallest_sum_is_five_and_the_roster_the_aggregators_unless_told(
    join: Callable[..., Any], tmp_path: Path
) -> None:
    join("--task", "digits-numpy", "--private", "--helper", ONE.hex().upper())
    assert DeviceDirectory(tmp_path / "pi").settings().sums == SumPolicy(helpers=(ONE,), min=5, roster="aggregator")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--private"], "--private needs --helper KEY"),
        (["--helper", "ab" * 32], "add --private"),
        (["--private-min", 5], "add --private"),
        (["--private-roster", "own"], "add --private"),
        (["--private", "--helper", "abc"], "the key of a helper is 'abc', not 64 hex digits"),
        (["--private", "--helper", "ab" * 32, "--helper", "ab" * 32], "different helpers"),
        (["--private", "--helper", "ab" * 32, "--private-min", 1], "--private-min is 1"),
        (["--private", "--helper", "ab" * 32, "--private-roster", "mine"], "--private-roster is 'mine'"),
        (["--private", "--helper", "ab" * 32, "--run", "--hold-out", 0.2, "--report-metrics"], "--report-metrics"),
        (["--private", "--helper", "ab" * 32, "--width", 0.5], "--width does not go with --private"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(
    join: Callable[..., Any], tmp_path: Path, options: list[object], said: str
) -> None:
    error = join("--task", "digits-numpy", *options)
    assert isinstance(error, ConfigError)
    assert said in str(error)
    assert not (tmp_path / "pi" / "outbox.db").exists()


@pytest.mark.parametrize("code", [EXIT_CONFIG, EXIT_REFUSED])
def test_a_join_that_is_refused_leaves_no_parent_folder_that_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A parent that was there stays, and so does one with anything else in it."""
    (tmp_path / "there").mkdir()
    invitation = tmp_path / "pi.toml"
    invitation.write_text(INVITATION.dumps())
    invitation.chmod(0o600)

    def refused(home: DeviceDirectory, *_: object) -> Stop:
        assert home.exists()
        return Stop(code=code, reason="refused")

    monkeypatch.setattr(agent, "join", refused)
    line = ["join", str(invitation), str(tmp_path / "there" / "j" / "k" / "pi"), "--task", "digits-numpy"]
    assert CliRunner().invoke(cli.app, line).exit_code == code
    assert not [*(tmp_path / "there").iterdir()]
    (tmp_path / "there" / "j").mkdir()
    (tmp_path / "there" / "j" / "other").touch()
    assert CliRunner().invoke(cli.app, line).exit_code == code
    assert [each.name for each in (tmp_path / "there" / "j").iterdir()] == ["other"]


def test_a_renewal_takes_no_pins_and_keeps_those_there_are(join: Callable[..., Any], tmp_path: Path) -> None:
    home = joined(tmp_path / "pi", SumPolicy(helpers=(ONE,), min=9, roster="own"))
    error = join("--renew", "--private", "--helper", TWO.hex())
    assert isinstance(error, ConfigError)
    assert "--renew keeps task" in str(error)
    for rejoin in (False, True):
        begun = key_rotation.begin(home, INVITATION, rejoin=rejoin)
        assert begun is not None
        assert begun[1].sums == home.settings().sums == SumPolicy(helpers=(ONE,), min=9, roster="own")
        begun[0].discard()


def test_status_shows_what_is_pinned_and_why_there_is_no_update(tmp_path: Path) -> None:
    home = joined(tmp_path / "pi", SumPolicy(helpers=(ONE, TWO), roster="own"))
    with Outbox(home.folder, KeyId(bytes(8))) as outbox:
        outbox.save(State(key=KeyId(bytes(8)), refusal="the helper is not in the terms"), None, {})
    shown = json.loads(CliRunner().invoke(cli.app, ["status", str(home.folder), "--json"]).output)
    assert shown["helpers"] == [ONE.hex(), TWO.hex()]
    assert (shown["private_min"], shown["private_roster"]) == (5, "own")
    assert shown["refusal"] == "the helper is not in the terms"
    text = CliRunner().invoke(cli.app, ["status", str(home.folder)]).output
    assert f"{ONE.hex()}, {TWO.hex()}" in text
    assert "the helper is not in the terms" in text


def test_status_of_another_device_shows_no_pins(tmp_path: Path) -> None:
    home = joined(tmp_path / "pi", None)
    with Outbox(home.folder, KeyId(bytes(8))) as outbox:
        outbox.save(State(key=KeyId(bytes(8))), None, {})
    shown = json.loads(CliRunner().invoke(cli.app, ["status", str(home.folder), "--json"]).output)
    assert {shown[name] for name in ("helpers", "private_min", "private_roster", "refusal")} == {None}
    assert "private" not in (home.folder / "edge.toml").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"helpers": "ab"}, {"private_min": "five"}, {"private_min": ""}, {"private_min": "1"},
        {"private_roster": "mine"}, {"helpers": ""},
    ],
)  # fmt: skip
def test_a_wrong_pin_in_edge_toml_is_named(tmp_path: Path, wrong: dict[str, str]) -> None:
    home = joined(tmp_path / "pi", SumPolicy(helpers=(ONE,)))
    with pytest.raises(ConfigError, match=r"helper|private_min|--private"):
        replace(home.settings(), **wrong)


def test_a_private_device_publishes_no_evaluations(tmp_path: Path) -> None:
    home = joined(tmp_path / "pi", SumPolicy(helpers=(ONE,)))
    with pytest.raises(ConfigError, match="--report-metrics"):
        agent.check(home.settings(), Options(reports=True))
    with pytest.raises(ConfigError, match="publishes no evaluations"):
        agent.serve(home, "evaluate", Options(timeout_s=0), print)
    agent.check(home.settings(), Options(fine_tune=1.0))


@pytest.mark.parametrize("plan", [[], ["--plan", "codec=private"], ["--plan", "codec=ternary"]])
def test_a_check_of_a_private_device_is_by_a_private_plan(tmp_path: Path, plan: list[str]) -> None:
    home = joined(tmp_path / "pi", SumPolicy(helpers=(ONE,)))
    done = CliRunner().invoke(cli.app, ["check", "--dir", str(home.folder), "--json", *plan])
    found = json.loads(done.stdout)
    if "codec=ternary" in plan:
        assert "its owner requires private sums" in found["problems"][0]
    else:
        assert (found["problems"], found["codec"], done.exit_code) == ([], "private", 0)
        assert found["update_private_bytes"] % 8 == 0
        assert any("terms decide" in note for note in found["notes"])
        text = CliRunner().invoke(cli.app, ["check", "--dir", str(home.folder), *plan]).stdout
        assert "sent as private in 1 part" in text
        assert "as ternary" in text
