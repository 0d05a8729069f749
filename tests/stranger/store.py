"""What section 13 of docs/protocol.md keeps on disk."""

import os
from pathlib import Path
from typing import Any

import msgpack

from stranger.wire import Meta


class Store:
    """One file that is replaced as a whole: each save is one durable write."""

    RESERVE = 64

    def __init__(self, folder: Path) -> None:
        """Read what is there."""
        self.path = folder / "device.msgpack"
        self.values: Meta = msgpack.unpackb(self.path.read_bytes()) if self.path.exists() else {}
        self._reserved = int(self.values.get("seq", 0))
        self._seq = self._reserved

    def save(self, **changes: Any) -> None:
        """Change and write."""
        self.values.update(changes)
        scratch = self.path.with_suffix(".new")
        with scratch.open("wb") as file:
            file.write(msgpack.packb(self.values))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)

    def next_seq(self, above: int = 0) -> int:
        """Take a number that was never used; ranges are reserved on disk."""
        self._seq = max(self._seq, above) + 1
        if self._seq > self._reserved:
            self._reserved = self._seq + self.RESERVE
            self.save(seq=self._reserved)
        return self._seq
