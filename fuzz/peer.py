"""A fuzz target: the aggregator's core with messages that an enrolled device has signed.

Such a device may only cause a ``ProtocolError``, which the core counts; every other exception is a finding. One core
handles all inputs, so that state left by one input can affect the next, and growth of memory is visible.
"""

import struct
from hashlib import blake2b
from typing import Final

import msgpack
import numpy as np

from ternbus.aggregator import settings
from ternbus.aggregator.core import events
from ternbus.aggregator.core.core import Core
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import HEADER_BYTES_MAX, MAGIC, SIGNED_PREFIX
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.schema import Schema, Tensor
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.lab.virtual.setup import FEDERATION, without_disk

DEVICE: Final = "rogue"
KEY: Final = Identity(b"r" * 32)
KINDS: Final = ("update", "status", "offer", "metrics", "enroll", "head", "receipt", "no-such-kind", "statistics")
BASE: Final = b"\xa4base\x00"  # in a seed: replaced by the current version, since most updates would be stale otherwise
STEP_S: Final = 0.01
SCHEMA: Final = Schema.write(  # as in tests/vectors.json
    (
        Tensor("conv.weight", (2, 3), "ternary"),
        Tensor("conv.bias", (2,), "dense"),
        Tensor("fc.weight", (1, 7), "ternary"),
    )
)


class Federation:
    """A core at version 0 with one member."""

    def __init__(self) -> None:
        model = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in SCHEMA.tensors}
        chosen = {"merge.buffer_size": 1}
        founded = without_disk(0, [DEVICE], model, chosen, schema=SCHEMA, kinds=TensorKinds())
        self.core: Core = founded.core()
        self.core.registry.enroll(DEVICE, KEY.public, b"")
        self.now = 0.0
        self.seq = 0
        self.core.start(self.now)
        self.handle(events.TimeReached())
        self.handle(events.Connected(frame_bytes=settings.LimitSettings().frame_bytes))

    def handle(self, event: events.Event) -> None:
        self.now += STEP_S
        self.core.handle(event, self.now)
        if self.core.deadline is not None and self.core.deadline <= self.now:
            self.core.handle(events.TimeReached(), self.now)

    def send(self, topic_kind: str, payload: bytes) -> None:
        topic = topics.up(FEDERATION, DEVICE, topic_kind)
        self.handle(events.MessageArrived(topic=topic, payload=payload, packet_bytes=len(payload)))


_federation: list[Federation] = []  # made at the first input


def update(data: bytes) -> None:
    """One message. Bytes: kind, part, flags, length of meta (2), meta, body."""
    if len(data) < 5:
        return
    if not _federation:
        _federation.append(Federation())
    federation = _federation[0]
    kind, flags = KINDS[data[0] % len(KINDS)], data[2]
    length = int.from_bytes(data[3:5], "little")
    meta, body = data[5 : 5 + length], data[5 + length :]
    federation.seq += 0 if flags & 1 else 1  # with the flag: another part, or a copy, of the last message
    about = {
        "kind": kind,
        "federation": FEDERATION,
        "sender": DEVICE,
        "key": bytes(KEY.key_id),
        "seq": federation.seq,
        "part": [data[1] & 15, max(1, data[1] >> 4)],
        "digest": blake2b(body, digest_size=32).digest(),
    }
    meta = meta.replace(BASE, BASE[:-1] + msgpack.packb(federation.core.model.version), 1)
    header = b"\x88" + msgpack.packb(about)[1:] + msgpack.packb("meta") + (meta or b"\x80")
    if len(header) > HEADER_BYTES_MAX:
        return
    payload = MAGIC + struct.pack("<I", len(header)) + header + KEY.sign(SIGNED_PREFIX + header) + body
    federation.send(kind if kind in topics.UP_KINDS else "update", payload)
