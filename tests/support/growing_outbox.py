"""States of a device's outbox, one training after the other; without torch, for a process that is killed."""

from dataclasses import replace

import numpy as np

from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.state import State, prepare

KEY = Identity(b"o" * 32).key_id
SCHEMA = Schema.of({"w": (400, 10)})


def state_after(state: State) -> State:
    """The state after one more training."""
    number = len(state.local) + 1
    block = Block.of_float32(SCHEMA, np.full(SCHEMA.elements, number, np.float32))
    update = prepare(block, seq=10 + number, base=number, samples=1, metrics={}, frame_bytes=3000)
    return replace(state, outstanding=update, local=b"x" * number)
