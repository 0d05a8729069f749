"""A minimal aggregator, the reference of ``benchmarks.ingest``.

    python -m benchmarks.skeleton URL PARAMETERS JOURNAL

It does only what every aggregator must do: verify, hash, append, one fsync for up to 16 updates, decompress, add, sign
a receipt. It has no checks, no state and no other part of the protocol.
"""

import os
import queue
import signal
import sys
from hashlib import blake2b

import msgpack
import zstandard

from benchmarks.ingest import FEDERATION, shapes
from benchmarks.sender import identity
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.broker.link.link import Arrived, Link, Token
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import SIGNED_PREFIX, build
from ternbus.broker.protocol.identity import KeyId, verify
from ternbus.broker.protocol.messages import Receipt
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block

GROUP = 16


def main() -> None:
    """Serve until SIGTERM."""
    url, parameters, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    schema = Schema.of(shapes(parameters))
    total = Accumulator(schema)
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(url, client_id="skeleton", deliver=inbox.put, receive_maximum=256)
    link.connect("bench/skeleton", b"")
    link.subscribe([f"ternbus/1/{FEDERATION}/up/#"])
    print("ready", flush=True)
    journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    parts: dict[str, list[bytes]] = {}
    me, publics = identity(0), dict[str, bytes]()
    seq = 0
    while True:
        tokens: list[Token] = []
        finished: list[tuple[str, int]] = []
        event: object = inbox.get()
        while event is not None:
            if isinstance(event, Arrived):
                tokens.append(event.token)
                payload = event.payload
                end = 8 + int.from_bytes(payload[4:8], "little")
                header = msgpack.unpackb(payload[8:end])
                sender = header["sender"]
                public = publics.get(sender) or publics.setdefault(sender, identity(int(sender[1:])).public)
                verify(public, SIGNED_PREFIX + payload[8:end], payload[end : end + 64])
                body = payload[end + 64 :]
                if blake2b(body, digest_size=32).digest() != header["digest"]:
                    raise SystemExit("the digest of a body is wrong")
                os.write(journal, payload)
                bodies = parts.setdefault(sender, [])
                bodies.append(body)
                if len(bodies) == header["part"][1]:
                    content = zstandard.ZstdDecompressor().decompress(b"".join(parts.pop(sender)))
                    total.add(Block(schema, "ternary", content), 100.0)
                    finished.append((sender, header["seq"]))
            try:
                event = inbox.get_nowait() if len(finished) < GROUP else None
            except queue.Empty:
                event = None
        os.fsync(journal)
        for sender, number in finished:
            seq += 1
            receipt = Receipt(device=sender, device_key=KeyId(me.key_id), seq=number, outcome="accepted", version=0)
            frame = build(me, federation=FEDERATION, sender="aggregator", kind="receipt", seq=seq, meta=receipt.meta())
            link.publish(topics.down(FEDERATION, sender, "receipt"), frame)
        link.acknowledge(tokens)


if __name__ == "__main__":
    main()
