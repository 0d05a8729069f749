"""A helper written from the protocol's page alone answers whatever it is asked as Ternbus' own does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from stranger.helper import Helper as Stranger
from support.private_sets import FEDERATION, Asked, Helper, Sent, World, identity, ready, terms_of
from ternbus.broker.sums.sets import ABANDON, OPEN, PREPARE, REFUSED
from ternbus.broker.sums.terms import OWN, digest_of

DEVICES = ("pi-1", "pi-2", "pi-3", "pi-4")
BY_HEADER = {"bad-ask", "bad-header", "unknown-key", "bad-signature", "bad-meta", "bad-terms", "bad-card"}


def beside(ours: Helper) -> Stranger:
    """A stranger's helper with the same key, box key and roster."""
    secret = digest_of(f"helper {ours.name}".encode())
    key = ours.disk.box_key
    made = Stranger(FEDERATION, SigningKey(secret), key.secret, key.number, ours.min, own_roster=ours.roster == OWN)
    assert bytes(made.signing.verify_key) == ours.identity.public
    return made


def compare(ours: Helper, theirs: Stranger, asked: Asked, step: str, **changes: Any) -> str:
    """Ask both; the outcome, or the word of a refusal."""
    digest = changes.pop("digest", asked.digest)
    content = changes.pop("content", asked.ask.content())
    answer = ours.ask(asked, step, digest=digest, content=b"" if step == ABANDON else content)
    body = ours.last_sum
    found = theirs.answer({"step": step, "set": digest, "count": 0}, b"" if step == ABANDON else content)
    assert found is not None
    meta, masks = found
    assert (meta["outcome"], meta["set"], meta["count"]) == (answer.outcome, answer.set, answer.count)
    assert masks == body
    if answer.outcome != REFUSED:
        return answer.outcome
    word = answer.reason.partition(":")[0]
    if meta["reason"] in {"bad", "twice"}:  # the page leaves open which check of the members' form comes first
        assert word in BY_HEADER | {"twice"}
    else:
        assert word == meta["reason"]
        assert tuple(meta["updates"]) == answer.updates
    return word


# What may be wrong with an update of a set
FAULTS: dict[str, Callable[[World, str], Sent]] = {
    "none": lambda world, name: world.update(name),
    "another number": lambda world, name: world.update(name, seq=6),
    "another key": lambda world, name: world.update(name, identity=identity(f"{name} renewed")),
    "the key of another": lambda world, name: world.update(name, identity=identity("pi-1")),
    "another base": lambda world, name: world.update(name, base=world.version + 1),
    "another model": lambda world, name: replace(world, model=bytes(32)).update(name),
    "a claimed context": lambda world, name: replace(world, model=bytes(32)).update(name, context=world.context),
    "a higher minimum": lambda world, name: world.update(name, min=4),
    "a copied box": lambda world, name: world.update(name, boxes=world.update("pi-9").member.frame().meta["boxes"]),
    "a box too many": lambda world, name: world.update(
        name, boxes=(*world.update(name).member.frame().meta["boxes"], bytes(198))
    ),
    "another part": lambda world, name: world.update(name, part=1),
    "another kind": lambda world, name: world.update(name, kind="offer"),
    "another federation": lambda world, name: world.update(name, federation="x"),
    "another signature": lambda world, name: replace(
        world.update(name), member=replace(world.update(name).member, signature=bytes(64))
    ),
    "another public key": lambda world, name: replace(
        world.update(name), member=replace(world.update(name).member, public=identity("pi-9").public)
    ),
}
members = st.lists(
    st.tuples(st.sampled_from(DEVICES), st.sampled_from(("none",) * 15 + tuple(FAULTS))), min_size=1, max_size=4
)
asks = st.lists(st.tuples(members, st.sampled_from((PREPARE, PREPARE, OPEN, OPEN, ABANDON))), min_size=1, max_size=5)


@settings(max_examples=60)
@given(asks=asks, own_roster=st.booleans(), repeat=st.booleans())
def test_both_answer_whatever_is_asked_alike(
    asks: list[tuple[list[tuple[str, str]], str]], own_roster: bool, repeat: bool
) -> None:
    ours = ready(roster=OWN) if own_roster else ready()
    theirs = beside(ours)
    if own_roster:
        for name in DEVICES[:3]:
            ours.records.admit(name, identity(name).public)
            theirs.admit(name, identity(name).public)
    world = World(terms_of(ours))
    for rows, step in asks:
        asked = world.asked(*(FAULTS[fault](world, name) for name, fault in rows))
        for _ in range(2 if repeat else 1):
            compare(ours, theirs, asked, step)


def test_every_answer_that_there_is_was_compared() -> None:
    ours = ready()
    theirs, world = beside(ours), World(terms_of(ours))
    good = world.asked(*(world.update(name) for name in DEVICES[:2]))
    rest = [world.update(name) for name in DEVICES[1:]]
    met = [compare(ours, theirs, good, step) for step in (OPEN, PREPARE, OPEN, PREPARE, OPEN, ABANDON)]
    met += [compare(ours, theirs, world.asked(*rest[1:]), step) for step in (ABANDON, PREPARE, OPEN)]
    met.append(compare(ours, theirs, good, PREPARE, digest=bytes(32)))
    met.append(compare(ours, theirs, good, PREPARE, content=b"\x80"))
    met.append(compare(ours, theirs, world.asked(rest[1]), PREPARE))
    met.append(compare(ours, theirs, world.asked(*rest), PREPARE))
    many = replace(world, terms=replace(world.terms, bits=4))
    met.append(compare(ours, theirs, many.asked(*(many.update(f"pi-{n}") for n in range(8))), PREPARE))
    foreign = replace(world, terms=terms_of(Helper("h-2")))
    met.append(compare(ours, theirs, foreign.asked(*(foreign.update(name) for name in DEVICES)), PREPARE))
    newer = replace(ours.disk.box_key, number=2)
    old = replace(world, terms=replace(world.terms, helpers=(ours.profile.card(newer),)))
    met.append(compare(ours, theirs, old.asked(*(old.update(name) for name in DEVICES)), PREPARE))
    for version, make in enumerate(FAULTS.values(), 100):
        later = replace(world, version=version)
        met.append(compare(ours, theirs, later.asked(make(later, "pi-3"), later.update("pi-4")), PREPARE))
    one_key = [world.update(name, identity=identity("pi-7")) for name in ("pi-7", "pi-8")]
    met.append(compare(ours, theirs, world.asked(*one_key), PREPARE))
    met.append(compare(ours, theirs, world.asked(one_key[0], one_key[0], rest[2]), PREPARE))
    assert set(met) >= {
        *("prepared", "opened", "abandoned", "not-prepared", "wrong-set", "bad-ask", "too-few", "too-many"),
        *("foreign-terms", "old-card", "key-of-another", "other-context", "repeated", "bad-box", "unknown-key"),
        *("bad-signature", "twice"),
    }


def test_a_count_that_is_higher_ends_both() -> None:
    ours = ready()
    theirs, world = beside(ours), World(terms_of(ours))
    asked = world.asked(*(world.update(name) for name in DEVICES))
    meta = {"step": PREPARE, "set": asked.digest, "count": 1}
    ours.arrive(*asked.messages("h-1", PREPARE, count=1))
    assert ours.core.due_s() is None
    assert theirs.answer(meta, asked.ask.content()) is None
    assert theirs.answer({**meta, "count": 0}, asked.ask.content()) is None
