"""When a buffer is merged: the rule as a formula, over all small buffers and fleets, against a plain second one."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.small_world import accepted_update
from ternbus.aggregator.core.merge_trigger import RETAINED_S, MergeTrigger
from ternbus.aggregator.core.pace import Pace
from ternbus.aggregator.core.registry import Member
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.settings import MergeSettings

TRIGGER = MergeTrigger(settings=MergeSettings(buffer_size=3, max_wait_s=30.0), min_interval_s=10.0)
SECONDS = st.one_of(st.integers(0, 60).map(float), st.floats(0, 60))
NAMES = st.lists(st.sampled_from("abcd"), max_size=4)


def buffer(names: str | list[str]) -> list[AcceptedUpdate]:
    return [accepted_update(name) for name in names]


def online(
    names: str | list[str], evaluators: str | list[str] = "", heard: Mapping[str, float] | None = None
) -> dict[str, Member]:
    """Devices online; those in ``heard`` send an update every 2 s, so that 10 s of silence say something."""
    fleet = {name: Member(name=name, public=bytes(32), evaluates=name in evaluators) for name in names}
    for name in fleet.keys() & (heard or {}).keys():
        fleet[name].pace.recall([0.0, 2.0, 4.0])
        fleet[name].pace.heard((heard or {})[name])
    return fleet


@given(
    names=NAMES,
    present=st.sets(st.sampled_from("abcd")),
    evaluators=st.sets(st.sampled_from("abcd")),
    first=SECONDS,
    merged=st.none() | SECONDS,
    connected=st.none() | SECONDS,
    lost=st.booleans(),
    heard=st.dictionaries(st.sampled_from("abcd"), SECONDS),
    now=SECONDS,
    least=st.integers(1, 4),
)
@example(
    names=["a"],
    present={"a"},
    evaluators=set(),
    first=0.0,
    merged=None,
    connected=None,
    lost=False,
    heard={},
    now=30.0,
    least=1,
)
@example(
    names=["a"],
    present={"a"},
    evaluators=set(),
    first=0.0,
    merged=None,
    connected=None,
    lost=False,
    heard={},
    now=30.0,
    least=2,
)
def test_the_rule_is_its_formula(
    *,
    names: list[str],
    present: set[str],
    evaluators: set[str],
    first: float,
    merged: float | None,
    connected: float | None,
    lost: bool,
    heard: dict[str, float],
    now: float,
    least: int,
) -> None:
    """Due: the longest wait is over; or the shortest interval is over and the buffer is full or nobody is missing.

    Nobody is missing who has been silent for too long on this connection. All of it takes updates of enough devices.
    """
    trigger = replace(TRIGGER, min_devices=least)
    trigger = trigger if merged is None else trigger.merged(merged)
    trigger = (trigger if connected is None else trigger.connected(connected)).first_accepted(first)
    trigger = trigger.disconnected() if lost else trigger
    waited = now >= first + 30
    may = merged is None or now >= merged + 10
    known = connected is None or now >= connected + 5
    silent = {
        name for name, at in heard.items() if connected is not None and not lost and now >= max(at, connected) + 10
    }
    missing = {name for name in present - evaluators - silent if name not in names}
    complete = known and not missing and any(name in present for name in names)
    enough = len(set(names)) >= least
    expected = enough and (waited or (may and (len(names) >= 3 or complete)))
    fleet = online(sorted(present), sorted(evaluators), heard)
    assert trigger.is_due(buffer(names), fleet, now) is expected
    assert trigger.may_merge(buffer(names)) is enough
    assert trigger.held(buffer(names), now) is (bool(names) and not enough and waited)
    # nothing but an event changes that before ``due_s``, and an event that changes nothing does not either
    due_s = trigger.due_s(buffer(names), fleet, now)
    if due_s is None:
        assert not names or (waited and not enough)
    elif not expected:
        assert due_s > now
        assert not trigger.is_due(buffer(names), fleet, math.nextafter(due_s, -math.inf))


def test_a_buffer_is_due_when_its_first_update_has_waited_longest() -> None:
    trigger = TRIGGER.first_accepted(100.0)
    assert [trigger.is_due(buffer("a"), {}, now) for now in (100.0, 129.9, 130.0, 200.0)] == [False, False, True, True]
    assert trigger.due_s(buffer("a"), {}, 100.0) == 130.0


def test_a_full_buffer_is_due_at_once() -> None:
    trigger = TRIGGER.first_accepted(100.0)
    assert not trigger.is_due(buffer("ab"), {}, 100.0)
    assert trigger.is_due(buffer("aba"), {}, 100.0)


def test_a_buffer_that_nobody_online_is_missing_from_is_due_at_once() -> None:
    trigger = TRIGGER.first_accepted(100.0)
    assert trigger.is_due(buffer("a"), online("a"), 100.0)
    assert not trigger.is_due(buffer("a"), online("ab"), 100.0)
    assert trigger.is_due(buffer("ab"), online("ab"), 100.0)


def test_evaluators_are_not_waited_for() -> None:
    trigger = TRIGGER.first_accepted(100.0)
    assert trigger.is_due(buffer("a"), online("ab", evaluators="b"), 100.0)


def test_where_no_contributor_is_known_to_be_online_nobody_is_known_to_be_missing() -> None:
    trigger = TRIGGER.first_accepted(100.0)
    assert not trigger.is_due(buffer("a"), {}, 100.0)
    assert not trigger.is_due(buffer("a"), online("b", evaluators="b"), 100.0)


def test_after_a_connect_nobody_counts_as_missing_or_there_before_all_statuses_have_come() -> None:
    trigger = TRIGGER.first_accepted(100.0).connected(101.0)
    assert trigger.due_s(buffer("a"), {}, 101.0) == 101.0 + RETAINED_S
    assert not trigger.is_due(buffer("a"), online("a"), 105.9)
    assert trigger.is_due(buffer("a"), online("a"), 106.0)
    assert trigger.is_due(buffer("abc"), online("abc"), 101.0)  # a full buffer needs to know of nobody


def test_versions_keep_their_distance_but_not_beyond_the_longest_wait() -> None:
    trigger = TRIGGER.merged(100.0).first_accepted(100.0)
    assert trigger.due_s(buffer("abc"), {}, 100.0) == 110.0
    assert not trigger.is_due(buffer("abc"), {}, 109.9)
    assert trigger.is_due(buffer("abc"), {}, 110.0)
    slow = replace(TRIGGER, min_interval_s=1000.0).merged(100.0).first_accepted(100.0)
    assert slow.due_s(buffer("abc"), {}, 100.0) == 130.0
    assert slow.is_due(buffer("abc"), {}, 130.0)


@pytest.mark.parametrize("now", [0.0, 130.0, 1e9])
def test_an_empty_buffer_is_never_due(now: float) -> None:
    trigger = TRIGGER.first_accepted(100.0).connected(100.0)
    assert not trigger.is_due([], online("a"), now)
    assert trigger.due_s([], {}, now) is None


def test_a_merge_ends_the_wait() -> None:
    trigger = TRIGGER.first_accepted(100.0).merged(120.0)
    assert trigger.merge_by == math.inf
    assert trigger.first_accepted(121.0).due_s(buffer("a"), {}, 140.0) == 151.0


def test_a_device_that_falls_silent_is_waited_for_as_long_as_it_is_slow_and_again_when_it_is_heard() -> None:
    trigger = TRIGGER.connected(90.0).first_accepted(100.0)
    fleet = online("ab", heard={"b": 96.0})
    assert trigger.due_s(buffer("a"), fleet, 100.0) == 106.0
    assert [trigger.is_due(buffer("a"), fleet, now) for now in (105.9, 106.0)] == [False, True]
    fleet["b"].pace.heard(107.0)
    assert trigger.due_s(buffer("a"), fleet, 107.0) == 117.0
    assert not trigger.is_due(buffer("a"), fleet, 107.0)


def test_one_silent_device_after_the_other_is_given_up() -> None:
    trigger = TRIGGER.connected(90.0).first_accepted(100.0)
    fleet = online("abc", heard={"b": 91.0, "c": 95.0})
    assert [trigger.due_s(buffer("a"), fleet, now) for now in (100.0, 101.0)] == [101.0, 105.0]
    assert [trigger.is_due(buffer("a"), fleet, now) for now in (101.0, 105.0)] == [False, True]


def test_a_silence_in_which_nothing_could_be_heard_says_nothing() -> None:
    trigger, fleet = TRIGGER.first_accepted(100.0), online("ab", heard={"b": 50.0})
    assert not trigger.is_due(buffer("a"), fleet, 120.0)  # never connected
    assert not trigger.connected(60.0).disconnected().is_due(buffer("a"), fleet, 120.0)
    assert not trigger.connected(112.0).is_due(buffer("a"), fleet, 121.9)
    assert trigger.connected(112.0).is_due(buffer("a"), fleet, 122.0)


def test_the_usual_time_is_known_from_the_third_update_on_and_no_pause_changes_it() -> None:
    pace = Pace()
    for now in (0.0, 60.0):
        pace.updated(now)
        assert pace.patience_s == math.inf
    pace.updated(120.0)
    assert pace.patience_s == 300.0
    pace.updated(100_000.0)
    assert pace.patience_s == 300.0
    for now in (100_600.0, 101_200.0, 101_800.0):
        pace.updated(now)
    assert pace.patience_s == 3000.0  # of the last five


def test_a_device_that_is_fast_is_given_the_time_that_a_busy_machine_may_take() -> None:
    pace = Pace()
    pace.recall([10.0, 10.1, 10.2, 4.0])  # the clock was set
    assert pace.patience_s == 5.0
    pace.updated(1.0)  # of another clock
    assert pace.patience_s == 5.0
