"""Attacks on private sums, each by its name; what a lying aggregator, broker or device tries, and what it gets.

(a) Decoding and double asking. (d) Rollback and interleaving. The helper is attacked alone here: whatever it answers,
no linear system of its sums has a single update, or part of one, as its solution. Where each attack is:

    attack                                              tests
    (a) weights, a member twice                         here; test_private_lies.py
        other bits, terms, order or set id              here
        nested and overlapping sets, any order of asks  here, at a weakened helper too
    (b) duplicate with highest_seq, packet limits,      test_private_attacks_runs.py over whole runs, at a weakened
        a new key, stale with learning rate 0           helper too; test_private_lies.py; test_edge_private.py
    (c) another model, plan, terms, scales or n_ref     test_private_lies.py; test_edge_private.py: the_context_binds
        one vector as tensors in another order          test_edge_private.py: the_same_bytes_as_other_tensors
        a plan for one machine; one wide device         test_private_training.py
    (d) a database put back, an empty helper            here; test_helper_processes.py on both brokers
        two processes on one directory                  test_helper_commands.py; test_helper_processes.py
        interleavings at two helpers                    here; test_private_orders.py at the aggregator
    (e) an aggregator that is its own helper, a head    test_private_attacks_processes.py on both brokers;
        without private, or with less                   test_edge_private_terms.py
        sybils, copied boxes, key ids, spliced headers  test_private_lies.py
        bodies out of range, wrong sums                 test_private_attacks_processes.py; test_private_aggregator.py
        two runs with one plan.seed                     test_private_training.py
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.private_sets import NOW_S, Asked, Helper, Sent, World, identity, published, ready, stopped, terms_of
from ternbus.broker.sums import masks
from ternbus.broker.sums.sets import ABANDON, OPEN, OPENED, PREPARE, REFUSED, Answer
from ternbus.helper.core.records import MemoryRecords

DEVICES = ("pi-1", "pi-2", "pi-3", "pi-4", "pi-5")
STEPS = (PREPARE, OPEN, ABANDON)


def single(sums: Sequence[Sequence[str]], unknowns: Sequence[str] = DEVICES) -> list[str]:
    """The devices whose update a linear system of sums tells; exact, by rational elimination."""
    rows = [[Fraction(name in members) for name in unknowns] for members in sums]
    rank = 0
    for column in range(len(unknowns)):
        pivot = next((row for row in range(rank, len(rows)) if rows[row][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        rows[rank] = [value / rows[rank][column] for value in rows[rank]]
        for row in range(len(rows)):
            if row != rank and (factor := rows[row][column]):
                rows[row] = [each - factor * own for each, own in zip(rows[row], rows[rank], strict=True)]
        rank += 1
    return [name for row in rows for name in [_only(row, unknowns)] if name]


def _only(row: Sequence[Fraction], unknowns: Sequence[str]) -> str:
    found = [name for name, value in zip(unknowns, row, strict=True) if value]
    return found[0] if len(found) == 1 else ""


@dataclass
class Attack:
    """An aggregator that asks for whatever it likes, of updates that each device sent once."""

    helper: Helper
    world: World
    updates: dict[str, Sent] = field(default_factory=dict)
    opened: list[tuple[str, ...]] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, helper: Helper) -> "Attack":
        world = World(terms_of(helper))
        return cls(helper, world, {name: world.update(name) for name in DEVICES})

    def set_of(self, *names: str) -> Asked:
        return self.world.asked(*(self.updates[name] for name in names))

    def ask(self, *names: str, step: str) -> Answer:
        asked = self.set_of(*names)
        answer = self.helper.ask(asked, step)
        if answer.outcome == OPENED:
            self.opened.append(names)
            total = asked.sum_of(self.helper.last_sum)
            assert np.array_equal(total, asked.truth)
            self.sums.append(self.world.layout.unpack(total)[0])
        return answer

    def open(self, *names: str) -> str:
        self.ask(*names, step=PREPARE)
        return self.ask(*names, step=OPEN).outcome


class ForgetfulRecords(MemoryRecords):
    """The weakened helper: it does not remember which updates were used."""

    def used_in(self, device: str, base: int) -> bytes | None:
        return None


def weakened() -> Helper:
    helper = ready()
    helper.records = ForgetfulRecords(roster=helper.roster)
    helper.start()
    helper.wait(1.0)
    helper.connect()
    return helper


OVERLAPPING = {
    "nested sets": [("pi-1", "pi-2", "pi-3"), ("pi-1", "pi-2")],
    "overlapping sets": [("pi-1", "pi-2"), ("pi-2", "pi-3"), ("pi-1", "pi-3")],
    "four sets of three": [DEVICES[:3], ("pi-1", "pi-2", "pi-4"), ("pi-1", "pi-3", "pi-4"), ("pi-2", "pi-3", "pi-4")],
}


@pytest.mark.parametrize("sets", OVERLAPPING.values(), ids=OVERLAPPING)
def test_a_nested_and_overlapping_sets_solve_to_single_updates_at_a_weakened_helper_only(
    sets: list[tuple[str, ...]],
) -> None:
    attack = Attack.of(weakened())
    assert [attack.open(*names) for names in sets] == [OPENED] * len(sets)
    assert single(attack.opened)
    unknowns = sorted({name for names in sets for name in names})
    system = np.array([[name in names for name in unknowns] for names in sets], float)
    for place in (unknowns.index(name) for name in single(attack.opened, unknowns)):
        row = np.linalg.lstsq(system.T, np.eye(len(unknowns))[place], rcond=None)[0]
        found = np.rint(row @ np.array(attack.sums)).astype(int)
        trits = attack.world.layout.unpack(attack.updates[unknowns[place]].words)[0]
        assert np.array_equal(found, trits)  # every trit of one device

    attack = Attack.of(ready())
    outcomes = [attack.open(*names) for names in sets]
    assert outcomes == [OPENED] + [REFUSED] * (len(sets) - 1)
    assert not single(attack.opened)


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sets(st.sampled_from(DEVICES), min_size=1)), max_size=20))
def test_a_no_order_of_asks_tells_a_single_update(asks: list[tuple[str, set[str]]]) -> None:
    attack = Attack.of(ready())
    for step, names in asks:
        attack.ask(*sorted(names), step=step)
    assert not single(attack.opened)
    distinct = set(attack.opened)
    assert sum(map(len, distinct)) == len({name for names in distinct for name in names})  # no update in two sums


def test_a_the_same_members_in_another_order_or_under_another_set_id_are_the_same_set() -> None:
    attack = Attack.of(ready())
    assert attack.open("pi-1", "pi-2") == OPENED
    body = attack.helper.last_sum
    assert attack.ask("pi-2", "pi-1", step=OPEN).outcome == OPENED
    assert attack.helper.last_sum == body
    asked = attack.set_of("pi-1", "pi-2")
    for step in (PREPARE, OPEN):
        answer = attack.helper.ask(asked, step, digest=bytes(32))
        assert (answer.outcome, answer.reason[:9]) == (REFUSED, "wrong-set")


def test_a_the_same_members_under_other_terms_bits_model_or_plan_are_refused() -> None:
    attack = Attack.of(ready())
    asked = attack.set_of("pi-1", "pi-2", "pi-3")
    others = [
        replace(asked.ask, terms=replace(attack.world.terms, **changes).content())
        for changes in (
            {"bits": 8},
            {"levels": 3},
            {"scales": (0.5, 0.5)},
            {"samples": 9.0},
            {"ternary": 10, "dense": 9},
        )
    ]
    others += [replace(asked.ask, model=bytes(32)), replace(asked.ask, plan=bytes(32)), replace(asked.ask, version=5)]
    for opens_first in (False, True):
        if opens_first:
            assert attack.open("pi-1", "pi-2", "pi-3") == OPENED
        for other in others:
            for step in (PREPARE, OPEN):
                answer = attack.helper.ask(Asked(other, asked.updates), step)
                assert (answer.outcome, answer.reason[:13]) == (REFUSED, "other-context")
                assert set(answer.updates) == {"pi-1", "pi-2", "pi-3"}


def test_a_weights_cannot_be_asked_for_and_a_member_counts_once() -> None:
    """Weights 1, 3, 9 would spell every trit of every device; a member that is there three times would weigh three."""
    attack = Attack.of(ready())
    one, two = attack.updates["pi-1"], attack.updates["pi-2"]
    for members in ([one, one, two], [one, one], [one, attack.world.update("pi-1", seq=6), two]):
        answer = attack.helper.ask(attack.world.asked(*members), PREPARE)
        assert (answer.outcome, answer.reason[:5], answer.updates) == (REFUSED, "twice", ("pi-1",))
    assert attack.open("pi-1", "pi-2") == OPENED


def test_a_a_refusal_uses_nothing_up_and_tells_nothing() -> None:
    attack = Attack.of(ready())
    stranger = replace(attack.world, model=bytes(32)).update("pi-5")
    answer = attack.helper.ask(attack.world.asked(*map(attack.updates.get, DEVICES[:4]), stranger), PREPARE)  # type: ignore[arg-type]
    assert (answer.outcome, answer.updates, attack.helper.last_sum) == (REFUSED, ("pi-5",), b"")
    assert attack.open(*DEVICES[:4]) == OPENED


def test_a_a_sum_in_which_another_helper_s_mask_is_missing_is_noise() -> None:
    one, two = ready("h-1"), ready("h-2")
    world = World(terms_of(one, two))
    asked = world.asked(world.update("pi-1"), world.update("pi-2"))
    one.ask(asked, PREPARE)
    one.ask(asked, OPEN)
    trits = world.layout.unpack(asked.sum_of(one.last_sum))[0]
    assert max(abs(trits)) > 2


# (d) Rollback and interleaving.


def interleavings(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All orders of two sequences, each kept in its order: "0" for a step of the first one, "1" for the second."""
    size = len(first) + len(second)
    for places in combinations(range(size), len(first)):
        yield tuple("0" if place in places else "1" for place in range(size))


def test_d_no_interleaving_at_two_helpers_opens_two_sets_that_overlap_while_one_is_honest() -> None:
    """The other helper is in league with the aggregator, and opens whatever it is asked."""
    plans = [plan for size in (2, 3) for plan in product(STEPS, repeat=size)]
    tried = 0
    for first, second in product(plans, repeat=2):
        if OPEN not in first or OPEN not in second:
            continue
        for order in interleavings(first, second):
            honest = Tried()
            queues = {"0": iter(first), "1": iter(second)}
            for which in order:
                honest.step(which, next(queues[which]))
            assert len(honest.opened) <= 1, (first, second, order)
            tried += 1
    assert tried > 5000


@dataclass
class Tried:
    """The rule of an honest helper for two sets that overlap, as `Answers` has it: tested against it below."""

    states: dict[str, str] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)

    def step(self, which: str, step: str) -> str:
        state, other = self.states.get(which), self.states.get("1" if which == "0" else "0")
        if step == ABANDON:
            if state == "opened":
                return "refused"
            self.states[which] = "abandoned"
            return "abandoned"
        if state == "abandoned" or other in {"prepared", "opened"}:
            return "refused"
        if step == PREPARE:
            self.states.setdefault(which, "prepared")
            return "prepared"
        if state is None:
            return "refused"
        self.states[which] = "opened"
        self.opened.add(which)
        return "opened"


@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from(STEPS)), max_size=10))
def test_d_an_honest_helper_follows_that_rule_step_by_step(steps: list[tuple[str, str]]) -> None:
    rule, attack = Tried(), Attack.of(ready())
    sets = {"0": ("pi-1", "pi-2"), "1": ("pi-2", "pi-3")}
    for which, step in steps:
        assert attack.ask(*sets[which], step=step).outcome == rule.step(which, step)


def test_d_a_prepare_that_was_held_back_does_not_bring_an_abandoned_set_back() -> None:
    attack = Attack.of(ready())
    held = attack.set_of("pi-1", "pi-2").messages("h-1", PREPARE)
    assert attack.ask("pi-1", "pi-2", step=ABANDON).outcome == "abandoned"
    assert attack.open("pi-2", "pi-3") == OPENED
    attack.helper.arrive(*held)
    assert attack.ask("pi-1", "pi-2", step=OPEN).outcome == REFUSED


def copy_of(helper: Helper) -> Helper:
    """Another process with the disk as it is now."""
    copy = Helper(helper.name, roster=helper.roster, min=helper.min)
    copy.disk, copy.records = helper.disk, _copied(helper.records)
    copy.start()
    copy.wait(60.0)
    return copy


def _copied(records: MemoryRecords) -> MemoryRecords:
    made = MemoryRecords(roster=records.roster)
    for name in ("_states", "_used", "_keys", "_devices"):
        setattr(made, name, dict(getattr(records, name)))
    return made


@pytest.mark.parametrize("step", [PREPARE, OPEN])
def test_d_a_database_copied_before_an_answer_and_put_back_opens_nothing(step: str) -> None:
    """The broker is honest, and the aggregator hides the count."""
    attack = Attack.of(ready())
    if step == OPEN:
        attack.ask("pi-1", "pi-2", step=PREPARE)
    copy = copy_of(attack.helper)
    attack.ask("pi-1", "pi-2", step=step)
    retained = [each for each in published(attack.helper.actions, "card") if each.retain][-1]
    assert stopped(copy.connect((retained.topic, retained.payload))).code == 2
    assert not published(copy.actions, "answer")


def test_d_a_database_that_is_put_back_is_found_by_the_aggregator_s_count_too() -> None:
    """The broker has lost what it retained; the aggregator is honest, and says the highest count that it has seen."""
    attack = Attack.of(ready())
    copy = copy_of(attack.helper)
    attack.open("pi-1", "pi-2")
    copy.connect()
    assert copy.core.is_ready
    asked = attack.set_of("pi-2", "pi-3")
    assert stopped(copy.arrive(*asked.messages("h-1", PREPARE, count=2))).code == 2


def test_d_boxes_under_a_lost_key_stay_closed_whatever_is_restored() -> None:
    """An empty helper with the old Ed25519 key, and one that is told that it was restored."""
    attack = Attack.of(ready())
    attack.open("pi-1", "pi-2")
    empty = Helper()
    empty.random.count = 100  # other random bytes than those of the first disk
    empty.disk = replace(empty.disk, box_keys=(replace(empty.disk.box_key, secret=empty.random(32)),))
    restored = copy_of(attack.helper)
    restored.disk = restored.disk.restored(empty.random, NOW_S)
    for helper in (empty, restored):
        helper.start()
        helper.wait(60.0)
        helper.connect()
        answer = helper.ask(attack.set_of("pi-2", "pi-3"), PREPARE)
        assert (answer.outcome, answer.reason[:8]) == (REFUSED, "old-card")


def test_d_a_copied_box_opens_for_nobody_else() -> None:
    """A device in league with the aggregator puts another's box into its own header, to learn what it masks."""
    attack = Attack.of(ready())
    (card,) = (each.card for each in attack.world.terms.helpers)
    box = attack.updates["pi-1"].member.frame().meta["boxes"][0]
    spliced = attack.world.update("mallory", boxes=(box,))
    answer = attack.helper.ask(attack.world.asked(spliced, attack.updates["pi-2"]), PREPARE)
    assert (answer.outcome, answer.updates) == (REFUSED, ("mallory",))
    about = {"context": attack.world.context, "device": identity("pi-1").public, "helper": card.public, "seq": 5}
    assert masks.open_box(attack.helper.disk.box_key.secret, box, **about)  # type: ignore[arg-type]
