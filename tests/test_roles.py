"""Roles: only a member that was invited as an evaluator says what versions are worth, and it sends no updates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.small_world import Bench, Device, receipts, refusals, saved, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.registry import ANY, DEVICE, EVALUATOR
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.store import checksums
from ternbus.aggregator.store import status as statuses
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.invitation import Invitation
from ternbus.lab.report.observation import Observation

Make = Callable[..., Bench]


def measured(bench: Bench, device: Device, version: int, split: str = "test", **values: float) -> bool:
    """Whether the aggregator kept what a device says that a version is worth."""
    actions = bench.receive(device.topic("metrics"), device.metrics(version, split, seq=None, **values))
    return bool(saved(actions, records.MetricsReceived))


def forget_roles(bench: Bench) -> None:
    """Make members and invitations those of a ledger that had no roles, as its migration leaves them."""
    for table in ("devices", "invitations"):
        bench.ledger.db.execute(f"UPDATE {table} SET role = ''")
        checksums.renew(bench.ledger.db, table)


def shown(bench: Bench) -> str:
    done = CliRunner().invoke(app, ["status", str(bench.directory)])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_device_that_trains_publishes_no_test_metrics(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    for _ in range(2):
        assert not measured(bench, pi, 0, accuracy=0.99)
        (line,) = [action.text for action in bench.last if isinstance(action, events.Log)]
        assert line == ("dropped metrics of pi: not-evaluator: pi must be invited with `invite --evaluator` for that")
        assert refusals(bench.tick(1.0)) == {"not-evaluator": 1}
        bench.send(pi, ternary_block(bench.schema, 1), 0)  # nor once it has trained
        bench.restart()
        bench.start()
    assert "0.99" not in shown(bench)
    assert statuses.read(bench.directory)["versions"][0]["evaluations"] == {}
    assert measured(bench, pi, 0, "local", accuracy=0.5)  # of its own data it may speak


def test_an_evaluators_updates_are_refused_and_nobody_waits_for_it(make: Make) -> None:
    bench = make(merge__buffer_size=3)
    bench.tick(5.0)
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
    for session in (1, 2):
        for device in (pi, judge):
            bench.receive(device.topic("status"), device.status("idle", session))
        (receipt,) = bench.send(judge, ternary_block(bench.schema, 1), session - 1)
        assert (receipt.outcome, receipt.reason) == (
            "invalid",
            "evaluator: a member that was invited as an evaluator sends no updates: run `ternbus edge evaluate`",
        )
        (receipt,) = receipts(bench.receive(judge.topic("offer"), judge.offer(session - 1, 3)))
        assert receipt.reason.startswith("evaluator:")
        bench.send(pi, ternary_block(bench.schema, session), session - 1)  # before it has measured anything
        assert bench.version == session
        bench.restart()
        bench.start()
        bench.tick(5.0)
    assert measured(bench, judge, 1, accuracy=0.5)
    found = statuses.read(bench.directory)
    assert found["counts"]["invalid"]["evaluator"] == 4
    assert {name: row["role"] for name, row in found["devices"].items()} == {"pi": DEVICE, "judge": EVALUATOR}


def test_members_from_before_there_were_roles_stay_as_they_are(make: Make) -> None:
    """A judge and a device that does both; and an invitation that was open then."""
    bench = make()
    judge, both = bench.join("judge"), bench.join("both")
    late = Device("late", bench.schema)
    code = bench.invite("late")
    forget_roles(bench)
    bench.restart()
    bench.start()
    assert bench.send(both, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"
    for device in (judge, both):
        assert measured(bench, device, 0, accuracy=0.5)
    assert [bench.core.registry.members[name].evaluates for name in ("judge", "both")] == [True, False]
    bench.receive(late.topic("enroll"), late.enroll(code))
    assert measured(bench, late, 0, accuracy=0.25)
    found = statuses.read(bench.directory)
    assert {row["role"] for row in found["devices"].values()} == {ANY}
    assert " any " in shown(bench)
    # a new key changes no role, unless the operator says so; after a revocation the newcomer is a device
    renewed = bench.join("both")
    assert measured(bench, renewed, 0, accuracy=0.5)
    assert bench.core.registry.members["both"].role == ANY
    assert bench.core.registry.members["judge"].role == ANY
    bench.join("judge", evaluator=True)
    assert bench.core.registry.members["judge"].role == EVALUATOR
    bench.revoke("both")
    assert not measured(bench, bench.join("both"), 0, accuracy=0.5)


def test_an_evaluator_stays_one_under_a_new_key(make: Make) -> None:
    bench = make()
    bench.join("judge", evaluator=True)
    again = bench.join("judge")
    assert measured(bench, again, 0, accuracy=0.5)
    assert bench.core.registry.members["judge"].evaluates
    bench.restart()
    assert bench.core.registry.members["judge"].role == EVALUATOR


def test_several_evaluators_are_shown_apart_each_by_its_name(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi, zoe, ann = bench.join("pi"), bench.join("zoe", evaluator=True), bench.join("ann", evaluator=True)
    assert "accuracy by" not in shown(bench)
    assert measured(bench, zoe, 0, accuracy=0.75, loss=0.5)
    bench.tick(1.0)
    assert measured(bench, ann, 0, accuracy=0.25)
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    assert measured(bench, zoe, 1, accuracy=0.875)
    zero, one = statuses.read(bench.directory)["versions"]
    assert zero["evaluations"] == {"ann": {"accuracy": 0.25}, "zoe": {"accuracy": 0.75, "loss": 0.5}}
    assert zero["metrics"] == {"accuracy": 0.25}  # one of them, always the same
    assert one["evaluations"] == {"zoe": {"accuracy": 0.875}}
    head, *rows = shown(bench).splitlines()[-3:]
    first, second, third = (head.index(name) for name in ("accuracy by ann", "accuracy by zoe", "time"))
    cells = [[row[first:second].strip(), row[second:third].strip()] for row in rows]
    assert cells == [["0.2500", "0.7500"], ["", "0.8750"]]
    moment = Observation.read(statuses.read(bench.directory), {})
    assert moment.versions[0].evaluations == {"ann": {"accuracy": 0.25}, "zoe": {"accuracy": 0.75, "loss": 0.5}}


def test_who_reads_the_ledger_as_it_was_before_roles_sees_one_source(make: Make) -> None:
    """The report takes a status that has only ``metrics``, such as one that was kept."""
    bench = make()
    found = statuses.read(bench.directory)
    found["versions"][0] = {**found["versions"][0], "metrics": {"accuracy": 0.5}}
    del found["versions"][0]["evaluations"]
    (version,) = Observation.read(found, {}).versions
    assert (version.accuracy, version.evaluations) == (0.5, {})


# --- the command


@pytest.fixture
def home(make: Make) -> Path:
    return make(started=False).directory


def invited(home: Path, *arguments: str) -> dict[str, str]:
    """Roles of open invitations by name, after `aggregator invite`."""
    out = home.parent / "invitations"
    done = CliRunner().invoke(app, ["invite", str(home), *arguments, "--out", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    listed: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, ["invitations", str(home), "--json"]).output)
    return {row["device"]: row["role"] for row in listed}


def test_the_command_invites_devices_and_evaluators(home: Path) -> None:
    expected = {"pi-1": DEVICE, "pi-2": DEVICE, "judge": EVALUATOR, "jury": EVALUATOR}
    assert invited(home, "pi-1", "pi-2", "--evaluator", "judge", "--evaluator", "jury") == expected
    done = CliRunner().invoke(app, ["invite", str(home), "--evaluator", "third"])
    assert Invitation.loads(done.output, "the output").device == "third"  # one alone needs no folder
    text = CliRunner().invoke(app, ["invitations", str(home)]).output
    assert [text.count(each) for each in ("a new evaluator", "a new device")] == [3, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nobody to invite: give the name of a DEVICE, --evaluator NAME or --helper NAME"),
        (["a", "--evaluator", "a"], "a cannot be a device and an evaluator: use two names"),
        (["a", "--evaluator", "b"], "several invitations need a folder: add --out FOLDER"),
        (["--evaluator", "A B"], "'A B'"),
    ],
)
def test_what_cannot_be_invited_is_refused_in_words(home: Path, arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["invite", str(home), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert says in str(done.exception)


def test_an_invitation_is_the_last_word_on_a_role(home: Path) -> None:
    assert invited(home, "pi")["pi"] == DEVICE
    assert invited(home, "--evaluator", "pi")["pi"] == EVALUATOR
    assert invited(home, "pi")["pi"] == DEVICE  # nobody has joined under it
