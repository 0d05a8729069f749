"""A search: what devices claim, how a rung ends, what survives a crash, and what the heads say of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.searches import BUDGET, RATES, WIDTHS, judged, ranked, settings, state_of, update
from support.small_world import LAB, Bench, Device, float32_block, heads, make_directory, scratch
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events
from ternbus.aggregator.core.registry import Member
from ternbus.aggregator.core.search import KEPT, UPDATES_MIN, Search
from ternbus.aggregator.core.search_state import LATENCIES_MIN, SECONDS_KEPT, rank
from ternbus.aggregator.search_settings import FEDEX
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import search_rows, status
from ternbus.broker.protocol.arms import Arms, drawn
from ternbus.broker.protocol.messages import Metrics, Update
from ternbus.broker.protocol.parts import cut

# --- the arithmetic


def test_a_rank_is_the_share_of_the_others_that_are_lower() -> None:
    gains = [0.1, 5.0, 5.0, 1e300, -1e300]
    assert [rank(each, gains) for each in gains] == [-0.25, 0.125, 0.125, 0.5, -0.5]


def test_halving_drops_the_worse_half_until_one_is_left() -> None:
    search = Search.of(settings(), 0)
    ranked(search, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN)
    assert state_of(search).weights == ((0, 1, 1, 0),)
    assert state_of(search).steps[-1].judged == UPDATES_MIN  # all arms need updates: more versions than the budget
    ranked(search, (None, 0.1, 0.2, None), UPDATES_MIN, first=UPDATES_MIN + 1)
    assert state_of(search).weights == ((0, 0, 1, 0),)
    before = state_of(search)
    ranked(search, (None, None, 1.0, None), 5 * UPDATES_MIN, first=100)
    assert state_of(search).steps == before.steps
    assert state_of(search).is_done(0)
    assert state_of(search).status()["best"] == [2]


def test_of_equals_the_first_is_kept_and_an_arm_without_an_update_goes_first() -> None:
    search = Search.of(settings(), 0)
    ranked(search, (0.5, None, 0.5, 0.5), 3 * UPDATES_MIN)
    assert state_of(search).steps[1].weights == ((1, 0, 1, 0),)
    assert state_of(search).steps[1].effects[0][1] is None


def test_a_rung_lasts_for_its_budget() -> None:
    search = Search.of(settings(budget=50), 0)
    ranked(search, (0.1, 0.4, 0.3, 0.2), 49)
    assert len(state_of(search).steps) == 1
    search.made(50, [update("pi", arm, arm) for arm in range(4)])
    assert len(state_of(search).steps) == 2
    assert state_of(search).since == 50
    assert state_of(search).updates == ((0, 0, 0, 0),)


def test_what_no_device_has_measured_ends_no_rung() -> None:
    search = Search.of(settings(), 0)
    for version in range(1, 100):
        search.made(version, [update("pi", arm, None) for arm in range(4)] + [update("old", None)])
        search.made(version, [update("pi", 0, 0.5)])  # nothing to compare it with
    assert len(state_of(search).steps) == 1
    assert state_of(search).ranked_in == 0
    assert state_of(search).status()["best"] == [None]


def test_fedex_makes_better_arms_more_frequent_and_none_impossible() -> None:
    search = Search.of(settings(method=FEDEX), 0)
    ranked(search, (0.1, 0.4, 0.3, 0.2), 40)
    weights = state_of(search).weights[0]
    assert weights[1] > weights[2] > weights[3] >= weights[0] >= 1
    assert abs(sum(state_of(search).odds[0]) - 1) < 1e-3
    assert len(state_of(search).steps) == 1 + 40 // UPDATES_MIN
    assert not state_of(search).is_done(0)
    ranked(search, (0.9, 0.1, 0.1, 0.1), 400, first=100)
    assert max(state_of(search).weights[0]) == state_of(search).weights[0][0]  # another opinion is learned
    assert state_of(search).status()["best"] == [0]


def test_fedex_changes_nothing_where_all_arms_are_alike_and_takes_a_missing_one_for_the_worst() -> None:
    search = Search.of(settings(method=FEDEX), 0)
    ranked(search, (0.1, 0.1, 0.1, 0.1), UPDATES_MIN)
    assert state_of(search).weights == ((250, 250, 250, 250),)
    ranked(search, (None, 0.1, 0.2, 0.3), 2 * UPDATES_MIN, first=50)
    weights = state_of(search).weights[0]
    assert weights[0] == min(weights) == weights[1]


# --- classes and latency


def test_each_class_has_its_own_search() -> None:
    search = Search.of(settings(classes=("pi-",)), 0)
    for version in range(1, UPDATES_MIN + 1):
        low = [update("pi-1", arm, -arm) for arm in range(4)]
        search.made(version, [*low, *(update("cam", arm, arm) for arm in range(4))])
    assert state_of(search).weights == ((1, 1, 0, 0), (0, 0, 1, 1))
    arms = Arms.from_plan(search.plan(UPDATES_MIN))
    assert arms is not None
    assert [prefix for prefix, _ in arms.weights] == ["pi-", ""]


def test_a_class_that_sends_too_little_is_left_as_it_is_and_does_not_hold_up_the_others() -> None:
    search = Search.of(settings(classes=("pi-",)), 0)
    half = UPDATES_MIN // 2
    ranked(search, (0.1, 0.4, 0.3, 0.2), half, device="pi-1")
    ranked(search, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN, first=100, device="cam")
    assert state_of(search).weights == ((1, 1, 1, 1), (0, 1, 1, 0))
    assert state_of(search).updates == ((half,) * 4, (0,) * 4)  # what it has sent counts on
    ranked(search, (None, 0.4, 0.3, None), UPDATES_MIN, first=200, device="cam")
    assert state_of(search).weights == ((1, 1, 1, 1), (0, 1, 0, 0))
    assert state_of(search).status()["best"] == [None, 1]
    ranked(search, (0.1, 0.4, 0.3, 0.2), half, first=300, device="pi-1")
    assert state_of(search).weights == ((0, 1, 1, 0), (0, 1, 0, 0))


def test_an_arm_that_takes_a_class_too_long_is_dropped() -> None:
    search = Search.of(settings(latency_s=5.0), 0)
    seconds = (1.0, 2.0, 6.0, 100.0)
    made = [update("pi", arm, arm, each) for arm, each in enumerate(seconds)]
    for version in range(1, UPDATES_MIN + 1):
        search.made(version, made)
    assert state_of(search).weights == ((0, 1, 0, 0),)
    assert state_of(search).status()["latency_s"] == [list(seconds)]
    liar = [update("pi", 1, None, 1e300)] * (SECONDS_KEPT // 2)
    search.made(100, liar)
    assert state_of(search).latency_s(0, 1) == 2.0  # a few lies do not move the median


def test_where_no_arm_is_fast_enough_the_fastest_is_taken() -> None:
    for method in ("successive-halving", FEDEX):
        search = Search.of(settings(latency_s=0.5, method=method), 0)
        made = [update("pi", arm, arm, 9.0 - arm if arm < 3 else None) for arm in range(4)]
        for version in range(1, UPDATES_MIN + 1):
            search.made(version, made)
        weights = state_of(search).weights[0]
        assert [weight > 0 for weight in weights] == [False, False, False, True]  # nobody knows that it is slow
        assert state_of(search).latency_s(0, 3) is None
        for version in range(50, 50 + LATENCIES_MIN + 4 * BUDGET):
            search.made(version, [update("pi", 3, arm, 20.0) for arm in range(2)])
        assert state_of(search).weights[0][3] > 0


# --- widths


def test_evaluators_judge_widths_by_the_sub_networks() -> None:
    search = Search.of(settings(WIDTHS), 0)
    for version in range(1, 20):
        search.made(version, [update("pi", arm) for arm in range(3)])
        if version == 10:
            assert len(state_of(search).steps) == 1  # nobody has judged any version
        if version >= 10:
            values = {"accuracy": 0.9, "accuracy@0.25": 0.7, "accuracy@0.5": 0.8, "accuracy@1": 0.9}
            search.observe("judge", judged(version, **values))
            search.observe("other", judged(version, accuracy=0.1))  # it measures no sub-networks
            search.observe("pi", replace(judged(version, **values), split="local"))
    assert state_of(search).steps[1].weights == ((0, 1, 1),)
    assert state_of(search).steps[1].effects == ((0.7, 0.8, 0.9),)
    assert state_of(search).steps[1].judged == BUDGET


def test_a_loss_of_sub_networks_is_better_where_it_is_lower_and_old_versions_do_not_judge() -> None:
    search = Search.of(settings(WIDTHS, metric="loss"), 0)
    search.observe("judge", judged(0, **{"loss@0.25": 0.0, "loss@0.5": 1.0, "loss@1": 2.0}))
    for version in range(1, 200):
        search.observe("judge", judged(version, **{"loss@0.25": 2.0, "loss@0.5": 1.0, "loss@1": 3.0}))
    assert len(search.found["judge"]) == KEPT * BUDGET
    for version in range(1, UPDATES_MIN + 1):
        search.made(version, [update("pi", arm) for arm in range(3)])
    assert state_of(search).weights == ((1, 1, 0),)
    assert state_of(search).steps[1].effects == ((-2.0, -1.0, -3.0),)


def test_a_width_that_nobody_has_trained_is_no_faster_than_a_narrower_one() -> None:
    """Else a class would be given a width for the only reason that its devices never came to an end with it."""
    values = {"accuracy": 0.9, "accuracy@0.25": 0.7, "accuracy@0.5": 0.8, "accuracy@1": 0.9}
    found = []
    for seconds in ((1.0, 9.0, None), (1.0, None, 9.0), (None, 1.0, 9.0)):
        search = Search.of(settings(WIDTHS, latency_s=5.0), 0)
        for version in range(1, 4 * UPDATES_MIN):
            made = [update("pi", arm, None, each) for arm, each in enumerate(seconds) if each is not None]
            search.made(version, made)
            search.observe("judge", judged(version, **values))
        found.append(state_of(search).steps[1].weights)
    assert found == [((1, 0, 0),), ((0, 1, 0),), ((0, 1, 0),)]


# --- claims


def test_a_claim_counts_only_if_the_key_and_the_base_choose_this_arm() -> None:
    search = Search.of(settings(), 0)
    member = Member(name="pi", public=bytes(range(32)))
    arm = drawn((1, 1, 1, 1), member.public, 7)
    metrics = {"loss": 0.5, "seconds": 3.0, "gain_loss": 0.1, "gain_accuracy": 0.2}
    true = Update(base=7, samples=1, codec="ternary", encoding="raw", sealed=False, metrics=metrics, arm=arm)
    assert search.claimed(member, true) == {"arm": arm, "seconds": 3.0, "gain": 0.1}
    assert Search.of(settings(metric="accuracy"), 0).claimed(member, true)["gain"] == 0.2
    assert search.claimed(member, replace(true, metrics={"gain_accuracy": 0.2, "gain_f1": 0.3}))["gain"] == 0.2
    assert search.claimed(member, replace(true, metrics={}))["gain"] is None
    for wrong in range(16):
        assert (search.claimed(member, replace(true, arm=wrong)) == {}) == (wrong != arm)
    assert search.claimed(member, replace(true, arm=None)) == {}
    other = next(key for number in range(99) if drawn((1, 1, 1, 1), key := bytes([number] * 32), 7) != arm)
    assert search.claimed(replace(member, public=other), true) == {}
    assert Search().claimed(member, true) == {}
    assert Search.of(settings(), 5).claimed(member, replace(true, base=5)) == {}  # the search begins with version 6


def test_a_base_keeps_the_weights_that_its_head_had() -> None:
    search = Search.of(settings(), 0)
    before = search.plan(0)
    ranked(search, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN)
    assert search.plan(UPDATES_MIN - 1) == before
    assert search.plan(UPDATES_MIN)["arm_weights"] == [["", [0, 1, 1, 0]]]
    assert search.plan(10**6) == search.plan(UPDATES_MIN)


# --- beginnings


def test_other_settings_begin_another_search_with_the_next_version() -> None:
    before = Search.of(settings(), 0)
    ranked(before, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN)
    same = Search.of(settings(), UPDATES_MIN, before.state)
    assert same.state == before.state
    other = Search.of(settings(budget=9), UPDATES_MIN, before.state)
    assert other.plan(UPDATES_MIN) == {}
    assert other.made(UPDATES_MIN + 1, [update("pi", 0, 1.0)]) == other.state
    assert len(other.plan(UPDATES_MIN + 1)["arms"]) == 4
    assert Search.of(None, 3, before.state).plan(3) == {}
    assert Search.of(None, 3, before.state).made(4, []) is None
    assert Search.of(None, 3).leapt(9) is None


def test_a_rung_begins_anew_where_versions_were_skipped() -> None:
    search = Search.of(settings(WIDTHS), 0)
    search.made(1, [update("pi", 0)])
    search.observe("judge", judged(1, **{"accuracy@0.25": 0.5, "accuracy@0.5": 0.5, "accuracy@1": 0.5}))
    left = search.leapt(50)
    assert left is not None
    assert (left.since, left.updates) == (50, ((0, 0, 0),))
    assert not search.found


# --- the whole aggregator

SEARCH = {"search.arms": [dict(arm) for arm in RATES], "search.budget": 2}


def made_with(directory: Path, **changes: object) -> Bench:
    """A bench whose settings have a search; versions of four updates, any number of a device."""
    home = make_directory(directory, merge__buffer_size=4, merge__influence_bound="none", staleness__max=50)
    settings_of(home, **changes)
    bench = Bench(home)
    bench.start()
    return bench


def settings_of(home: Path, **changes: object) -> None:
    table: dict[str, Any] = {"federation": LAB, "broker": "mqtt://127.0.0.1:1"}
    chosen = {"merge.buffer_size": 4, "merge.influence_bound": "none", "staleness.max": 50, **SEARCH, **changes}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    made = configuration.from_table(configuration.with_overrides(table, chosen))
    (home / administration.TOML).write_text(configuration.dumps(made))


def by_arm(bench: Bench, device: Device, arm: int | None, gain: float) -> list[events.Action]:
    """An update of a device on the newest version, with what it says of its arm."""
    about = Update(
        base=bench.version,
        samples=10,
        codec="float32",
        encoding="raw",
        sealed=False,
        metrics={"seconds": 1.5, "gain_accuracy": gain},
        arm=arm,
    )
    frames = cut(
        device.identity,
        federation=LAB,
        sender=device.name,
        kind="update",
        seq=device.next_seq(),
        meta=about.meta(),
        body=float32_block(bench.schema, device.seq).content,
        frame_bytes=10**5,
    )
    return bench.receive(device.topic("update"), *frames)


def arm_of(bench: Bench, device: Device) -> int:
    arms = Arms.from_plan(bench.head.plan)
    assert arms is not None
    found = arms.drawn(device.name, device.identity.public, bench.version)
    assert found is not None
    return found


def version_of(bench: Bench, devices: Sequence[Device], each: Callable[[], None] = lambda: None) -> None:
    """One more version: each device sends an update by its arm, whose gain is the arm's number."""
    base = bench.version
    for device in devices:
        arm = arm_of(bench, device)
        by_arm(bench, device, arm, float(arm))
        each()
    assert bench.version == base + 1


@pytest.fixture
def bench() -> Bench:
    return made_with(scratch() / "aggregator")


def test_the_head_has_the_arms_and_an_update_counts_by_its_true_claim(bench: Bench) -> None:
    assert bench.head.plan["arms"] == SEARCH["search.arms"]
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    version_of(bench, devices)
    assert sum(map(sum, state_of(bench.core.search).updates)) == 4
    wrong = [(arm_of(bench, device) + 1) % 4 for device in devices]
    for device, arm in zip(devices, wrong, strict=True):
        by_arm(bench, device, arm, 100.0)
    assert bench.version == 2  # such an update is merged like any
    assert sum(map(sum, state_of(bench.core.search).updates)) == 4
    for device in devices:
        by_arm(bench, device, None, 0.0)
    assert bench.version == 3
    assert sum(map(sum, state_of(bench.core.search).updates)) == 4


def test_the_search_is_the_same_after_a_crash_at_any_moment(bench: Bench) -> None:
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    undisturbed = made_with(scratch() / "other")
    for device in devices:
        undisturbed.receive(device.topic("enroll"), replace(device, seq=0).enroll(undisturbed.invite(device.name)))

    def again() -> None:
        before = bench.core.search.state, list(bench.core.model.buffer)
        bench.restart()
        bench.start()
        assert (bench.core.search.state, list(bench.core.model.buffer)) == before

    for _ in range(13):
        version_of(bench, devices, again)
    twins = [replace(device, seq=1) for device in devices]
    for _ in range(13):
        version_of(undisturbed, twins)
    assert bench.core.search.state == undisturbed.core.search.state
    assert len(state_of(bench.core.search).steps) == 3
    assert state_of(bench.core.search).weights == ((0, 0, 0, 1),)
    shown = status.read(bench.directory)["search"]
    assert shown == state_of(bench.core.search).status()
    assert shown["best"] == [3]
    assert [step["weights"] for step in shown["steps"]][-1] == [[0, 0, 0, 1]]


def test_a_changed_search_begins_anew_and_one_that_is_gone_leaves_nothing(bench: Bench) -> None:
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    for _ in range(12):
        version_of(bench, devices)
    assert len(state_of(bench.core.search).steps) > 1
    by_arm(bench, devices[0], arm_of(bench, devices[0]), 1.0)
    settings_of(bench.directory, **{"search.budget": 7})
    bench.restart()
    bench.start()
    assert "arms" not in bench.head.plan  # devices may have trained on this version by the others
    for device in devices[1:]:
        by_arm(bench, device, 0, 1.0)
    assert bench.version == 13
    assert "arms" in bench.head.plan
    assert len(state_of(bench.core.search).steps) == 1
    version_of(bench, devices)
    assert sum(map(sum, state_of(bench.core.search).updates)) == 4
    settings_of(bench.directory, **{"search.arms": None, "search.budget": None})
    bench.restart()
    bench.start()
    assert "arms" not in bench.head.plan
    for device in devices:
        by_arm(bench, device, 0, 1.0)
    assert bench.version == 15
    assert search_rows.read(bench.ledger.db) is None
    assert bench.ledger.db.execute("SELECT 1 FROM facts WHERE name GLOB 'arm:*'").fetchone() is None
    assert status.read(bench.directory)["search"] is None


def test_a_rollback_and_a_revoked_device_do_not_confuse_the_search(bench: Bench) -> None:
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    for _ in range(3):
        version_of(bench, devices)
    by_arm(bench, devices[0], arm_of(bench, devices[0]), 1.0)
    bench.revoke("a")
    vector = bench.ledger.vector(2)
    bench.handle(events.RollbackRequested(to=2, vector=vector))
    found = state_of(bench.core.search)
    assert (found.since, sum(map(sum, found.updates))) == (bench.version, 0)
    again = [bench.join("e"), *devices[1:]]
    version_of(bench, again)
    before = bench.core.search.state
    bench.restart()
    bench.start()
    assert bench.core.search.state == before
    assert sum(map(sum, state_of(bench.core.search).updates)) == 4


def test_widths_are_judged_by_what_evaluators_have_sent_before_a_crash() -> None:
    bench = made_with(
        scratch() / "aggregator", **{"search.arms": [dict(arm) for arm in WIDTHS], "search.metric": "accuracy"}
    )
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    judge = bench.join("judge", evaluator=True)
    for _ in range(10):
        version_of(bench, devices)
        values = {"accuracy": 0.9, "accuracy@0.25": 0.7, "accuracy@0.5": 0.95, "accuracy@1": 0.9}
        metrics = Metrics(version=bench.version, samples=10, split="test", values=values)
        bench.receive(judge.topic("metrics"), judge.frame("metrics", metrics.meta()))
        found = {name: dict(rows) for name, rows in bench.core.search.found.items()}
        bench.restart()
        bench.start()
        assert {name: dict(rows) for name, rows in bench.core.search.found.items()} == found
    assert state_of(bench.core.search).steps[1].weights == ((0, 1, 1),)


def test_a_head_is_published_only_with_a_version_that_changes_the_arms(bench: Bench) -> None:
    devices = [bench.join(name) for name in ("a", "b", "c", "d")]
    seen: dict[int, object] = {}
    for _ in range(13):
        base = bench.version
        for device in devices:
            arm = arm_of(bench, device)
            for head in heads(by_arm(bench, device, arm, float(arm))):
                assert seen.setdefault(head.version, head.plan["arm_weights"]) == head.plan["arm_weights"]
        assert bench.version == base + 1
    assert len({str(weights) for weights in seen.values()}) == 3
