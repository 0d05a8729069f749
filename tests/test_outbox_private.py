"""A private update on disk: everything that makes its frames, and what must not be forgotten about it."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.private_sums import card, helper_key, seeds_in, terms_for
from ternbus.broker.errors import CorruptError
from ternbus.broker.files import write_key
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.masking import prepare_private
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import OutstandingUpdate, State
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.private_sum import encode
from ternbus.edge.learn.sum_content import SumJob
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.shell import key_rotation
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.store import outbox_salvage
from ternbus.edge.store.outbox import FILE, Outbox

SCHEMA = Schema.of({"w": (400, 10)})
AGGREGATOR = Identity(b"a" * 32)
OLD, NEW = Identity(b"o" * 32), Identity(b"n" * 32)
TERMS = terms_for(SCHEMA, helpers=(card(1), card(2)))
PINS = SumPolicy(helpers=(helper_key(1).public,))


def profile(identity: Identity = OLD) -> Profile:
    return Profile(
        federation="lab",
        device="pi",
        identity=identity,
        aggregator_public=AGGREGATOR.public,
        seal=lambda plain: seal(AGGREGATOR.public, plain),
        role="train",
        sums=PINS,
    )


def update() -> OutstandingUpdate:
    plan = Plan.from_meta({"codec": "private"})
    change = np.full(SCHEMA.elements, 0.5, np.float32)
    content = encode(SCHEMA, TERMS, plan, change, samples=1, random_source=RandomSource())
    job = SumJob(terms=TERMS, context=bytes([7]) * 32)
    return prepare_private(content, job, profile(), seq=70, base=5, metrics={}, frame_bytes=2000)


STATE = State(
    key=OLD.key_id,
    enrolled=True,
    seq_limit=129,
    head_version=6,
    schema=SCHEMA.encoded,
    residual=np.ones(SCHEMA.elements, np.float32),
    outstanding=update(),
    left=5,
    cards={helper_key(1).public: 3},
    refusal="waits for Ann's helper",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Outbox(tmp_path, OLD.key_id) as outbox:
        outbox.save(STATE, None, {})
    return tmp_path


def opened(folder: Path, identity: Identity = OLD) -> State:
    with Outbox(folder, identity.key_id) as outbox:
        return outbox.state


def frames(state: State, identity: Identity = OLD) -> list[Frame]:
    assert state.outstanding is not None
    return [parse(part.payload) for part in profile(identity).update(state.outstanding)]


def test_the_frames_are_the_same_bytes_after_a_restart(folder: Path) -> None:
    found = opened(folder)
    assert len(frames(found)) > 1
    assert [(each.header, each.body) for each in frames(found)] == [(each.header, each.body) for each in frames(STATE)]
    assert (found.left, found.cards, found.refusal) == (5, {helper_key(1).public: 3}, "waits for Ann's helper")


def test_that_something_left_is_written_without_the_update(folder: Path) -> None:
    with Outbox(folder, OLD.key_id) as outbox:
        statements: list[str] = []
        outbox._db.set_trace_callback(statements.append)
        outbox.save(replace(outbox.state, left=6), None, {})
    assert [text.split("(")[0] for text in statements if text.startswith("REPLACE")] == ["REPLACE INTO kept "]
    assert opened(folder).left == 6


@pytest.mark.parametrize("is_sealed", [False, True])
def test_an_answered_update_leaves_nothing_on_disk(folder: Path, is_sealed: bool) -> None:
    mark = bytes(range(1, 100))
    hidden = replace(update(), encoded=1000 * mark)
    if is_sealed:
        hidden = replace(hidden, private=None, sealed=bytes(2000))
    with Outbox(folder, OLD.key_id) as outbox:
        outbox.save(replace(outbox.state, outstanding=hidden), None, {})
    assert mark in b"".join(path.read_bytes() for path in folder.iterdir())
    with Outbox(folder, OLD.key_id) as outbox:
        outbox.save(replace(outbox.state, outstanding=None, refusal=""), None, {})
    assert mark not in b"".join(path.read_bytes() for path in folder.iterdir())
    with closing(sqlite3.connect(folder / FILE)) as db:
        assert db.execute("SELECT count(*) FROM private").fetchone() == (0,)
    assert (opened(folder).outstanding, opened(folder).refusal) == (None, "")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE private SET seeds = zeroblob(length(seeds))", "private"),
        ("DELETE FROM private", "private"),
        ("UPDATE kept SET value = '-1' WHERE name = 'left'", "a row of kept"),
        ("DELETE FROM kept WHERE name = 'private'", "private in kept"),
    ],
)
def test_what_was_never_written_is_named(folder: Path, change: str, named: str) -> None:
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        assert db.execute(change).rowcount
    with pytest.raises(CorruptError, match=rf"{named}.* is not as it was written"):
        opened(folder)


def test_a_salvaged_update_keeps_its_seeds_and_counts_as_sent(folder: Path) -> None:
    with Outbox(folder, OLD.key_id) as outbox:
        outbox.save(replace(outbox.state, left=-1), None, {})
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        db.execute("UPDATE kept SET value = '9' WHERE name = 'left'")
    _, lost = outbox_salvage.salvage(folder, OLD.key_id, private=False)
    assert lost == ["a row of kept", "the receipts of earlier updates"]
    found = opened(folder)
    assert found.outstanding is not None
    assert found.outstanding.private is not None
    assert STATE.outstanding is not None
    assert found.outstanding.private.seeds == STATE.outstanding.private.seeds  # type: ignore[union-attr]
    assert (found.left, found.cards) == (5, STATE.cards)


def test_an_update_whose_seeds_are_lost_is_dropped_and_never_sent_in_the_clear(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        db.execute("UPDATE private SET seeds = zeroblob(length(seeds))")
    _, lost = outbox_salvage.salvage(folder, OLD.key_id, private=False)
    assert "the update that has no answer" in lost
    assert (opened(folder).outstanding, opened(folder).left) == (None, -1)


def test_a_new_key_gets_the_same_seeds_and_the_pins_stay(folder: Path) -> None:
    home = DeviceDirectory(folder)
    settings = Settings(
        federation="lab", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key=AGGREGATOR.public.hex(),
        task="digits-numpy", helpers=helper_key(1).public.hex(), private_min="5", private_roster="own",
    )  # fmt: skip
    home.write(settings)
    write_key(folder / "device.key", b"o" * 32)
    renewal = home.renewal()
    renewal.folder.mkdir()
    renewal.write(settings)
    write_key(renewal.folder / "device.key", b"n" * 32)
    with Outbox(renewal.folder, NEW.key_id) as outbox:
        outbox.save(State(key=NEW.key_id, enrolled=True, seq_limit=65), None, {})
    key_rotation.finish(home)
    assert home.settings() == settings
    found = opened(folder, NEW)
    assert (found.left, found.cards) == (5, STATE.cards)
    (before, *_), (after, *_) = frames(STATE), frames(found, NEW)
    assert seeds_in(after, NEW.public, (1, 2)) == seeds_in(before, OLD.public, (1, 2))
    assert after.meta["context"] == before.meta["context"]


def test_to_rejoin_forgets_the_update_and_no_box_key() -> None:
    after = STATE.rejoined(NEW.key_id)
    assert (after.outstanding, after.residual, after.left, after.cards) == (None, None, -1, STATE.cards)
