"""Where a broker listens: its URL, checked and taken apart."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Self
from urllib.parse import urlsplit

from ternbus.broker.errors import ConfigError

WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to listen on -> where it is heard here
PORTS: Final = {"mqtt": 1883, "mqtts": 8883}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One listener of a broker."""

    host: str
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Self:
        """Take ``mqtt://HOST[:PORT]`` or ``mqtts://HOST[:PORT]`` apart; ConfigError for anything else."""
        wanted = "mqtt://HOST:PORT or mqtts://HOST:PORT"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"the broker's URL is {wanted}, not {url!r}: {error}") from error
        if parts.username is not None:
            # not repeated in the message: what stands before the @ may be a password
            raise ConfigError(f"the broker's URL is {wanted}; a user name or password does not belong in it")
        extra = parts.path.strip("/") + parts.query + parts.fragment
        if parts.scheme not in PORTS or not parts.hostname or extra or port == 0:
            raise ConfigError(f"the broker's URL is {wanted}, not {url!r}")
        return cls(host=parts.hostname, port=port or PORTS[parts.scheme], tls=parts.scheme == "mqtts")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
