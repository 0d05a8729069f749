"""Update bodies on disk: appended to one file for each snapshot, and removed a file at a time.

SQLite would write each body twice, page by page. Appended to a file, a body is written once, and removal is cheap.
"""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ternbus.aggregator.store.remedy import reading, remedy
from ternbus.broker import files
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import CorruptError

BODIES: Final = "bodies"  # the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a body lies."""

    segment: int
    offset: int
    size_bytes: int
    checksum: int  # CRC-32: a disk may lie, and zstd would not notice


@dataclass(slots=True)
class Bodies:
    """The files FOLDER/NUMBER.bodies; what was appended is durable after ``sync``, and readable at once."""

    folder: Path
    segment: int  # the one that is appended to
    _path: Path = field(init=False)
    _descriptor: int | None = field(default=None)
    _end: int = 0
    _dirty: bool = False
    _ahead: Future[list[tuple[bytes, Place]]] | None = None  # in another thread, which alone appends meanwhile
    _places: dict[int, tuple[bytes, Place]] = field(default_factory=dict)  # of what it has appended, by `id`

    def __post_init__(self) -> None:
        self._path = self._of(self.segment)

    def append_ahead(self, bodies: Sequence[bytes], thread: Executor) -> None:
        """Have a thread append these and make them durable; ``append`` then says where they are."""
        self._join()
        self._ahead = thread.submit(self._append_all, [body for body in bodies if id(body) not in self._places])

    def _append_all(self, bodies: Sequence[bytes]) -> list[tuple[bytes, Place]]:
        found = [(body, self._append(body)) for body in bodies]
        self._sync()
        return found

    def _join(self) -> None:
        """Wait for what is done ahead; StorageError where the disk did not take it."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            self._places |= {id(body): (body, place) for body, place in ahead.result()}

    def append(self, body: bytes) -> Place:
        """Put a body behind the last one, unless that was done ahead; StorageError where the disk does not take it."""
        self._join()
        known = self._places.pop(id(body), None)
        return self._append(body) if known is None else known[1]

    def _append(self, body: bytes) -> Place:
        with files.storing(self._path):
            if self._descriptor is None:
                self._open()
            assert self._descriptor is not None  # noqa: S101 - for the type checker
            place = Place(segment=self.segment, offset=self._end, size_bytes=len(body), checksum=zlib.crc32(body))
            left = memoryview(body)
            while left:
                left = left[os.write(self._descriptor, left) :]
        self._end += len(body)
        self._dirty = True
        reached("body-written")
        return place

    def sync(self) -> None:
        """Make durable what was appended since the last call."""
        self._join()
        self._sync()

    def _sync(self) -> None:
        if self._dirty and self._descriptor is not None:
            with files.storing(self._path):
                os.fdatasync(self._descriptor)
        self._dirty = False

    def read(self, place: Place) -> bytes:
        """A body; CorruptError where the file has lost or changed it, StorageError where the disk cannot read it."""
        path = self._of(place.segment)
        with reading(path), path.open("rb") as file:
            file.seek(place.offset)
            body = file.read(place.size_bytes)
        if len(body) != place.size_bytes or zlib.crc32(body) != place.checksum:
            raise CorruptError(f"{path} is damaged; {remedy(self.folder.parent)}")
        return body

    def begin(self, segment: int) -> None:
        """Append to another file from now on."""
        self.close()
        self.segment, self._path = segment, self._of(segment)

    def below(self, segment: int) -> list[Path]:
        """Every file with a lower number."""
        numbered = [path for path in self.folder.glob("*.bodies") if path.stem.isdecimal()]
        return [path for path in numbered if int(path.stem) < segment]

    def close(self) -> None:
        if self._ahead is not None:  # before its file is closed; who closes no longer asks how it went
            wait([self._ahead])
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        new = not self._path.exists()
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # what a crash left behind without a row in the ledger stays where it is: nothing refers to it
        self._end = os.fstat(self._descriptor).st_size
        if new:
            files.sync(self.folder)

    def _of(self, segment: int) -> Path:
        return self.folder / f"{segment}.bodies"
