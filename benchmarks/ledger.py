"""Measure an aggregator's ledger: the time of a start and of a check, and the bytes that each update adds.

    python -m benchmarks.ledger [--updates 1000000] [--devices 1000] [--bytes 1500]

The ledger is made of the records that real merges make. Updates hold arbitrary bytes in place of a block, which nothing
reads again behind the snapshot at the newest version.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ternbus.aggregator.core import records
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.merge.downlink import encoded_block, next_block
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.files import read_key
from ternbus.broker.protocol.identity import Identity, key_id
from ternbus.broker.protocol.merge_log import Entry, Signed
from ternbus.broker.protocol.model_messages import SnapshotRef
from ternbus.broker.protocol.schema import Vector, vector_digest

FEDERATION = "bench"
BUFFER = 100
SNAPSHOT_EVERY = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=1500, help="of an update's body")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))


def measure(updates: int, devices: int, **sizes: int) -> dict[str, Any]:
    """Make a ledger of so many updates in a temporary folder; times in seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "agg"
        model = {"w": np.zeros((100, 10), np.float32)}
        settings = {"merge.buffer_size": BUFFER, "downlink.slots": 1000}
        administration.create(home, federation=FEDERATION, broker="mqtt://127.0.0.1:1", model=model, settings=settings)
        empty = size_of(home)
        fill(home, updates, devices, sizes["bytes"])
        grown = size_of(home)
        begun = time.perf_counter()
        with closing(Ledger(home / LEDGER)) as ledger:
            administration.open_core(home, ledger, "benchmark")
        started = time.perf_counter()
        faults = check(home).faults
        checked = time.perf_counter()
        return {
            "updates": updates,
            "start_s": round(started - begun, 2),
            "check_s": round(checked - started, 1),
            "faults": len(faults),
            "bytes_an_update": round((grown - empty) / updates, 1),
            "ledger_mb": round((home / LEDGER).stat().st_size / 1e6, 1),
        }


def size_of(home: Path) -> int:
    return sum(path.stat().st_size for path in home.rglob("*") if path.is_file())


def fill(home: Path, updates: int, devices: int, size_bytes: int) -> None:
    """Enroll the devices, accept and merge; snapshots let go of the bodies, as they do in a federation."""
    settings = administration.load_settings(home)
    identity = Identity(read_key(home / administration.KEY))
    keys = [Identity(number.to_bytes(32, "little")).public for number in range(devices)]
    with closing(Ledger(home / LEDGER)) as ledger:
        ledger.db.execute("PRAGMA synchronous = OFF")
        ledger.write(
            records.DeviceEnrolled(device=f"d{number}", public=public, proof=bytes(32))
            for number, public in enumerate(keys)
        )
        vector, previous = ledger.vector(0), ledger.last_entry().hash
        same = encoded_block(next_block(ledger.schema(), settings.downlink.codec, vector, vector))
        server = optimizer.init(settings.optimizer, vector)
        for version in range(1, updates // BUFFER + 1):
            accepted = [update_of((version - 1) * BUFFER + place, version - 1, keys) for place in range(BUFFER)]
            body = os.urandom(size_bytes)
            ledger.write([records.UpdateAccepted(update=update, body=body) for update in accepted])
            entry = Entry(
                federation=FEDERATION,
                version=version,
                digest=vector_digest(vector),
                previous=previous,
                updates=tuple(update.contribution(1.0) for update in accepted),
            ).signed(identity)
            previous = entry.hash
            batch: list[records.Record] = [made(version, vector, same, entry)]
            if version % SNAPSHOT_EVERY == 0 or version == updates // BUFFER:
                named = SnapshotRef(version=version, parts=1, content_bytes=1, place=0)
                taken = records.SnapshotTaken(
                    version=version, published=vector, server=server, named=named, recipe=Recipe.of(settings)
                )
                batch.append(taken)
            ledger.write(batch)


def update_of(number: int, base: int, keys: Sequence[bytes]) -> AcceptedUpdate:
    device = number % len(keys)
    return AcceptedUpdate(
        device=f"d{device}",
        key=key_id(keys[device]),
        seq=number + 2,
        base=base,
        digest=os.urandom(32),
        staleness=0,
        samples=600,
        discount=1.0,
        codec="ternary",
        encoding="zstd",
        norm=1.5,
        stated=600,
    )


def made(version: int, vector: Vector, same: tuple[str, bytes], entry: Signed) -> records.VersionMade:
    """A version whose delta changes nothing."""
    return records.VersionMade(
        version=version,
        digest=vector_digest(vector),
        updates=BUFFER,
        staleness_mean=0.0,
        staleness_max=0,
        codec="ternary",
        encoding=same[0],
        body=same[1],
        entry=entry,
    )


if __name__ == "__main__":
    main()
