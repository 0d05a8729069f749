"""Where a broker listens: its URL taken apart, the certificates for TLS, and in words why it does not answer."""

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from broker.errors import ConfigError

PORTS: Final = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files: whom to believe (None: what the system believes) and, for mutual TLS, who we are."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The context for a client; ConfigError names what cannot be read."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot use {self.ca}, {self.certificate}, {self.key} for TLS: {error}") from error
        return context


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

    def silence(self, error: OSError) -> str:
        """One sentence on why nobody answers here, and what to do."""
        nobody = f"no broker answers at {self}"
        match error:
            case ConnectionRefusedError():
                return f"{nobody}: connection refused; start one with `ternbus broker up`"
            case socket.gaierror():
                return f"{nobody}: no machine of the name {self.host} is known; check the broker's URL"
            case TimeoutError():
                return f"{nobody} in time; check its URL, the network and the firewall"
            case ssl.SSLCertVerificationError():
                return f"the broker at {self} shows a certificate that is not to be believed: {error.verify_message}"
            case ssl.SSLError():
                return f"the broker at {self} and we do not agree on TLS: {error.reason or error}"
            case _:
                return f"{nobody}: {error.strerror or error}"
