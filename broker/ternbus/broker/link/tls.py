"""The certificate files of a TLS connection: whom to believe, and who we are."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import check_secret

CA, CERTIFICATE, TLS_KEY = "ca.pem", "certificate.pem", "certificate.key"  # in a device's or aggregator's folder
PROBE: Final = "Probe"  # no device's name: the certificate with which we see whether our broker answers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """PEM files of a broker: whose certificates let a client in, and its own, with the key."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files: whom to believe (None: what the system believes) and, for mutual TLS, who we are."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> "Tls | None":
        """What the folder of a device or an aggregator has of these files; None where there is nothing to use."""
        ca, certificate, key = (
            path if (path := folder / name).exists() else None for name in (CA, CERTIFICATE, TLS_KEY)
        )
        return cls(ca=ca, certificate=certificate, key=key) if ca or certificate else None

    def context(self) -> ssl.SSLContext:
        """The context for a client; ConfigError names what cannot be read."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, check_secret(self.key) if self.key is not None else None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(file) for file in (self.ca, self.certificate, self.key) if file is not None)
            raise ConfigError(f"cannot use {files} for TLS: {error}") from error
        return context
