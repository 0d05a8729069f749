"""From the ledger back to a running state: the recovered core is the one that was."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.small_world import Bench, Device, float32_block, follow, make_directory, scratch, ternary_block
from ternbus.aggregator.core import events, first_version
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.merge.mean import Change
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.robust import Buffered
from ternbus.aggregator.settings import OPTIMIZERS, RULES
from ternbus.aggregator.shell import administration
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.files import read_key
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.schema import vector_digest

Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Bench] = []

    def start(**settings: object) -> Bench:
        bench = Bench(make_directory(scratch() / "aggregator", **settings))
        made.append(bench)
        bench.start()
        return bench

    yield start
    for bench in made:
        bench.close()


def gathered(model: Model) -> Change | None:
    """What the buffer would come to."""
    return model._gathered.result() if model.buffer else None


def state(core: Core) -> dict[str, Any]:
    """All of a core that must survive."""
    model = core.model
    oldest = model.version - core.settings.staleness.max
    return {
        "version": model.version,
        "digest": model.digest,
        "published": model.published.tobytes(),
        "target": model.server.target.tobytes(),
        "momentum": None if model.server.momentum is None else model.server.momentum.tobytes(),
        "squares": None if model.server.squares is None else model.server.squares.tobytes(),
        "buffer": list(model.buffer),
        "change": (change.delta.tobytes(), change.weights) if (change := gathered(model)) else None,
        "retained": [getattr(core.published, name) for name in ("state", "snapshot", "sizes", "head_frame", "slots")],
        "recipe": core.published.recipe,
        "codes": dict(core.registry.codes),
        "retired": core.registry.retired,
        "members": {
            name: (
                member.public,
                member.proof,
                member.old_keys,
                member.revoked,
                {base for base in member.bases if base >= oldest},
                member.highest_base,
                member.answer,
                member.evaluates,
                member.metrics_seq,
                member.metrics_bytes,
                member.waiting_bytes,
                member.revoked_why,
            )
            for name, member in core.registry.members.items()
        },
    }


def server_bits(bench: Bench) -> list[bytes | None]:
    server = bench.core.model.server
    return [None if each is None else each.tobytes() for each in (server.target, server.momentum, server.squares)]


def live(bench: Bench, merges: int) -> list[Device]:
    """Some versions with updates of both codecs, zstd and sealed, stale ones too, and something in the buffer."""
    devices = [bench.join(name) for name in ("a", "b", "c")]
    bench.invite("not-yet")
    for version in range(merges):
        for index, device in enumerate(devices[:2]):
            block = (ternary_block if index else float32_block)(bench.schema, 10 * version + index)
            sealed = bench.identity.public if version % 2 else None
            bench.send(device, block, version, samples=5 + index, encoding="zstd" if index else "raw", seal_to=sealed)
        assert bench.version == version + 1
    bench.send(devices[2], float32_block(bench.schema, 999), merges // 2)
    bench.send(devices[0], b"nonsense", merges)
    return devices


@pytest.mark.parametrize("codec", ["ternary", "float32"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("merges", [0, 1, 3, 7])
def test_the_recovered_core_is_the_one_before_the_crash(make: Make, codec: str, name: str, merges: int) -> None:
    """To the bit: the same additions in the same order."""
    bench = make(merge__buffer_size=2, downlink__codec=codec, optimizer__name=name, downlink__slots=6)
    live(bench, merges)
    before = state(bench.core)
    assert len(bench.core.model.buffer) == 1
    for _ in range(2):
        bench.restart()
        assert state(bench.core) == before
    residual = np.abs(bench.core.model.server.target - bench.core.model.published).max()
    assert (residual > 0) == (codec == "ternary" and merges > 0) or codec == "float32"


@pytest.mark.parametrize("rule", RULES)
def test_the_recovered_core_merges_by_the_same_rule(make: Make, rule: str) -> None:
    more: dict[str, object] = {"merge__max_share": 0.4} if rule == "mean" else {"merge__byzantine": 0}
    bench = make(merge__buffer_size=3, merge__rule=rule, merge__max_wait_s=0.01, downlink__slots=9, **more)
    devices = [bench.join(name) for name in ("a", "b", "c")]
    for version in range(4):
        for index, device in enumerate(devices[: 3 if version % 2 else 2]):
            make_block = ternary_block if index else float32_block
            bench.send(device, make_block(bench.schema, 10 * version + index), version, samples=5 + index)
        bench.tick(1.0)
    bench.send(devices[2], float32_block(bench.schema, 999), 4)
    before = state(bench.core)
    assert (bench.version, len(bench.core.model.buffer)) == (4, 1)
    bench.restart()
    assert state(bench.core) == before


def test_another_rule_begins_with_the_buffer_and_rewrites_nothing(make: Make) -> None:
    bench = make(merge__buffer_size=2, downlink__slots=9)
    live(bench, 3)
    target = bench.core.model.server.target.tobytes()
    bench.close()
    edit(bench, 'rule = "mean"', 'rule = "median"')
    bench.recover()
    bench.start()
    assert bench.core.model.server.target.tobytes() == target
    assert isinstance(bench.core.model._gathered, Buffered)
    assert len(bench.core.model.buffer) == 1
    bench.restart()
    assert bench.core.model.server.target.tobytes() == target
    assert bench.core.published.recipe.merge.rule == "median"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_as_if_nothing_had_happened(make: Make, name: str) -> None:
    """Two aggregators take the same updates; one is restarted in between."""
    one, twin = (make(merge__buffer_size=2, optimizer__name=name, downlink__slots=5) for _ in range(2))
    for bench in (one, twin):
        devices = live(bench, 4)
        for version in range(4, 9):
            if bench is one:
                bench.restart()
                bench.start()
            bench.send(devices[0], float32_block(bench.schema, version), version)
            if version > 4:
                bench.send(devices[1], ternary_block(bench.schema, version), version)
    assert one.version == twin.version == 9
    assert one.core.model.digest == twin.core.model.digest
    assert server_bits(one) == server_bits(twin)


def test_an_update_is_not_merged_again_after_a_restart(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    frames = pi.update(float32_block(bench.schema, 1), 0)
    bench.receive(pi.topic("update"), *frames)
    bench.restart()
    bench.start()
    bench.receive(pi.topic("update"), *frames)
    assert bench.version == 1
    assert bench.send(pi, float32_block(bench.schema, 2), 0)[0].outcome == "duplicate"
    assert bench.version == 1


def test_old_keys_and_revoked_ones_are_known(make: Make) -> None:
    bench = make()
    old = bench.join("pi")
    bench.join("pi")
    bench.revoke("pi", "lost")
    bench.restart()
    member = bench.core.registry.members["pi"]
    assert (member.revoked, member.revoked_why) == (True, "lost")
    assert member.old_keys == {old.identity.key_id: (old.identity.public, "replaced")}


def test_the_state_that_a_command_set_while_nothing_ran_is_published(make: Make) -> None:
    bench = make()
    bench.close()
    administration.change_state(bench.directory, "pause", "test")
    bench.recover()
    assert bench.core.published.state == "paused"
    bench.start()
    assert bench.head.state == "paused"


def test_closing_while_nothing_runs_merges_the_buffer(make: Make) -> None:
    bench = make(merge__buffer_size=2)
    live(bench, 1)
    bench.close()
    administration.change_state(bench.directory, "close", "test")
    bench.recover()
    assert (bench.version, bench.core.model.buffer, bench.core.published.state) == (2, [], "closed")
    bench.start()
    assert (bench.head.version, bench.head.state) == (2, "closed")
    assert bench.head.digest == vector_digest(bench.core.model.published)


def edit(bench: Bench, was: str, now: str) -> None:
    toml = bench.directory / administration.TOML
    text = toml.read_text()
    assert was in text
    toml.write_text(text.replace(was, now))


def test_closing_under_an_optimizer_that_never_ran_merges_by_it_and_forgets_the_other_s_state(make: Make) -> None:
    bench = make(merge__buffer_size=2, optimizer__name="fedavgm")
    live(bench, 3)
    before = bench.core.model.server.target.copy()
    bench.close()
    edit(bench, 'name = "fedavgm"', 'name = "fedadam"')
    administration.change_state(bench.directory, "close", "test")
    bench.recover()
    server = bench.core.model.server
    assert (bench.version, bench.core.published.recipe.optimizer.name) == (4, "fedadam")
    assert server.momentum is not None
    assert server.squares is not None
    mean = float32_block(bench.schema, 999).value() / np.sqrt(3)  # made on version 1, two versions ago
    np.testing.assert_allclose(server.momentum, 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(server.squares, 0.99 * 1e-6 + 0.01 * mean**2, rtol=1e-3)
    np.testing.assert_allclose(server.target, before + server.momentum / (np.sqrt(server.squares) + 1e-3), rtol=1e-4)


def test_a_federation_cannot_be_renamed(make: Make) -> None:
    bench = make()
    toml = bench.directory / administration.TOML
    toml.write_text(toml.read_text().replace('"lab"', '"other"', 1))
    with pytest.raises(ConfigError, match="cannot be renamed"):
        administration.open_core(bench.directory, bench.ledger, "test")


def test_a_restart_under_another_bound_knows_the_bases_it_needs(make: Make) -> None:
    """A base that was forgotten as stale is known again when the operator raises the bound."""
    bench = make(merge__buffer_size=1, staleness__max=1)
    pi, other = bench.join("pi"), bench.join("other")
    bench.send(pi, float32_block(bench.schema, 1), 0)
    for version in range(1, 6):
        bench.send(other, float32_block(bench.schema, version), version)
    toml = bench.directory / administration.TOML
    toml.write_text(toml.read_text().replace("max = 1 ", "max = 20 "))
    bench.restart()
    bench.start()
    assert bench.head.max_staleness == 20
    assert bench.send(pi, float32_block(bench.schema, 9), 0)[0].outcome == "duplicate"
    assert bench.send(pi, float32_block(bench.schema, 9), 2)[0].outcome == "accepted"


def test_a_directory_moves_with_all_that_is_in_it(make: Make) -> None:
    bench = make(merge__buffer_size=2)
    live(bench, 3)
    before = state(bench.core)
    bench.close()
    moved = scratch() / "elsewhere"
    shutil.move(bench.directory, moved)
    again = Bench(moved)
    assert state(again.core) == before
    assert again.identity == Identity(read_key(moved / administration.KEY))
    again.start()
    assert again.handle(events.TimeReached()) == []
    again.close()


def test_a_restored_directory_goes_on_above_what_devices_have_seen(make: Make) -> None:
    bench = make(merge__buffer_size=2, downlink__slots=4)
    pi, other = bench.join("pi"), bench.join("other")
    for version in range(3):
        for device in (pi, other):
            bench.send(device, ternary_block(bench.schema, version), version)
    bench.send(pi, ternary_block(bench.schema, 9), 3)  # in the buffer when the copy is made
    head, session = bench.head, bench.core.session
    head_seq = bench.core._frames.seq
    bench.perform(bench.core.restored(0.0))
    bench.restart()
    bench.start()
    assert (bench.head.version, bench.head.digest) == (head.version + 2**32, head.digest)
    assert bench.core._frames.seq > head_seq + 2**32
    assert bench.core.session > session + 2**32
    assert follow(bench.retained, bench.identity.public) == (bench.head.version, bench.core.model.digest)
    bench.send(other, ternary_block(bench.schema, 10), bench.head.version)
    assert bench.head.version == head.version + 2**32 + 1
    assert not bench.core.model.buffer
    assert follow(bench.retained, bench.identity.public) == (bench.head.version, bench.core.model.digest)


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_body_is_noticed(make: Make, damage: str) -> None:
    bench = make()
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    (path,) = (bench.directory / "bodies").iterdir()
    body = bytearray(path.read_bytes())
    if damage == "lose":
        path.unlink()
    else:
        body[len(body) // 2] ^= 1
        path.write_bytes(body if damage == "flip" else body[:-1])
    bench.ledger.close()
    with pytest.raises(CorruptError, match="restore it from a backup"):
        bench.recover()


def test_a_snapshot_whose_vectors_did_not_reach_the_disk_is_merged_anew(make: Make) -> None:
    """Taken at leisure: the start is at the snapshot before, with every body since; the model is the same."""
    bench = make(merge__buffer_size=2, downlink__slots=4)
    pi, other = bench.join("pi"), bench.join("other")
    begun, version = bench.core.published.snapshot.version, 0
    while bench.core.published.snapshot.version == begun:
        for device in (pi, other):
            bench.send(device, float32_block(bench.schema, version), version)
        version = bench.version
    model = bench.core.model
    assert bench.ledger.server()[0] == begun
    bench.restart()
    assert bench.core.published.snapshot.version == version  # what the broker has is not undone
    assert bench.core.model.digest == model.digest
    assert np.array_equal(bench.core.model.server.target, model.server.target)


def test_vectors_that_are_written_are_where_the_next_start_begins(make: Make) -> None:
    bench = make(merge__buffer_size=2, downlink__slots=4)
    pi, other = bench.join("pi"), bench.join("other")
    for version in range(12):
        for device in (pi, other):
            bench.send(device, float32_block(bench.schema, version), version)
        bench.beside.work()
    bench.send(pi, float32_block(bench.schema, 12), 12)
    assert bench.ledger.server()[0] == bench.core.published.snapshot.version > 0
    target = bench.core.model.server.target
    bench.restart()
    assert np.array_equal(bench.core.model.server.target, target)


def test_an_orderly_end_leaves_the_vectors_on_disk(make: Make) -> None:
    bench = make(merge__buffer_size=2, downlink__slots=4)
    pi, other = bench.join("pi"), bench.join("other")
    while bench.ledger._pending is None:
        for device in (pi, other):
            bench.send(device, float32_block(bench.schema, bench.version), bench.version)
    bench.close()
    bench.recover()
    assert bench.ledger.server()[0] == bench.core.published.snapshot.version


@pytest.mark.parametrize("damage", [b"", b"\0" * 100])
def test_damaged_vectors_are_named(make: Make, damage: bytes) -> None:
    bench = make()
    path = bench.directory / "vectors" / "1-server.f32"
    path.write_bytes(damage)
    with pytest.raises(CorruptError, match=r"1-server\.f32 is damaged; run `ternbus aggregator check"):
        bench.restart()
    path.unlink()
    with pytest.raises(CorruptError, match="cannot read"):
        bench.restart()


def test_a_first_version_in_memory_is_what_would_be_recovered(tmp_path: Path) -> None:
    """Simulations begin without a ledger."""
    bench = Bench(make_directory(tmp_path / "aggregator"))
    core = bench.core
    first = first_version.make(core.settings, bench.identity, bench.schema, core.model.published)
    assert first.published(core.settings) == core.published
    assert first.seq == core.seq
    assert first.version.digest == core.model.digest
    assert np.array_equal(first.snapshot.server.target, core.model.server.target)
    bench.close()
