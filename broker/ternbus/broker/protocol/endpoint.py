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


def check_login(url: str, password_file: object, *, no_tls: bool) -> None:
    """Raise ConfigError for a command whose `--password-file` or `--no-tls` does not go with the broker's URL."""
    endpoint = Endpoint.parse(url)
    if no_tls and endpoint.tls:
        raise ConfigError(f"--no-tls given for {endpoint}, a URL with TLS: leave --no-tls out")
    if password_file:
        endpoint.check_password(no_tls=no_tls)


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

    def check_password(self, *, no_tls: bool, switch: str = "--no-tls") -> None:
        """Raise ConfigError if a password for this broker would be sent unencrypted, and its owner did not allow that.

        ``switch`` is how the owner allows it where the password is set.
        """
        if not (no_tls or self.tls or is_loopback(self.host)):
            raise ConfigError(
                f"a password for {self} would be sent unencrypted: use mqtts://, or {switch} if you trust everyone on "
                "the network"
            )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
