"""`ternbus aggregator status`: the health first, one line and an exit code for monitors, JSON for programs."""

import json
import time
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from support.small_world import Bench, ternary_block
from ternbus.aggregator.shell import administration, cli, health_text, status_command
from ternbus.aggregator.store import control
from ternbus.broker.errors import ConfigError

Make = Callable[..., Bench]
RUN = CliRunner()


def checked(*arguments: object) -> tuple[int, str]:
    done = RUN.invoke(cli.app, ["status", *map(str, arguments), "--check"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.stdout.count("\n") == 1
    return done.exit_code, done.stdout


def test_no_process_is_down_and_the_line_says_how_to_start_it(make: Make) -> None:
    bench = make()
    code, line = checked(bench.directory)
    assert code == 2
    assert line.startswith("TERNBUS CRITICAL - lab: no process serves this directory")
    assert f"ternbus aggregator run {bench.directory}" in line
    (bench.directory / "broker").mkdir()  # as `up` makes it, and `run` does not start it
    assert f"ternbus aggregator up {bench.directory}" in checked(bench.directory)[1]


def test_a_closed_federation_is_fine(make: Make) -> None:
    bench = make()
    bench.close()
    administration.change_state(bench.directory, control.CLOSE, "test")
    assert checked(bench.directory)[0] == 0
    bench.recover()


def test_what_cannot_be_read_is_unknown_and_without_check_a_mistake(make: Make) -> None:
    bench = make()
    code, line = checked(bench.directory / "none")
    assert (code, line.startswith("TERNBUS UNKNOWN - ")) == (3, True)
    (bench.directory / administration.TOML).write_text("nonsense =")
    code, line = checked(bench.directory)
    assert (code, administration.TOML in line) == (3, True)
    assert isinstance(RUN.invoke(cli.app, ["status", str(bench.directory)]).exception, ConfigError)
    code, line = checked(bench.directory / "none|version=9")
    assert (code, "|" in line) == (3, False)


def test_the_status_opens_with_the_health_and_ends_with_0(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    done = RUN.invoke(cli.app, ["status", str(bench.directory)])
    assert done.exit_code == 0
    opening, _, rest = done.stdout.partition("\n\n")
    lines = opening.splitlines()
    assert lines[0].startswith("health: down: no process serves this directory")
    assert lines[1] == "process: not running"
    assert lines[2].startswith("last version: 1, ")
    assert lines[3].startswith("disk: ")
    assert rest.startswith("federation lab: open, version 1, digest ")
    heading = next(line for line in rest.splitlines() if line.startswith("device "))
    assert heading.split("last seq")[1].split() == ["last", "seen", "last", "answer", "refused", "stale"]


def test_json_has_the_health_and_the_last_100_versions(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    for version in range(3):
        bench.send(pi, ternary_block(bench.schema, version), version)
    assert status_command.VERSIONS_MAX == 100
    monkeypatch.setattr(status_command, "VERSIONS_MAX", 2)
    found = json.loads(RUN.invoke(cli.app, ["status", str(bench.directory), "--json"]).stdout)
    assert [row["version"] for row in found["versions"]] == [2, 3]
    assert (found["health"]["state"], found["health"]["code"]) == ("down", 2)
    code, line = checked(bench.directory, "--json")
    assert (code, json.loads(line)["findings"][0]["kind"]) == (2, "not-running")


def test_ages_are_for_people() -> None:
    assert [health_text.age(each) for each in (0, 0.4, 119, 120, 7199, 7200, 172_799, 172_800)] == [
        "0 s", "less than 1 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 days",
    ]  # fmt: skip


def test_a_clock_that_went_back_gives_no_negative_ages(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(merge__buffer_size=1)
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    monkeypatch.setattr(time, "time", lambda: bench.now - 900.0)
    said = RUN.invoke(cli.app, ["status", str(bench.directory)]).stdout
    assert "last version: 1, 15 min ahead of this machine's clock (" in said
