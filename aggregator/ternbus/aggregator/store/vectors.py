"""Vectors on disk, in files: SQLite would write them twice, and block other writes meanwhile."""

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ternbus.aggregator.store.remedy import reading, remedy
from ternbus.broker import files
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import CorruptError
from ternbus.broker.protocol.schema import Vector, type_f32

VECTORS: Final = "vectors"  # the folder
PIECE: Final = 2**19  # bytes written at a time: who waits for the disk meanwhile waits for one piece


@dataclass(frozen=True, slots=True)
class Vectors:
    """The files FOLDER/NAME.f32, each of one or several vectors, little-endian; who names one keeps its checksum."""

    folder: Path

    def write(self, name: str, vectors: Sequence[Vector]) -> int:
        """Make vectors durable under a name, return the checksum; StorageError where the disk does not take them.

        What an interrupted attempt left there is overwritten; a file that something refers to must not be.
        """
        checksum = 0
        with files.storing(self._path(name)):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb"):
                for vector in vectors:
                    content = np.ascontiguousarray(vector, dtype=type_f32).data.cast("B")
                    checksum = zlib.crc32(content, checksum)
                    while content:
                        content = content[os.write(descriptor, content[:PIECE]) :]  # a full disk takes less, then none
                        os.fdatasync(descriptor)
                        reached("vectors-piece-written")
            files.sync(self.folder)
        return checksum

    def read(self, name: str, checksum: int) -> Vector:
        """What was written under a name, in one row.

        CorruptError where the file has lost or changed it, StorageError where the disk cannot read it.
        """
        path = self._path(name)
        with reading(path):
            content = path.read_bytes()
        if zlib.crc32(content) != checksum:
            raise CorruptError(f"{path} is damaged; {remedy(self.folder.parent)}")
        return np.frombuffer(content, dtype=type_f32).astype(np.float32)

    def beyond(self, names: Iterable[str]) -> list[Path]:
        """The files that are there under any other name."""
        kept = {self._path(name) for name in names}
        return [path for path in self.folder.glob("*.f32") if path not in kept]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.f32"
