"""The file of revoked keys. It only grows, and an older copy of the ledger does not undo a revocation."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ternbus.broker import files
from ternbus.broker.protocol.identity import is_device

FILE: Final = "revocations.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """A key that is void for good; ``why`` is in the operator's words, ``revoked_at`` in Unix seconds."""

    device: str
    public: bytes
    why: str = ""
    revoked_at: float = 0.0

    def line(self) -> str:
        values = [self.device, self.public.hex(), self.why, self.revoked_at]
        return json.dumps([*values, _checksum(values)])

    @classmethod
    def parse(cls, line: str) -> Self | None:
        """What a line says; None where it is not as it was written."""
        try:
            *values, checksum = json.loads(line)
            device, public, why, revoked_at = values
            if checksum != _checksum(values) or not is_device(device):
                return None
            return cls(device=device, public=bytes.fromhex(public), why=str(why), revoked_at=float(revoked_at))
        except (ValueError, TypeError, RecursionError):
            return None


def _checksum(values: list[Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The content of a list; ``damaged`` are the lines that cannot be read."""

    keys: dict[tuple[str, bytes], Revocation]
    damaged: tuple[str, ...] = ()


def read(path: Path) -> Found:
    """A list; an empty one where there is no file."""
    keys: dict[tuple[str, bytes], Revocation] = {}
    damaged = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if (revocation := Revocation.parse(line)) is not None:
                keys.setdefault((revocation.device, revocation.public), revocation)
            elif line.strip():
                damaged.append(line)
    return Found(keys=keys, damaged=tuple(damaged))


def add(path: Path, revocations: Iterable[Revocation]) -> int:
    """Put into a list what it lacks, durably; how many that were. Nothing is ever taken out, not even damaged lines."""
    found = read(path)
    new = {(each.device, each.public): each for each in revocations if (each.device, each.public) not in found.keys}
    if new:
        lines = [*found.damaged, *(each.line() for each in (*found.keys.values(), *new.values()))]
        with files.replacing(path, mode=0o600) as partial:
            files.write_text(partial, "\n".join(lines) + "\n")
    return len(new)
