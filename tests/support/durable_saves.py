"""The saves of a device that sends an update, gets its receipt and follows; as a program, on a disk that fails.

    python -m support.durable_saves FOLDER

It prints the number of the save that failed, if one did.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ternbus.broker.errors import StorageError
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.state import AnsweredUpdate, OutstandingUpdate, State, prepare
from ternbus.edge.store.outbox import Outbox

SCHEMA = Schema.of({"w": (40, 100)})
KEY = Identity(b"d" * 32).key_id


def an_update(seq: int = 7) -> OutstandingUpdate:
    block = Block.of_float32(SCHEMA, np.ones(SCHEMA.elements, np.float32))
    return prepare(block, seq=seq, base=5, samples=1, metrics={}, frame_bytes=2000)


WAITING = State(key=KEY, enrolled=True, outstanding=an_update(), residual=np.zeros(SCHEMA.elements, np.float32))
ANSWERED = replace(WAITING, outstanding=None, answered_base=5, accepted=1)
RECEIPT = AnsweredUpdate(seq=7, base=5, outcome="accepted", version=2, key=KEY, digest=bytes(32))
SAVES: list[tuple[State, AnsweredUpdate | None, bool]] = [  # and whether it is durable
    (replace(WAITING, head_version=1, head_seq=10, seq_limit=64), None, True),
    (replace(WAITING, head_version=2, head_seq=11, seq_limit=64), None, False),
    (replace(ANSWERED, head_version=2, head_seq=11, receipt_seq=12, seq_limit=64), RECEIPT, False),
    (replace(ANSWERED, head_version=3, head_seq=13, receipt_seq=12, seq_limit=64), None, False),
    (replace(WAITING, head_version=3, head_seq=13, receipt_seq=12, seq_limit=64), None, True),
]


def main() -> None:
    """Do all saves."""
    with Outbox(Path(sys.argv[1]), KEY) as outbox:
        for number, (state, answered, durable) in enumerate(SAVES):
            try:
                outbox.save(state, answered, {}, durable=durable)
            except StorageError as error:
                assert "I/O error" in str(error), error
                print(number)
                return


if __name__ == "__main__":
    main()
