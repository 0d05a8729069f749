"""(b) Forced repetition over whole runs: real cores of devices and of a helper, and an aggregator that lies to both.

It has each device send its updates again and again, by every way that the protocol has, and asks the helper for every
set that it can make of what it got. Over the whole run no (device, base) is in two answers, and no content is in two
sets, so that linear algebra gives it no single update. At helpers that are weakened on purpose the same runs do.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any, Final

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.core_device import AGGREGATOR_KEY, FRAME_BYTES, Device, connected, of, published
from support.private_device import SEALED, aggregator, finished, named
from support.private_sets import Asked, Helper, Sent, identity
from support.private_sums import terms_for
from support.scripted_aggregator import FEDERATION, ScriptedAggregator
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.schema import vector_digest
from ternbus.broker.sums import masks
from ternbus.broker.sums.sets import OPEN, PREPARE, REFUSED, Ask, SetMember
from ternbus.broker.sums.terms import AGGREGATOR as BY_AGGREGATOR
from ternbus.broker.sums.terms import digest_of
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, StartTraining
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.helper.core.records import MemoryRecords

NAMES: Final = ("pi-1", "pi-2", "pi-3", "pi-4")
MIN: Final = 3
VERSIONS: Final = 3
SMALL: Final = 1600  # bytes of a frame: an update takes two
DUPLICATE, PACKETS, KEY, STALE, LOST = "duplicate", "packets", "key", "stale", "lost"
LIES: Final = (DUPLICATE, PACKETS, KEY, STALE, LOST)


class ForgetfulRecords(MemoryRecords):
    """The weakened helper: it does not remember which updates were used."""

    def used_in(self, device: str, base: int) -> bytes | None:
        return None


@dataclass(frozen=True)
class Copy(Sent):
    """One of the messages in which a device sent an update; ``words`` are what only the test knows."""

    base: int = 0
    seeds: tuple[bytes, ...] = ()


@dataclass
class Victim:
    """An honest device of private sums."""

    name: str
    device: Device
    keys: int = 1
    draws: int = 0
    last: Frame | None = None  # part 0 of what it sent last

    @property
    def identity(self) -> Identity:
        return self.device.core.profile.identity


@dataclass
class Liar:
    """An aggregator that says what it likes to honest devices, and asks an honest helper for what it likes."""

    helper: Helper
    scripted: ScriptedAggregator = field(init=False)
    victims: dict[str, Victim] = field(init=False)
    copies: list[Copy] = field(default_factory=list)
    opened: list[tuple[Copy, ...]] = field(default_factory=list)
    sums: list[Any] = field(default_factory=list)  # of contents, one for each of `opened`
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.helper.connect()
        signed = self.helper.profile.card(self.helper.disk.box_key)
        self.terms = terms_for(aggregator().schema, helpers=(signed,), min=MIN, bits=8)
        self.scripted = aggregator(self.terms)
        pins = SumPolicy(helpers=(self.helper.identity.public,), min=MIN, roster=BY_AGGREGATOR)
        self.victims = {
            name: Victim(name, connected(sums=pins, device=name, identity=identity(name))) for name in NAMES
        }

    def run(self, lies: Sequence[Sequence[tuple[str, str]]]) -> None:
        """One version for each list of lies, each of which is told to one device; sets are asked for all along."""
        self.scripted.plan["learning_rate"] = 0.1
        for version, told in enumerate(lies):
            if version:
                self.scripted.advance()
            for victim in self.victims.values():
                self.take(victim, self.follow(victim))
            for name, lie in told:
                self.lie(self.victims[name], lie)
                self.ask_for_everything()
            self.ask_for_everything()
            for victim in self.victims.values():
                self.end(victim, "stale" if (victim.name, STALE) in told else "accepted")
            self.scripted.plan["learning_rate"] = 0.0 if any(lie == STALE for _, lie in told) else 0.1

    # --- what it says to devices

    def follow(self, victim: Victim) -> list[Action]:
        """Deliver the newest version; the update that the device makes of it, if it makes one."""
        scripted = self.scripted
        messages = [*named(scripted, self.terms), scripted.status(), scripted.head(), *scripted.snapshot()]
        messages += chain.from_iterable(scripted.delta(version) for version in range(1, scripted.version + 1))
        done = victim.device.arrive(*messages)
        for job in of(done, StartTraining):
            victim.draws += 1
            change = 0.3 * job.plan.learning_rate
            about = {"draw": 1000 * NAMES.index(victim.name) + victim.draws}
            done += victim.device.handle(finished(job, change, **about))
        return done

    def lie(self, victim: Victim, lie: str) -> None:
        sent = victim.last
        if sent is None:
            return
        match lie:
            case "duplicate":
                self.take(victim, self.tell(victim, "duplicate", highest_seq=sent.seq + 1000))
            case "packets":
                self.take(victim, self.reconnect(victim, SMALL))
            case "key":
                victim.keys += 1
                victim.device = victim.device.restarted(identity=identity(f"{victim.name} {victim.keys}"))
                victim.device.connect()
                victim.device.arrive(self.scripted.status())
                (enroll,) = published(victim.device.actions, "enroll")
                done = victim.device.arrive(self.receipt(victim, enroll.seq, "enrolled"))
                self.take(victim, done + self.follow(victim))
            case "stale":
                return  # it is told when all have asked
            case _:
                victim.device = victim.device.restarted()
                victim.device.connect()
                self.take(victim, self.follow(victim))

    def reconnect(self, victim: Victim, frame_bytes: int) -> list[Action]:
        victim.device.handle(events.Disconnected(reason="cut"))
        victim.device.wait(60.0)
        done = victim.device.handle(events.Connected(frame_bytes=frame_bytes))
        return done + victim.device.arrive(self.scripted.status())

    def tell(self, victim: Victim, outcome: str, **more: Any) -> list[Action]:
        assert victim.last is not None
        return victim.device.arrive(self.receipt(victim, victim.last.seq, outcome, **more))

    def receipt(self, victim: Victim, seq: int, outcome: str, **more: Any) -> Any:
        return self.scripted.receipt(victim.name, victim.identity.key_id, seq, outcome, **more)

    def end(self, victim: Victim, outcome: str) -> None:
        if victim.last is not None:
            self.tell(victim, outcome)
            victim.last = None
            self.reconnect(victim, FRAME_BYTES)

    def take(self, victim: Victim, done: list[Action]) -> None:
        """Keep each update that a device has sent, whole, with its content as all secrets together show it."""
        frames = published(done, Update.KIND)
        by_number: dict[int, list[Frame]] = defaultdict(list)
        for frame in frames:
            by_number[frame.seq].append(frame)
        for seq, parts in by_number.items():
            first, body = parts[0], b"".join(part.body for part in parts)
            assert [part.part for part in parts] == list(range(first.parts))
            victim.last = first
            update = Update.from_meta(first.meta)
            own = victim.identity.public
            about: dict[str, Any] = {"context": update.context, "device": own, "helper": self.helper.identity.public}
            (box,) = update.boxes
            seed = masks.open_box(self.helper.disk.box_key.secret, box, seq=seq, **about)
            sealed = body.removeprefix(SEALED)
            assert sealed[:16] == bytes(first.key) + seq.to_bytes(8, "little")
            masked = self.terms.layout.read(sealed[16:])
            words = masked.copy()
            self.terms.layout.subtract(words, masks.mask(self.terms.layout, seed, **about))
            member = SetMember.of(own, first)
            self.copies.append(Copy(victim.name, member, words, masked, base=update.base, seeds=(seed,)))

    # --- what it asks the helper for

    def ask_for_everything(self) -> None:
        """Every set of the newest message of each device on the present version, three or four of them."""
        newest = {each.device: each for each in self.copies if each.base == self.scripted.version}
        for size in (MIN, MIN + 1):
            for chosen in combinations(newest.values(), size):
                self.ask(chosen)

    def ask(self, chosen: Sequence[Copy]) -> None:
        scripted = self.scripted
        asked = Asked(
            Ask(
                version=scripted.version,
                model=vector_digest(scripted.vectors[scripted.version]),
                plan=digest_of(msgpack.packb(scripted.plan)),
                terms=self.terms.content(),
                members=tuple(each.member for each in chosen),
            ),
            tuple(chosen),
        )
        for step in (PREPARE, OPEN):
            answer = self.helper.ask(asked, step)
            if answer.outcome == REFUSED:
                self.refused[answer.reason.partition(":")[0]] += 1
                return
        total = asked.sum_of(self.helper.last_sum)
        assert np.array_equal(total, asked.truth)
        self.opened.append(tuple(chosen))
        self.sums.append(self.terms.layout.unpack(total)[0])

    # --- what it has in the end

    def exposed(self) -> dict[bytes, Any]:
        """The single contents that follow from all sums by linear algebra, by their words; but those of no change."""
        contents = sorted({each.words.tobytes() for members in self.opened for each in members})
        rows = np.array([[float(sum(each.words.tobytes() == one for each in members)) for one in contents]
                         for members in self.opened])  # fmt: skip
        inverse = np.linalg.pinv(rows)
        is_known = np.isclose(np.diag(inverse @ rows), 1)
        values = np.rint(inverse @ np.array(self.sums)).astype(int)
        known = {content: values[place] for place, content in enumerate(contents) if is_known[place]}
        return {content: found for content, found in known.items() if found.any()}

    def check(self) -> None:
        """No (device, base) in two answers, no content in two sets, no single update from all sums together."""
        sets = {tuple(sorted((each.device, each.base) for each in members)) for members in self.opened}
        updates = Counter(chain.from_iterable(sets))
        assert set(updates.values()) == {1}
        members = {(each.device, each.base, each.words.tobytes()) for members in self.opened for each in members}
        assert len(members) == len(updates)  # one content for each
        changes = [words for *_, words in members if self.terms.layout.unpack(self.terms.layout.read(words))[0].any()]
        assert len(set(changes)) == len(changes)  # and each in one set, but for that of no change
        assert self.exposed() == {}
        seen: dict[tuple[str, int], set[Any]] = defaultdict(set)
        for each in self.copies:
            seen[each.device, each.base].add((each.words.tobytes(), each.seeds))
        assert all(len(kinds) == 1 for kinds in seen.values())  # what is sent again has the same words and seeds


def liar(*, weakened: bool = False) -> Liar:
    helper = Helper(min=2, federation=FEDERATION)
    if weakened:
        helper.records = ForgetfulRecords(roster=helper.roster)
        helper.start()
        helper.wait(1.0)
    assert helper.profile.aggregator_public == AGGREGATOR_KEY.public
    return Liar(helper)


@pytest.mark.parametrize("lie", LIES)
def test_b_over_a_whole_run_no_update_is_in_two_answers_and_no_content_in_two_sets(lie: str) -> None:
    attacker = liar()
    attacker.run([[(name, lie) for name in NAMES]] * VERSIONS)
    attacker.check()
    assert len(attacker.opened) >= VERSIONS
    assert attacker.refused["repeated"] > 0
    made = Counter((each.device, each.base) for each in attacker.copies)
    assert len(made) == len(NAMES) * VERSIONS
    assert min(made.values()) == (1 if lie == STALE else 2)  # it was sent again, each time


def test_b_the_same_run_at_a_helper_that_forgets_tells_every_update() -> None:
    attacker = liar(weakened=True)
    attacker.run([[(name, DUPLICATE) for name in NAMES]] * VERSIONS)
    found = attacker.exposed()
    sent = {each.words.tobytes(): each.words for each in attacker.copies}
    assert found.keys() == sent.keys()
    for content, values in found.items():
        assert np.array_equal(values, attacker.terms.layout.unpack(sent[content])[0])
    with pytest.raises(AssertionError):
        attacker.check()


@settings(max_examples=10)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(LIES)), max_size=5), min_size=1, max_size=VERSIONS
    )
)
def test_b_no_order_of_lies_tells_a_single_update(lies: list[list[tuple[str, str]]]) -> None:
    attacker = liar()
    attacker.run(lies)
    attacker.check()
