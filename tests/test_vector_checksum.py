"""The checksum of a version in its delta: a device compares it, not the digest, except where updates are private."""

import numpy as np
import pytest

from support.core_device import following, logged
from support.following import Broker, a_head, deliver, has
from support.private_device import training as private_training
from support.scripted_aggregator import FEDERATION, Message, ScriptedAggregator
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.model_messages import Candidate, Delta, Head
from ternbus.broker.protocol.schema import vector_digest, vector_xxh3
from ternbus.broker.protocol.ternary import RAW
from ternbus.edge.core.follower import Follower

FALSE = bytes(range(32))


def test_it_is_xxh3_of_the_bytes_little_endian() -> None:
    """The answers of ``xxhsum -H2`` 0.8.1 for no byte, for "abcd" and for 64 times "abcd"."""
    answers = {
        0: "99aa06d3014798d86001c324468d497f",
        1: "8d6b60383dfa90c21be79eecd1b1353d",
        64: "73b0173ac1348264303d0baad05fbecc",
    }
    for count, known in answers.items():
        vector = np.frombuffer(b"abcd" * count, "<f4").astype(np.float32)
        assert vector_xxh3(vector).hex() == known
        assert vector_xxh3(np.repeat(vector, 2)[::2]).hex() == known
        assert vector_xxh3(vector.astype(">f4")).hex() == known


def next_delta(aggregator: ScriptedAggregator, *, digest: bool, checksum: bool | None) -> list[Message]:
    """The delta of the next version, with these of its digests true, and the head that names its digest."""
    aggregator.advance()
    vector, block = aggregator.vectors[-1], aggregator.blocks[-1]
    assert block is not None
    stated = vector_digest(vector) if digest else FALSE
    key = {None: b"", True: vector_xxh3(vector), False: FALSE[:16]}[checksum]
    delta = Delta(version=aggregator.version, digest=stated, codec=block.codec, encoding=RAW, xxh3=key)
    slot = aggregator.version % aggregator.slots
    frames = aggregator.cut(Delta.KIND, delta.meta(), block.content)
    named = [(topics.delta(FEDERATION, slot, part), each) for part, each in enumerate(frames)]
    return [*named, aggregator.head(digest=stated)]


CASES = [  # which of its digests are true (None: there is no such key), and what devices believe
    (True, None, {"public", "private"}),
    (False, None, set()),
    (True, True, {"public", "private"}),
    (False, True, {"public"}),
    (True, False, {"private"}),
    (False, False, set()),
]


@pytest.mark.parametrize("kind", ["public", "private"])
@pytest.mark.parametrize(("digest", "checksum", "believed"), CASES)
def test_a_device_whose_updates_are_private_compares_the_digest_and_another_the_checksum(
    digest: bool, checksum: bool | None, believed: set[str], kind: str
) -> None:
    aggregator, broker = ScriptedAggregator(), Broker()
    follower = Follower(federation=FEDERATION, is_private=kind == "private")
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.reconnected(0.0), 0.0)
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert has(follower, aggregator, 0)
    *delta, (_, head) = next_delta(aggregator, digest=digest, checksum=checksum)
    deliver(follower, delta)
    broker.silent = True
    broker.perform(follower, follower.head_accepted(Head.from_meta(parse(head).meta), 1.0), 1.0)
    assert has(follower, aggregator, 1) == (kind in believed)
    assert ("resync" in broker.logs) == (kind not in believed)


def test_no_private_device_follows_to_a_model_under_the_digest_of_another() -> None:
    """Its update would be in a sum with those of devices that have the model of that digest."""
    scripted, device = following()
    assert "resync" not in logged(device.arrive(*next_delta(scripted, digest=False, checksum=True)))
    assert device.core.follower.version == 1
    scripted, device, _ = private_training()
    assert "resync" in logged(device.arrive(*next_delta(scripted, digest=False, checksum=True)))
    assert device.core.follower.version is None


@pytest.mark.parametrize("wrong", [b"", bytes(15), bytes(17), bytes(32), "0" * 16, None, 5, [bytes(16)]], ids=repr)
@pytest.mark.parametrize("kind", [Delta, Candidate])
def test_a_checksum_of_another_length_or_type_is_refused(kind: type[Delta], wrong: object) -> None:
    meta = {"version": 1, "digest": bytes(32), "codec": "ternary", "encoding": "raw"}
    assert kind.from_meta(meta).xxh3 == b""
    assert "xxh3" not in kind.from_meta(meta).meta()
    with pytest.raises(ProtocolError, match=r"bad-meta.*xxh3"):
        kind.from_meta({**meta, "xxh3": wrong})


def test_a_hostile_one_is_dropped_and_the_device_goes_on() -> None:
    scripted, device = following()
    messages = next_delta(scripted, digest=True, checksum=True)
    meta = {"version": 1, "digest": FALSE, "codec": "float32", "encoding": RAW, "xxh3": 1}
    done = device.arrive((topics.delta(FEDERATION, 1, 0), scripted.cut(Delta.KIND, meta, b"")[0]), *messages)
    assert device.core.dropped["bad-meta"] == 1
    assert logged(done).count("dropped") == 1
    assert device.core.follower.version == 1
