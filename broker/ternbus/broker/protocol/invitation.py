"""The invitation: the one TOML file that an operator hands to a device, and all that the device needs."""

import json
import re
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.identity import check_device, check_federation

CODE_BYTES_MAX: Final = 64  # BLAKE2b's longest key


def check_broker_url(url: str) -> str:
    """Return ``url`` or raise ConfigError."""
    Endpoint.parse(url)
    return url


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """Who invites whom, where they meet, and the one-time code."""

    federation: str
    device: str
    broker: str
    aggregator_key: str  # 64 hex digits
    code: str = field(repr=False)
    ca: str | None = None
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)
    # For people: the aggregator knows it by its own clock, and a device may have none.
    expires: datetime | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_federation(self.federation)
        check_device(self.device)
        check_broker_url(self.broker)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", self.aggregator_key):
            raise ConfigError("the invitation's aggregator_key is not 64 hex digits; ask for a new invitation")
        if not 1 <= len(self.code.encode("utf-8", "surrogatepass")) <= CODE_BYTES_MAX:
            raise ConfigError(f"the invitation's code is not 1 to {CODE_BYTES_MAX} bytes; ask for a new invitation")

    @property
    def aggregator_public(self) -> bytes:
        return bytes.fromhex(self.aggregator_key)

    def dumps(self) -> str:
        """The TOML file's text."""
        lines = ["# A Ternbus invitation: whoever holds this file can join as this device, once."]
        if self.expires is not None:
            lines.append(f"# It ends on {self.expires.astimezone(UTC):%Y-%m-%d at %H:%M:%S} UTC.")
        for entry in _entries():
            value = getattr(self, entry)
            if value is not None:
                lines.append(f"{entry} = {json.dumps(value)}")  # a JSON string is a TOML basic string
        return "\n".join(lines) + "\n"

    @classmethod
    def loads(cls, text: str, source: str = "the invitation") -> "Invitation":
        table = toml.read(text, source)
        unknown = sorted(set(table) - set(_entries()))
        if unknown:
            raise ConfigError(f"{source} has an unknown key {unknown[0]!r}; is it an invitation?")
        missing = sorted({"federation", "device", "broker", "aggregator_key", "code"} - set(table))
        if missing:
            raise ConfigError(f"{source} lacks {missing[0]!r}; is it an invitation?")
        if not all(isinstance(value, str) for value in table.values()):
            raise ConfigError(f"{source} has a value that is not a string; is it an invitation?")
        return cls(**table)

    @classmethod
    def load(cls, path: Path) -> "Invitation":
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not an invitation: not UTF-8 text") from error
        return cls.loads(text, str(path))


def _entries() -> list[str]:
    """The keys of the file."""
    return [entry.name for entry in fields(Invitation) if entry.name != "expires"]
