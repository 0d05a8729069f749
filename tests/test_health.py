"""The health of an aggregator, by values: what is fine, degraded or down, and what a monitor is told."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ternbus.aggregator.core.findings import Finding, Level, of_devices
from ternbus.aggregator.core.health import Health, State, examine, usual
from ternbus.aggregator.core.health_view import Certificate, DeviceView, View
from ternbus.aggregator.core.situation import Situation, Waiting
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell.examination import canary_of
from ternbus.aggregator.version_settings import CanarySettings

NOW = 1_000_000.0
CONNECTED = Situation(running_s=500.0, connected_s=400.0, lost_s=None)


def device(name: str, **about: Any) -> DeviceView:
    blank: dict[str, Any] = {"state": "training", "seen_at": NOW - 5, "outcome": "accepted", "updates": 3}
    return DeviceView(name=name, **{**blank, **about})


def view(*devices: DeviceView, **about: Any) -> View:
    blank: dict[str, Any] = {"now": NOW, "federation": "home", "state": "open", "version": 57, "running": True}
    blank |= {"situation": CONNECTED, "made_at": NOW - 12, "devices": devices or (device("pi-1"), device("pi-2"))}
    return View(**{**blank, **about})


def kinds(health: Health) -> list[tuple[Level, str, str]]:
    return [(each.level, each.kind, each.subject) for each in health.findings]


def test_a_federation_that_makes_versions_is_fine() -> None:
    health = examine(view(intervals_s=(10.0, 11.0, 12.0, 13.0), disk_free=0.5))
    assert (health.state, health.findings) == (State.FINE, ())
    assert (health.connected, health.connected_since, health.running_since) == (True, NOW - 400, NOW - 500)
    assert (health.age_s, health.usual_s, health.online, health.devices) == (12.0, 12.0, 2, 2)
    assert health.line() == (
        "TERNBUS OK - home: open, version 57, 2 of 2 devices online | "
        "version=57 age=12s buffer=0 devices=2 online=2 disk_free=50.0%"
    )
    assert json.loads(json.dumps(health.as_json()))["state"] == "fine"


def test_too_few_versions_have_no_usual_time() -> None:
    assert usual((1.0, 2.0, 3.0)) is None


def test_whom_the_next_version_waits_for_is_said_with_the_time() -> None:
    waiting = Waiting(devices=("pi-1",), count=1, for_s=30.0)
    health = examine(view(situation=replace(CONNECTED, waiting=waiting), buffer=2))
    assert (health.waits_for, health.waits_for_count, health.waiting_since) == (("pi-1",), 1, NOW - 30)


@pytest.mark.parametrize(
    ("about", "state", "kind"),
    [
        ({"running": False}, State.DOWN, "not-running"),
        ({"answers": False}, State.DOWN, "hung"),
        ({"situation": Situation(running_s=90, connected_s=None, lost_s=60, fault="x")}, State.DOWN, "disconnected"),
        ({"situation": Situation(running_s=9, connected_s=None, lost_s=6)}, State.DEGRADED, "disconnected"),
        ({"situation": replace(CONNECTED, unacknowledged_s=60.0)}, State.DOWN, "broker-silent"),
        ({"situation": replace(CONNECTED, withheld="x/head (why): y")}, State.DEGRADED, "broker-refuses"),
        ({"disk_free": 0.04}, State.DOWN, "disk"),
        ({"disk_free": 0.09}, State.DEGRADED, "disk"),
        ({"broker_disk_full": True}, State.DOWN, "broker-disk"),
        ({"certificates": (Certificate(name="the broker", days_left=-1),)}, State.DOWN, "certificate"),
        ({"certificates": (Certificate(name="the broker", days_left=29),)}, State.DEGRADED, "certificate"),
        ({"claim": ("pi-1", 99)}, State.DEGRADED, "newer-version"),
        ({"waits_for_helpers": {"bureau": "its card"}}, State.DEGRADED, "helpers"),
        ({"dropped": "refused: helper bureau: not-admitted: the update of pi-1"}, State.DEGRADED, "dropped"),
        ({"buffer": 1, "buffer_devices": 1, "min_devices": 2, "max_wait_s": 10.0}, State.DEGRADED, "held"),
        ({"intervals_s": (10.0,) * 4, "made_at": NOW - 601}, State.DEGRADED, "stalled"),
        ({"group": ("judge",), "withdrawn": 2}, State.DEGRADED, "withdrawn"),
        ({"group": ("judge", "pi-9"), "candidate": 58}, State.DEGRADED, "canary-silent"),
        (
            {"group": ("judge", "pi-1"), "candidate": 58, "reports": frozenset({"pi-1"})},
            State.DEGRADED,
            "canary-silent",
        ),
    ],
)
def test_each_fault_has_its_state_and_its_name(about: dict[str, Any], state: State, kind: str) -> None:
    health = examine(view(**about))
    assert (health.state, health.findings[0].kind) == (state, kind)
    word = {State.DEGRADED: "WARNING", State.DOWN: "CRITICAL"}[state]
    assert health.line().startswith(f"TERNBUS {word} - home: {health.findings[0].sentence}")


def test_the_commands_have_the_directories_themselves() -> None:
    due = Certificate(name="the broker", days_left=1)
    texts = [each.sentence for each in examine(view(broker="'my bus'", certificates=(due,))).findings]
    assert [text.partition("run: ")[2] for text in texts] == ["ternbus broker renew 'my bus'"]


@pytest.mark.parametrize(
    "about",
    [
        {"situation": None},
        {"situation": replace(CONNECTED, unacknowledged_s=59.0)},
        {"disk_free": 0.1},
        {"certificates": (Certificate(name="the broker", days_left=30),)},
        {"buffer": 1, "buffer_devices": 1, "min_devices": 2, "max_wait_s": 12.0},
        {"buffer": 2, "buffer_devices": 2, "min_devices": 2},
        {"intervals_s": (10.0,) * 4, "made_at": NOW - 599},
        {"intervals_s": (70.0,) * 4, "made_at": NOW - 699},
        {"intervals_s": (10.0,) * 3, "made_at": NOW - 1e6},
        {"intervals_s": (10.0,) * 4, "made_at": NOW - 1e6, "state": "paused"},
        {"group": ("judge", "pi-1"), "candidate": 58},
        {"group": ("judge",), "candidate": 58, "reports": frozenset({"judge"})},
        {"group": ("judge",)},
    ],
)
def test_what_is_within_its_bounds_is_fine(about: dict[str, Any]) -> None:
    assert examine(view(**about)).state is State.FINE


def test_one_withdrawn_candidate_is_a_note_and_names_what_to_do() -> None:
    health = examine(view(group=("judge",), withdrawn=1))
    assert (health.state, kinds(health)) == (State.FINE, [(Level.NOTE, "withdrawn", "")])
    assert "the last candidate was withdrawn" in health.findings[0].text
    assert "the last 3 candidates were withdrawn" in examine(view(group=("judge",), withdrawn=3)).findings[0].text


def versions(*updates: int | None) -> list[dict[str, Any]]:
    """Rows of a status; None leaves a number out, as a rollback does."""
    return [{"version": number, "updates": count} for number, count in enumerate(updates) if count is not None]


@pytest.mark.parametrize(
    ("rows", "withdrawn"),
    [
        (versions(0), 0),  # version 0 is no merge
        (versions(0, 3, 3), 0),
        (versions(0, 3, 0), 1),
        (versions(0, 0, 0), 2),
        (versions(0, 0, 3, 0, 0), 2),
        (versions(0, 0, None, None, 0), 0),  # made by a rollback
        (versions(0, 0, None, None, 0, 0), 1),
    ],
)
def test_versions_without_a_change_up_to_the_newest_are_withdrawn_candidates(
    rows: list[dict[str, Any]], withdrawn: int
) -> None:
    settings = Settings(federation="home", broker="mqtt://127.0.0.1", canary=CanarySettings(group=("judge",)))
    found = {"candidate": {"version": 9, "reports": {"judge": {"accuracy": 0.5}}}, "versions": rows}
    about = {"group": ("judge",), "candidate": 9, "reports": {"judge"}, "withdrawn": withdrawn}
    assert canary_of(found, settings) == about
    assert canary_of({**found, "candidate": None}, settings) == {**about, "candidate": None, "reports": set()}
    assert canary_of(found, Settings(federation="home", broker="mqtt://127.0.0.1")) == {}


def test_a_closed_federation_needs_no_process() -> None:
    health = examine(view(running=False, state="closed", situation=None))
    assert (health.state, kinds(health)) == (State.FINE, [(Level.NOTE, "stopped", "")])
    assert "closed at version 57" in health.line()
    assert not health.connected
    assert health.waiting_since is None


def test_the_situation_of_a_process_that_has_ended_is_not_shown() -> None:
    health = examine(view(running=False))
    assert (health.connected, health.running_since, health.waits_for) == (False, None, ())


@pytest.mark.parametrize(
    ("about", "level", "kind"),
    [
        ({"failing": "training diverged: a loss of inf"}, Level.DEGRADED, "failing"),
        ({"cloned": True}, Level.DEGRADED, "cloned"),
        ({"outcome": "invalid", "reason": "bad-length: 3", "refused_in_a_row": 3}, Level.DEGRADED, "refused"),
        ({"outcome": "stale", "reason": "base 3 is old", "refused_in_a_row": 3}, Level.DEGRADED, "stale"),
        ({"state": "offline", "seen_at": NOW - 3601}, Level.DEGRADED, "offline"),
        ({"state": "offline", "seen_at": NOW - 3599}, Level.NOTE, "offline"),
        ({"state": "offline", "seen_at": None}, Level.NOTE, "offline"),
        ({"seen_at": NOW - 1801}, Level.NOTE, "silent"),
        ({"evaluates": True, "state": "offline"}, Level.DEGRADED, "evaluator"),
        ({"evaluates": True, "state": "idle", "seen_at": NOW - 601}, Level.DEGRADED, "evaluator"),
    ],
)
def test_each_fault_of_a_device_is_named(about: dict[str, Any], level: Level, kind: str) -> None:
    assert kinds(examine(view(device("pi-1"), device("pi-3", **about)))) == [(level, kind, "pi-3")]


@pytest.mark.parametrize(
    "about",
    [
        {"outcome": "invalid", "reason": "bad-length", "refused_in_a_row": 2},
        {"outcome": "duplicate", "refused_in_a_row": 3},
        {"state": "idle", "seen_at": NOW - 1e5},
        {"seen_at": NOW - 1e5, "waits": True},
        {"seen_at": None},
        {"evaluates": True, "state": "idle", "seen_at": NOW - 599},
    ],
)
def test_a_device_that_only_does_its_work_is_not_named(about: dict[str, Any]) -> None:
    assert kinds(examine(view(device("pi-1"), device("pi-3", **about)))) == []


def test_an_evaluator_that_is_a_few_versions_behind_is_not_named() -> None:
    judge = device("judge", evaluates=True, state="idle", seen_at=NOW - 1e5)
    assert kinds(examine(view(device("pi-1"), judge, evaluated={"judge": 54}))) == []
    (found,) = examine(view(device("pi-1"), judge, evaluated={"judge": 53})).findings
    assert "the last version that it has measured is 53, the newest is 57" in found.text


def test_advice_follows_the_reason_of_a_refusal() -> None:
    for reason, advice in [("closed", "aggregator resume"), ("bad-codec", "edge check")]:
        about = {"outcome": "invalid", "reason": reason, "refused_in_a_row": 3}
        (found,) = examine(view(device("pi-1"), device("pi-3", **about))).findings
        assert advice in found.text


@pytest.mark.parametrize("outcome", ["invalid", "stale"])
def test_an_evaluator_that_trains_is_told_apart_from_a_slow_device(outcome: str) -> None:
    judge = device("judge", evaluates=True, outcome=outcome, refused_in_a_row=3)
    (found,) = examine(view(device("pi-1"), judge)).findings
    assert (found.kind, "edge evaluate" in found.text) == ("refused", True)


def test_all_stale_is_one_finding() -> None:
    slow = [device(f"pi-{each}", outcome="stale", refused_in_a_row=each + 2) for each in range(3)]
    health = examine(view(*slow, device("new", outcome="")))
    assert kinds(health) == [(Level.DEGRADED, "all-stale", "")]
    assert "raise staleness.max" in health.line()


def test_silence_is_judged_by_the_pace_that_the_process_knows() -> None:
    situation = replace(CONNECTED, waiting=Waiting(silent={"pi-2": 40.0}))
    (found,) = examine(view(situation=situation)).findings
    assert (found.level, found.kind, found.subject, found.since) == (Level.DEGRADED, "silent", "pi-2", NOW - 40)


def test_presence_is_not_judged_while_nobody_can_see_it() -> None:
    away = device("pi-1", state="offline", seen_at=NOW - 1e5)
    assert [kind for _, kind, _ in kinds(examine(view(away, running=False)))] == ["not-running"]
    assert kinds(examine(view(away, state="paused"))) == []


def test_nobody_online_is_degraded_and_nobody_joined_is_a_note() -> None:
    away = [device(name, state="offline", seen_at=at) for name, at in (("a", NOW - 9), ("b", None))]
    health = examine(view(*away))
    assert health.state is State.DEGRADED
    assert (health.findings[0].kind, health.findings[0].since) == ("nobody", NOW - 9)
    assert kinds(examine(replace(view(), devices=()))) == [(Level.NOTE, "no-device", "")]


def test_a_loss_far_above_the_others_is_a_divergence() -> None:
    losses = [0.5, 0.4, 0.6, 61.0]
    devices = [device(f"pi-{number}", loss=loss) for number, loss in enumerate(losses)]
    assert kinds(examine(view(*devices))) == [(Level.DEGRADED, "diverging", "pi-3")]
    assert kinds(examine(view(*devices[2:]))) == []
    assert kinds(examine(view(*(replace(each, loss=0.0) for each in devices)))) == []


def test_the_worst_comes_first_and_one_line_has_two() -> None:
    failing = [device(name, failing="a bug\nin it") for name in ("a", "b")]
    health = examine(view(device("pi"), *failing, disk_free=0.01))
    assert [each.level for each in health.findings] == [Level.DOWN, Level.DEGRADED, Level.DEGRADED]
    assert "a fails: a bug in it; and 1 more |" in health.line()
    assert "\n" not in health.line()
    assert health.as_json()["findings"][0]["level"] == "down"
    assert health.as_json()["code"] == 2


@pytest.mark.parametrize("forged", ["all is well | version=9999", "a\r\nb\x1b[2Jc\u2028d\x85e", "||", "\n|\n"])
def test_no_text_of_a_device_or_a_broker_gets_among_the_figures_for_a_monitor(forged: str) -> None:
    lost = Situation(running_s=90, connected_s=None, lost_s=60, fault=forged)
    for health in (examine(view(device("pi-3", failing=forged))), examine(view(situation=lost))):
        figures = f" version=57 age=12s buffer=0 devices={health.devices} online={health.online} disk_free=100.0%"
        assert health.line().partition("|")[2] == figures
        assert health.line().isprintable()


def test_of_many_names_the_first_are_shown() -> None:
    assert of_devices(["a", "b", "c"]) == "a, b, c"
    assert of_devices(["a", "b", "c", "d"]) == "a, b, c and 1 more device"
    assert of_devices(["a", "b", "c", "d", "e"], "helper") == "a, b, c and 2 more helpers"
    assert Finding(kind="x", text="is late", subject="pi").sentence == "pi is late"
