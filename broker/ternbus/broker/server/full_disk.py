"""Whether a broker cannot store messages because its disk is full: its log says so, if there is room to write it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SIGNS: Final = (b"no space left on device", b"disk quota exceeded", b"insufficient storage", b"insufficient resources")
ROOM_BYTES: Final = 1 << 20  # with less than this, a broker cannot store a snapshot
READ_BYTES: Final = 1 << 20  # of the log at once; a broker that logs faster has other troubles


@dataclass(slots=True, kw_only=True)
class FullDisk:
    """Looks for the signs in what the broker has logged since the last look, and at the disk itself."""

    log: Path
    _read_bytes: int = 0

    @property
    def explanation(self) -> str:
        """What happened, and what to do."""
        return (
            f"the disk that holds {self.log.parent} is full, so the broker cannot store messages: free some space there"
        )

    def is_seen(self) -> bool:
        try:
            size_bytes = self.log.stat().st_size
            with self.log.open("rb") as log:
                log.seek(max(min(self._read_bytes, size_bytes), size_bytes - READ_BYTES))
                text = log.read().lower()
                self._read_bytes = log.tell()
            return any(sign in text for sign in SIGNS) or shutil.disk_usage(self.log.parent).free < ROOM_BYTES
        except OSError:
            return False  # the log is gone; the broker has its own words for that
