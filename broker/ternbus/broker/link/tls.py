"""The certificate files of a TLS connection, and the SSL context of a client."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import check_secret

CA, CERTIFICATE, TLS_KEY = "ca.pem", "certificate.pem", "certificate.key"  # in a device's or aggregator's folder
PROBE: Final = (
    "Probe"  # client id and certificate name of the readiness test of `ternbus broker up`; not a valid device name
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """PEM files of a broker: the authority of its clients' certificates, and its own certificate and key."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files of a client: trusted authority (None: the system's) and, for mutual TLS, own certificate and key."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> "Tls | None":
        """The files in the folder of a device or an aggregator; None if it has no certificate."""
        ca, certificate, key = (
            path if (path := folder / name).exists() else None for name in (CA, CERTIFICATE, TLS_KEY)
        )
        return cls(ca=ca, certificate=certificate, key=key) if ca or certificate else None

    def context(self) -> ssl.SSLContext:
        """The SSL context for a client; ConfigError, which names the files, if they cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            # Python 3.13 made it strict: it refuses an authority without key usage, as mosquitto's own page makes one
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, check_secret(self.key) if self.key is not None else None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(file) for file in (self.ca, self.certificate, self.key) if file is not None)
            raise ConfigError(f"cannot use {files} for TLS: {error}; check these files") from error
        return context
