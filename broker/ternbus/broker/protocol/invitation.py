"""The invitation: a TOML file with all that a device, or a helper of private sums, needs to join a federation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Final

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.identity import check_device, check_federation, is_public_key

HELPER: Final = "helper"  # the role of a helper of private sums; devices and evaluators have none
CODE_BYTES_MAX: Final = 64  # the maximum length of a BLAKE2b key


def check_broker_url(url: str) -> str:
    """Return ``url``, or raise ConfigError if it is not the URL of a broker."""
    Endpoint.parse(url)
    return url


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """The federation and its key, the device, the broker's URL, the one-time code, credentials for TLS, and the role.

    ``device`` is the name of whom it is for, a helper's too; credentials are PEM.
    """

    federation: str
    device: str
    broker: str
    aggregator_key: str  # 64 hex digits
    code: str = field(repr=False)
    ca: str | None = None
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)
    role: str | None = None
    # Only for the heading of the file: the aggregator checks the expiry by its own clock, and a device may have none.
    expires: datetime | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_federation(self.federation)
        check_device(self.device)
        check_broker_url(self.broker)
        if not is_public_key(self.aggregator_key):
            raise ConfigError("aggregator_key in the invitation is not 64 hex digits; ask for a new invitation")
        if not 1 <= len(self.code.encode("utf-8", "surrogatepass")) <= CODE_BYTES_MAX:
            raise ConfigError(f"code in the invitation is not 1 to {CODE_BYTES_MAX} bytes; ask for a new invitation")

        if self.role not in {None, HELPER}:
            raise ConfigError(f"role in the invitation is {self.role!r}, which this version of Ternbus does not know")

    def check_role(self, role: str | None, source: str) -> None:
        """Raise ConfigError, which names ``source``, unless it is for a helper, or for a device, as ``role`` says."""
        if self.role == role:
            return
        if role == HELPER:
            raise ConfigError(
                f"{source} is the invitation of the device {self.device}, and `ternbus edge join` takes it; a helper's "
                f"is made by `ternbus aggregator invite AGG --helper NAME`"
            )
        raise ConfigError(
            f"{source} is the invitation of the helper {self.device}, and `ternbus helper init DIR --invitation FILE` "
            "takes it; a device's is made by `ternbus aggregator invite AGG NAME`"
        )

    @property
    def aggregator_public(self) -> bytes:
        return bytes.fromhex(self.aggregator_key)

    def dumps(self) -> str:
        """The TOML file's text."""
        heading = f"A Ternbus invitation. Keep it secret: its holder can join as this {self.role or 'device'}, once."
        if self.expires is not None:
            heading += f"\nIt expires on {self.expires.astimezone(UTC):%Y-%m-%d at %H:%M:%S} UTC."
        table = {entry: value for entry in _entries() if (value := getattr(self, entry)) is not None}
        return toml.dumps(table, {(): heading})

    @classmethod
    def loads(cls, text: str, source: str = "the invitation") -> "Invitation":
        """Parse the text of ``dumps``; ConfigError, which names ``source``, for anything else."""
        return cls.from_table(toml.loads(text, source), source)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], source: str = "the invitation") -> "Invitation":
        """Check a parsed TOML table; ConfigError, which names ``source``, for a missing, unknown or invalid key."""
        unknown = sorted(set(table) - set(_entries()))
        if unknown:
            raise ConfigError(
                f"{source} has an unknown key {unknown[0]!r}; give a file from `ternbus aggregator invite`"
            )
        missing = sorted({"federation", "device", "broker", "aggregator_key", "code"} - set(table))
        if missing:
            raise ConfigError(f"{source} lacks the key {missing[0]!r}; give a file from `ternbus aggregator invite`")
        if not all(isinstance(value, str) for value in table.values()):
            raise ConfigError(
                f"{source} has a value that is not a string; give a file from `ternbus aggregator invite`"
            )
        return cls(**table)


def _entries() -> list[str]:
    """The keys of the TOML file."""
    return [entry.name for entry in fields(Invitation) if entry.name != "expires"]
