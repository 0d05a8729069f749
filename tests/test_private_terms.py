"""Terms of private sums: when they begin, and that a version has one context for good, also after a crash anywhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.private_world import HelperSide, PrivateBench, make_private
from support.small_world import LAB, Bench, initial_model, make_directory, place, published, reconfigure, saved
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell import administration, repairing
from ternbus.aggregator.store import private_rows
from ternbus.aggregator.sums import scales
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import digest_of

HEAD = topics.head(LAB)
TERMS = topics.terms(LAB, 0)


@pytest.fixture
def helper() -> HelperSide:
    return HelperSide("h-1")


@pytest.fixture
def bench(tmp_path: Path, helper: HelperSide) -> PrivateBench:
    made = PrivateBench(make_private(tmp_path / "agg", [helper]))
    made.start()
    return made


def one_hot(*buckets: int, devices: int = 3) -> Any:
    return devices * np.eye(7, dtype=np.int64)[np.array(buckets) + 3]


def test_devices_wait_for_terms_until_every_helper_has_sent_its_card(tmp_path: Path) -> None:
    one, two = HelperSide("h-1"), HelperSide("h-2")
    bench = PrivateBench(make_private(tmp_path / "agg", [one, two]))
    said = [action.text for action in bench.start() if isinstance(action, events.Log)]
    assert said == ["private updates wait for helpers: h-1: it has not enrolled; h-2: it has not enrolled"]
    assert bench.head.plan == {"codec": "private"}
    bench.ready(one)
    bench.enroll_helper(two)
    assert bench.head.plan == {"codec": "private"}
    assert TERMS not in bench.retained
    bench.say(two, two.card())
    assert [action.text for action in bench.last if isinstance(action, events.Log)] == [
        "all helpers are ready: devices may send private updates"
    ]
    assert bench.version == 0
    terms = bench.check_published()
    assert [signed.card.helper for signed in terms.helpers] == ["h-1", "h-2"]
    assert terms.fits(bench.schema)
    assert bench.head.plan["schema"] == bench.head.schema == bench.schema.digest


def test_terms_are_durable_and_retained_before_the_head_that_names_them(
    bench: PrivateBench, helper: HelperSide
) -> None:
    bench.ready(helper)
    actions = bench.last
    order = [
        place(actions, records.CardReceived),
        place(actions, records.TermsMade),
        place(actions, records.ContextBegun),
        place(actions, records.FramesRetained),
        place(actions, events.Publish, TERMS),
        place(actions, events.Publish, HEAD),
    ]
    assert order == sorted(order)
    (retained,) = saved(actions, records.FramesRetained)
    assert [topic for topic, _ in retained.frames] == [TERMS, HEAD]


def test_the_first_scales_are_the_learning_rate_times_the_rms_of_each_tensor(tmp_path: Path) -> None:
    helper = HelperSide("h-1")
    bench = PrivateBench(make_private(tmp_path / "agg", [helper], plan__learning_rate=0.5))
    bench.start()
    bench.ready(helper)
    terms, model = bench.check_published(), initial_model()
    rms = {name: float(np.sqrt(np.mean(array.astype(np.float64) ** 2))) for name, array in model.items()}
    want = {"w": np.float32(0.5 * rms["w"]), "b": np.float32(8 * 0.5 * rms["b"])}  # a dense one has 8 references
    names = [tensor.name for tensor in bench.schema.tensors]
    assert dict(zip(names, terms.scales, strict=True)) == pytest.approx({name: float(want[name]) for name in names})
    assert (terms.samples, terms.bits, terms.levels, terms.min, terms.dp) == (0.0, 6, 1, 2, "none")


def test_a_tensor_of_zeros_begins_with_the_rms_of_the_model_and_a_model_of_zeros_with_the_learning_rate() -> None:
    model = {"w": np.full((30, 20), 2.0, np.float32), "zero": np.zeros((20, 20), np.float32)}
    schema = Schema.of({name: array.shape for name, array in model.items()})
    found = scales.first(schema, to_vector(schema, model), 0.1)
    assert found == pytest.approx((0.2, 0.1 * 2 * 0.6**0.5))
    assert scales.first(schema, np.zeros(schema.elements, np.float32), 0.1) == pytest.approx((0.1, 0.1))
    assert min(scales.first(schema, np.zeros(schema.elements, np.float32), 0.0)) > 0


@pytest.mark.parametrize(
    ("buckets", "octaves"),
    [
        ([0, 0, 0, 5, 0, 0, 0], 0),
        ([0, 0, 0, 0, 0, 0, 4], 3),
        ([4, 0, 0, 0, 0, 0, 0], -3),
        ([0, 0, 0, 2, 3, 0, 0], 1),
        ([0, 3, 0, 2, 0, 0, 0], -2),
        ([0, 0, 0, 2, 2, 0, 0], 0),  # of two medians the one that changes nothing
        ([0, 0, 2, 2, 0, 0, 0], 0),
        ([0, 0, 0, 0, 2, 0, 2], 1),  # or the nearer one
        ([2, 0, 2, 0, 0, 0, 0], -1),
        ([2, 0, 0, 0, 0, 0, 2], 0),
        ([0, 0, 0, 0, 0, 0, 0], 0),
    ],
)
def test_a_scale_moves_by_the_median_bucket(buckets: list[int], octaves: int) -> None:
    assert scales.moved((0.75, 0.5), np.array([buckets, [0, 0, 0, 1, 0, 0, 0]])) == (0.75 * 2.0**octaves, 0.5)


@pytest.mark.parametrize(
    ("bucket", "older", "octaves"),
    [
        (0, 1.0, 0),  # the same terms
        (2, 1.0, 2),
        (2, 0.25, 0),  # two octaves below the scale of now, and two above these
        (-1, 4.0, 1),
        (3, 0.25, 1),
        (3, 2.0**-5, 0),  # at least three octaves above: perhaps at the scale of now
        (-3, 2.0**5, 0),
        (1, 2.0**-30, -29),
    ],
)
def test_what_a_set_says_of_scales_is_relative_to_its_own_terms(bucket: int, older: float, octaves: int) -> None:
    counts = scales.aligned(one_hot(bucket, 0), (older * 0.75, 0.5), (0.75, 0.5))
    assert counts.sum() == 6
    assert scales.moved((0.75, 0.5), counts) == (0.75 * 2.0**octaves, 0.5)


def test_a_scale_never_becomes_zero_nor_more_than_terms_may_have() -> None:
    found: tuple[float, ...] = (0.5, 0.5)
    for _ in range(60):
        found = scales.moved(found, one_hot(-3, 3))
    assert found == (2.0**-40, 2.0**40)
    assert scales.moved(found, one_hot(3, -3)) == (2.0**-37, 2.0**37)


def test_new_terms_begin_with_a_new_version_and_with_no_other(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    before, first = bench.check_published(), bench.context
    bench.sums.moved(one_hot(1, 0))
    actions = bench.tick()
    assert bench.version == 1
    after = bench.check_published()
    assert after.scales == (2 * before.scales[0], before.scales[1])
    assert bench.sums.contexts[0] == first
    (made,) = saved(actions, records.VersionMade)
    assert (made.updates, made.digest) == (0, bench.sums.contexts[0].model)
    bench.sums.moved(one_hot(0, 0))  # nothing must change, so nothing does
    bench.tick(100)
    assert bench.version == 1


def test_a_version_whose_terms_stay_publishes_only_its_head(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    begun = bench.context
    assert begun is not None
    actions = bench.perform(bench.core._versions.empty())
    assert TERMS not in [action.topic for action in published(actions)]
    assert saved(actions, records.ContextBegun)[0].terms == begun.terms_digest
    bench.check_published()


def test_a_helper_s_new_box_key_ends_the_version_but_not_at_any_rate(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.card(2))
    assert (bench.version, bench.check_published().helpers[0].card.number) == (1, 2)
    bench.say(helper, helper.card(3))
    bench.say(helper, helper.card(4))
    assert (bench.version, bench.check_published().helpers[0].card.number) == (1, 2)
    due = bench.core.deadline
    assert due is not None
    assert bench.now < due <= bench.now + 10
    bench.tick(due - bench.now)
    assert (bench.version, bench.check_published().helpers[0].card.number) == (2, 4)


def test_a_minimum_that_no_merge_reaches_takes_the_terms_away(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.say(helper, helper.card(2, min=5))
    assert (bench.version, "terms" in bench.head.plan) == (1, False)
    assert bench.sums.waits_for() == {"h-1": "it opens sums of at least 5 devices, and merge.buffer_size is 4"}
    bench.say(helper, helper.card(3, min=3))
    bench.tick()
    assert bench.version == 1  # it had no context yet
    assert bench.check_published().min == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": {"codec": "private", "learning_rate": 0.3}},
        {"private": {"bits": 8}},
        {"private": {"min": 3}},
        {"private": {"levels": 2}},
        {"private": {"samples": 40.0}},
        {"plan": {"codec": "private", "learning_rate": 0.3}, "downlink": {"slots": 4}},
    ],
)
def test_other_settings_begin_another_version(
    bench: PrivateBench, helper: HelperSide, changes: dict[str, dict[str, object]]
) -> None:
    bench.ready(helper)
    before = bench.context
    reconfigure(bench, **changes)
    bench.restart()
    seen = len(bench.published)
    bench.start()
    assert bench.version == 1
    bench.check_published()
    assert bench.sums.contexts[0] == before
    for action in bench.published[seen:]:  # no head ever named a plan or terms that are not its version's
        if action.topic == HEAD:
            head = parse(action.payload)
            assert bench.sums.contexts[head.meta["version"]].plan == private_plan(head.meta_bytes)
    bench.restart()
    bench.start()
    assert bench.version == 1


def private_plan(meta_bytes: bytes) -> bytes:
    return digest_of(plan_bytes(meta_bytes))


def test_a_helper_taken_out_of_the_settings_is_in_no_terms_of_later_versions(tmp_path: Path) -> None:
    one, two = HelperSide("h-1"), HelperSide("h-2")
    bench = PrivateBench(make_private(tmp_path / "agg", [one, two]))
    bench.start()
    bench.ready(one, two)
    reconfigure(bench, private={"helpers": {"h-1": one.identity.public.hex()}})
    bench.restart()
    bench.start()
    assert bench.version == 1
    assert [signed.card.helper for signed in bench.check_published().helpers] == ["h-1"]


def test_a_helper_added_to_the_settings_is_waited_for(tmp_path: Path) -> None:
    one, two = HelperSide("h-1"), HelperSide("h-2")
    bench = PrivateBench(make_private(tmp_path / "agg", [one]))
    bench.start()
    bench.ready(one)
    keys = {each.name: each.identity.public.hex() for each in (one, two)}
    reconfigure(bench, private={"helpers": keys})
    bench.restart()
    bench.start()
    assert (bench.version, "terms" in bench.head.plan) == (1, False)
    bench.ready(two)
    assert (bench.version, len(bench.check_published().helpers)) == (1, 2)


def test_a_closed_federation_begins_no_version_for_new_terms(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.handle(events.StateRequested(state="closed"))
    bench.say(helper, helper.card(2))
    bench.tick(100)
    assert bench.version == 0
    bench.handle(events.StateRequested(state="open"))
    assert bench.version == 1
    assert bench.check_published().helpers[0].card.number == 2


def test_a_stop_begins_no_version(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.sums.moved(one_hot(1, 0))
    bench.handle(events.StopRequested())
    assert bench.version == 0


def test_contexts_of_stale_bases_are_forgotten_and_held_ones_are_kept(tmp_path: Path) -> None:
    helper = HelperSide("h-1")
    bench = PrivateBench(make_private(tmp_path / "agg", [helper], staleness__max=2))
    bench.start()
    bench.ready(helper)
    bench.core._versions.private.held = lambda: {1}  # type: ignore[union-attr]
    row = (1, "pi", bytes(8), 1, 1, bytes(32), 0, 1, 1.0, "private", "raw", 0, 0, 0, 0.0)
    columns = "id, device, key, seq, base, digest, staleness, samples, discount, codec, encoding, place, size"
    columns += ", checksum, received_at"
    for number in range(6):
        if number == 1:
            bench.ledger.db.execute(f"INSERT INTO updates ({columns}) VALUES ({', '.join('?' * 15)})", row)
        bench.sums.moved(one_hot(1, 0))
        bench.tick(20)
    assert set(bench.sums.contexts) == {1, 4, 5, 6}
    kept = {base for (base,) in bench.ledger.db.execute("SELECT base FROM contexts")}
    assert kept == {1, 4, 5, 6}  # an update on 1 waits
    assert bench.ledger.db.execute("SELECT count(*) FROM terms").fetchone() == (4,)


def test_terms_in_parts_are_retained_again_when_the_broker_s_limit_shrinks(tmp_path: Path) -> None:
    helper = HelperSide("h-1")
    bench = PrivateBench(make_private(tmp_path / "agg", [helper]))
    bench.start()
    bench.ready(helper)
    content = bench.check_published().content()
    bench.connect(frame_bytes=1700)
    assert all(len(payload) <= 1700 for topic, payload in bench.retained.items() if "/terms/" in topic)
    assert bench.check_published().content() == content
    assert bench.version == 0


def test_terms_in_fewer_parts_leave_none_of_the_old_ones(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.perform(bench.core._versions._retain([(topics.terms(LAB, part), b"old") for part in range(3)]))
    bench.sums.moved(one_hot(1, 0))
    bench.tick()
    bench.check_published()
    assert [topic for topic in bench.retained if "/terms/" in topic] == [TERMS]


def test_a_broker_that_lost_all_is_given_terms_too(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.retained.clear()
    bench.connect()
    bench.tick(10)
    bench.check_published()


def test_terms_that_the_broker_drops_are_published_again(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.connect()  # the broker holds the head: it is asked for the snapshot and the terms
    asked = [each for action in bench.last if isinstance(action, events.Subscribe) for each in action.filters]
    assert TERMS in asked
    for topic in asked:
        if topic != TERMS:
            bench.receive(topic, bench.retained[topic])
    bench.retained.pop(TERMS)
    for _ in range(3):
        bench.tick(40)
    assert TERMS in bench.retained
    bench.check_published()


def test_terms_that_the_broker_holds_are_not_published_again(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.connect()
    asked = [each for action in bench.last if isinstance(action, events.Subscribe) for each in action.filters]
    seen = len(bench.published)
    for topic in asked:
        bench.receive(topic, bench.retained[topic])
    for _ in range(5):
        bench.tick(60)
    assert TERMS not in [action.topic for action in bench.published[seen:]]


def test_a_restart_goes_on_with_the_same_contexts_terms_and_helpers(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.sums.moved(one_hot(-2, 1))
    bench.tick()
    before, context, scale = bench.sums, bench.context, bench.sums.scales
    head = bench.retained[HEAD]
    bench.restart()
    bench.start()
    assert bench.sums.contexts == before.contexts
    assert (bench.context, bench.sums.scales, bench.retained[HEAD]) == (context, scale, head)
    known = bench.sums.helpers["h-1"]
    assert (known.proof, known.card, known.count) == (
        before.helpers["h-1"].proof,
        before.helpers["h-1"].card,
        before.helpers["h-1"].count,
    )
    assert bench.version == 1


class DyingBench(PrivateBench):
    """Of the actions of a call nothing is done, or only what is to be saved: then the process is killed."""

    dies = ""

    def perform(self, actions: Sequence[events.Action]) -> list[events.Action]:
        if not self.dies:
            return super().perform(actions)
        batch = [action.record for action in actions if isinstance(action, events.Save)]
        if batch and self.dies == "saved":
            self.ledger.write(batch, now=self.now)
        return list(actions)


@pytest.mark.parametrize("dies", ["before", "saved"])
@pytest.mark.parametrize("at", range(6))
def test_a_version_has_one_context_and_its_head_names_it_whenever_the_process_is_killed(
    at: int, dies: str, tmp_path: Path, helper: HelperSide
) -> None:
    bench = DyingBench(make_private(tmp_path / "agg", [helper], plan__learning_rate=0.5))
    bench.start()

    def move() -> None:
        bench.sums.moved(one_hot(1, 0))
        bench.tick(20)

    steps: list[Callable[[], object]] = [
        lambda: bench.enroll_helper(helper),
        lambda: bench.say(helper, helper.card(2)),
        move,
        lambda: bench.say(helper, helper.card(3)),
        lambda: bench.tick(20),
        lambda: bench.perform(bench.core._versions.empty()),
    ]
    for step in steps[:at]:
        step()
    before = {base: each.context for base, each in bench.sums.contexts.items()}
    bench.dies = dies
    steps[at]()
    told = bench.sums.contexts if dies == "saved" else {}
    before |= {base: each.context for base, each in told.items()}
    bench.dies = ""
    bench.restart()
    bench.start()
    bench.tick(20)
    for step in steps[at:]:
        step()
    assert {base: bench.sums.contexts[base].context for base in before} == before
    assert bench.check_published().helpers[0].card.number == 3
    rows = bench.ledger.db.execute("SELECT base FROM contexts ORDER BY base").fetchall()
    assert [base for (base,) in rows] == list(range(bench.version + 1))
    bench.close()


def test_offline_commands_keep_the_terms(bench: PrivateBench, helper: HelperSide, tmp_path: Path) -> None:
    bench.ready(helper)
    context = bench.context
    assert context is not None
    bench.close()
    administration.change_state(tmp_path / "agg", "pause", "test")
    again = PrivateBench(tmp_path / "agg")
    again.start()
    again.tick(10)
    assert again.context == context
    assert again.check_published().content() == context.terms_bytes
    again.close()


def test_after_a_restored_backup_the_higher_version_has_its_own_context(
    bench: PrivateBench, helper: HelperSide, tmp_path: Path
) -> None:
    bench.ready(helper)
    bench.close()
    administration.restored(tmp_path / "agg", "test", 1.8e9)
    again = PrivateBench(tmp_path / "agg")
    again.start()
    assert again.version >= 2**32
    again.tick(10)
    again.check_published()
    again.close()


def test_the_rows_of_private_sums_are_checked_at_a_start(bench: PrivateBench, helper: HelperSide) -> None:
    bench.ready(helper)
    bench.ledger.db.execute("UPDATE helpers SET count = 7")
    with pytest.raises(Exception, match="helpers h-1 is not as it was written"):
        bench.restart()


def test_a_repaired_folder_keeps_helpers_and_begins_terms_anew(
    bench: PrivateBench, helper: HelperSide, tmp_path: Path
) -> None:
    bench.ready(helper)
    bench.say(helper, helper.card(2), helper.status(session=2, count=6))
    bench.sums.moved(one_hot(2, 0))
    bench.tick(20)
    before = bench.check_published()
    bench.ledger.db.execute("UPDATE counts SET value = value + 1")
    bench.ledger.db.execute("UPDATE versions SET updates = 9 WHERE version = 1")
    bench.close()
    repaired = repairing.repair(tmp_path / "agg", clock_s=1.8e9)
    assert repaired.version >= 2**32
    again = PrivateBench(tmp_path / "agg")
    again.start()
    again.tick(10)
    assert again.check_published() == before
    assert again.sums.helpers["h-1"].count == 6
    assert again.context is not None
    assert again.context.base == again.version == repaired.version
    again.close()


def test_a_plain_federation_has_no_rows_and_no_topics_of_private_sums(tmp_path: Path) -> None:
    bench = Bench(make_directory(tmp_path / "agg"))
    actions = bench.start()
    assert bench.core.sums is None
    filters = [each for action in actions if isinstance(action, events.Subscribe) for each in action.filters]
    assert not any("/help/" in each for each in filters)
    for table in ("helpers", "terms", "contexts", "private_updates", "sets"):
        assert bench.ledger.db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    assert private_rows.codes(bench.ledger.db) == {}
    assert dict(bench.head.plan) == {}
