"""The address of a broker: host, port and TLS, parsed from its URL."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Self
from urllib.parse import urlsplit

from ternbus.broker.errors import ConfigError

WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - address to listen on -> address to connect to
PORTS: Final = {"mqtt": 1883, "mqtts": 8883}


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address, which only this machine can reach."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_same_host(one: str, other: str) -> bool:
    """Whether two names or addresses are spellings of one host, as ``localhost``, ``LOCALHOST.`` and 127.0.0.1."""
    return _usual_spelling(one) == _usual_spelling(other)


def _usual_spelling(host: str) -> str:
    name = host.strip("[]").lower().removesuffix(".")
    try:
        return str(ip_address("127.0.0.1" if name == "localhost" else name))
    except ValueError:
        return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The host and port of a broker, and whether it uses TLS."""

    host: str
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse ``mqtt://HOST[:PORT]`` or ``mqtts://HOST[:PORT]``; ConfigError for anything else."""
        wanted = "mqtt://HOST:PORT or mqtts://HOST:PORT"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"invalid broker URL {url!r}: {error}; use {wanted}") from error
        if parts.username is not None:
            # the message does not repeat the URL, which may contain a password
            raise ConfigError(f"the broker's URL contains a user name or password: remove it and use {wanted}")
        extra = parts.path.strip("/") + parts.query + parts.fragment
        if parts.scheme not in PORTS or not parts.hostname or extra or port == 0:
            raise ConfigError(f"invalid broker URL {url!r}: use {wanted}")
        return cls(host=parts.hostname, port=port or PORTS[parts.scheme], tls=parts.scheme == "mqtts")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
