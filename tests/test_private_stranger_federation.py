"""Devices and a helper written from the protocol's page alone federate with Ternbus' aggregator and helper."""

import os
from random import Random

import msgpack
import numpy as np
import pytest
from nacl.signing import SigningKey

from stranger import sums
from stranger.helper import Helper as StrangeHelper
from stranger.private import HelperNode, Sent, Version, make_update
from support.private_sets import identity
from support.set_world import World
from support.small_world import LAB, receipts
from ternbus.aggregator.core import events
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.terms import digest_of

STRANGER = "h-1"


class MixedWorld(World):
    """One of its helpers is a stranger."""

    def __init__(self, *names: str) -> None:
        self.for_stranger: list[tuple[str, bytes]] = []  # kind and frame
        super().__init__(*names, downlink__codec="float32", merge__buffer_size=4)
        del self.helpers[STRANGER]
        signing = SigningKey(digest_of(f"helper {STRANGER}".encode()))
        helper = StrangeHelper(LAB, signing, os.urandom(32), number=1, least=3)
        self.stranger = HelperNode(STRANGER, "a-code-of-an-invitation", self.identity.public, helper)
        assert self.stranger.public == identity(f"helper {STRANGER}").public

    def connect_helper(self, name: str) -> None:
        if name != STRANGER:
            super().connect_helper(name)
            return
        self.say_all(self.stranger.connect())
        self.settle()

    def say_all(self, sent: list[Sent]) -> None:
        self.queue += [(topics.help_of(LAB, STRANGER, kind), payload) for kind, payload, _ in sent]

    def publish(self, action: events.Publish) -> None:
        super().publish(action)
        kind = action.topic.rsplit("/", 1)[1]
        if action.topic == topics.help_of(LAB, STRANGER, kind):
            self.queue.remove((action.topic, action.payload))
            self.for_stranger.append((kind, action.payload))

    def settle(self) -> None:
        """As every world does, and the stranger gets what is for it."""
        while self.queue or self.for_stranger:
            super().settle()
            while self.for_stranger:
                self.say_all(self.stranger.take(*self.for_stranger.pop(0)))

    def seen(self) -> Version:
        """What a device that follows has of the newest version."""
        terms: list[bytes] = []
        while (part := self.retained.get(topics.terms(LAB, len(terms)))) is not None:
            terms.append(part)
        return Version.read(self.retained[topics.head(LAB)], terms, self.identity.public, LAB)


def in_blocks_order(schema: Schema) -> list[int]:
    """The place in the vector of each element of a block."""
    return [place for part in (schema.ternary, schema.dense) for each in part for place in range(each.start, each.stop)]


@pytest.mark.parametrize("names", [(STRANGER,), (STRANGER, "h-2")], ids=["its helper", "one helper of each"])
def test_strangers_and_ternbus_make_versions_together(names: tuple[str, ...]) -> None:
    world, random = MixedWorld(*names), Random(7)
    devices = world.begin(4)
    for version in (0, 1):
        seen, before, values = world.seen(), np.array(world.core.model.published), []
        assert seen.head.meta["version"] == version
        for device in devices:
            tensors = [
                (each.tensor.role, [random.gauss(0, 0.01) for _ in range(each.tensor.elements)])
                for each in world.schema.segments
            ]
            frames, sent = make_update(
                SigningKey(device.identity.seed), device.name, device.next_seq(), seen, tensors,
                aggregator=world.identity.public, least=3, draw=random.random, fresh=os.urandom,
            )  # fmt: skip
            values.append(sent)
            (receipt,) = receipts(world.receive(device.topic("update"), *frames))
            assert (receipt.outcome, receipt.reason) == ("accepted", "")
        world.settle()
        assert world.version == version + 1
        terms, layout = sums.read_terms(seen.terms)
        scales = np.repeat(
            np.frombuffer(terms["scales"], "<f4"), [each.tensor.elements for each in world.schema.segments]
        )
        order = in_blocks_order(world.schema)
        change = np.zeros(world.schema.elements)
        total = [sum(each) for each in zip(*values, strict=True)]
        change[order] = sums.change_of(total, layout, scales[order].tolist(), terms["levels"])
        assert np.abs(change).max() > 0
        assert np.allclose(world.core.model.published, before + change, atol=1e-6)
    assert world.stranger.helper.count == 4  # two sets, each prepared and opened
    assert set(world.stranger.helper.states.values()) == {"opened"}


def test_an_update_by_other_terms_than_the_head_names_is_invalid() -> None:
    world, random = MixedWorld(STRANGER), Random(8)
    (device,) = world.begin(1)
    seen = world.seen()
    assert seen.context == world.contexts[0]
    tensors = [(each.tensor.role, [0.0] * each.tensor.elements) for each in world.schema.segments]
    changed = Version(seen.head, msgpack.packb({**msgpack.unpackb(seen.terms), "samples": 9.0}))
    frames, _ = make_update(
        SigningKey(device.identity.seed), device.name, device.next_seq(), changed, tensors,
        aggregator=world.identity.public, least=3, draw=random.random, fresh=os.urandom,
    )  # fmt: skip
    (receipt,) = receipts(world.receive(device.topic("update"), *frames))
    assert (receipt.outcome, receipt.reason.partition(":")[0]) == ("invalid", "wrong-context")
