"""X.509 certificates: a private authority and the certificates it signs; the only module that imports `cryptography`.

All keys are Ed25519, all values PEM text. Every certificate is valid from 1970 on: a Raspberry Pi without a clock
battery starts with a date in the past, and must still accept the broker's certificate.
"""

import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.endpoint import WILDCARDS

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:  # an extra: devices do not need it
    raise ConfigError("certificates need the package cryptography; run: pip install 'ternbus[tls]'") from error

AUTHORITY: Final = "Ternbus broker"  # how the name of an authority of `ternbus broker init` begins
EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
AUTHORITY_DAYS: Final = 20 * 365
CLIENT_DAYS: Final = 10 * 365  # long, because renewal means a visit to the device; revocation does not depend on it
SERVER_DAYS: Final = 365  # short, because `broker up` renews it
LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The subject of a certificate, its federation (empty: none), who issued it, and its expiry date."""

    name: str
    federation: str
    issuer: str
    until: dt.datetime

    def days_left(self, now: dt.datetime) -> float:
        return (self.until - now) / dt.timedelta(days=1)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def read(pem: str, source: str) -> Named:
    """The subject and expiry date of a certificate; ConfigError, naming ``source``, for anything else."""
    certificate = _parse(pem, source)
    subject = certificate.subject
    return Named(
        name=_first(subject, NameOID.COMMON_NAME),
        federation=_first(subject, NameOID.ORGANIZATION_NAME),
        issuer=_first(certificate.issuer, NameOID.COMMON_NAME),
        until=certificate.not_valid_after_utc,
    )


def server_names(pem: str, source: str) -> list[str]:
    """The host names and addresses of a server's certificate, in its order."""
    names = _parse(pem, source).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def check_host(name: str) -> str:
    """Return ``name`` if it is a host name or an IP address that clients can connect to, else raise ConfigError."""
    if name in WILDCARDS or (_address(name) is None and not HOST_NAME.match(name)):
        raise ConfigError(f"invalid broker name {name!r}: use a host name or address that devices can connect to")
    return name


class Authority:
    """A certificate authority with its key."""

    def __init__(self, pair: Pair) -> None:
        """ConfigError if the key cannot be used or does not belong to the certificate."""
        self.pair = pair
        self._certificate = _parse(pair.certificate, "the authority's certificate")
        self._key = _private(pair.key)
        if self._key.public_key() != self._certificate.public_key():
            raise ConfigError("ca.key does not belong to ca.pem; restore both from one backup")

    @classmethod
    def create(cls, name: str) -> Self:
        return cls(_self_signed(name, Ed25519PrivateKey.generate()))

    def renewed(self) -> Self:
        """The same authority and key with a later expiry date; certificates that it signed stay valid."""
        return type(self)(_self_signed(_first(self._certificate.subject, NameOID.COMMON_NAME), self._key))

    def server(self, names: Sequence[str]) -> Pair:
        """A server's certificate for host names and addresses; the first is the common name."""
        key = Ed25519PrivateKey.generate()
        known = [x509.DNSName(name) if (ip := _address(name)) is None else x509.IPAddress(ip) for name in names]
        builder = self._begin(_name(names[0][:64]), key.public_key(), SERVER_DAYS, ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.SubjectAlternativeName(known), critical=False)
        return Pair(certificate=self._sign(builder), key=_pem(key))

    def client(self, name: str, federation: str) -> Pair:
        """A client's certificate, common name ``name``, organization ``federation``, with a new key."""
        key = Ed25519PrivateKey.generate()
        return Pair(certificate=self._client(name, federation, key.public_key()), key=_pem(key))

    def client_again(self, pem: str) -> str:
        """The client's certificate with a later expiry date, for the same key."""
        named, public = read(pem, "a client's certificate"), _parse(pem, "a client's certificate").public_key()
        if not isinstance(public, Ed25519PublicKey):
            raise ConfigError(f"the key in the certificate of {named.name} is not Ed25519; issue a new certificate")
        return self._client(named.name, named.federation, public)

    def _client(self, name: str, federation: str, public: Ed25519PublicKey) -> str:
        subject = _name(name, federation)
        return self._sign(self._begin(subject, public, CLIENT_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH))

    def _begin(
        self, subject: x509.Name, public: Ed25519PublicKey, days: int, use: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        until = min(now() + dt.timedelta(days=days), self._certificate.not_valid_after_utc)
        key_usage = _key_usage(digital_signature=True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(subject, self._certificate.subject, public, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(issuer, critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> str:
        return _text(builder.sign(self._key, algorithm=None))


def _self_signed(name: str, key: Ed25519PrivateKey) -> Pair:
    subject = _name(name)
    until = now() + dt.timedelta(days=AUTHORITY_DAYS)
    builder = (
        _builder(subject, subject, key.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(digital_signature=False), critical=True)
    )
    return Pair(certificate=_text(builder.sign(key, algorithm=None)), key=_pem(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Ed25519PublicKey, until: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(EPOCH)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _key_usage(*, digital_signature: bool) -> x509.KeyUsage:
    """The usage of a key: to sign TLS handshakes, otherwise to sign certificates and revocation lists."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=not digital_signature,
        crl_sign=not digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str, organization: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(parts)


def _first(name: x509.Name, kind: x509.ObjectIdentifier) -> str:
    found = name.get_attributes_for_oid(kind)
    return str(found[0].value) if found else ""


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def _parse(pem: str, source: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise ConfigError(f"{source} is not a certificate: {error}") from error


def _private(pem: str) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError("cannot read the authority's key ca.key; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("the authority's key ca.key is not an Ed25519 key; restore it from a backup")
    return key


def _text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _pem(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode("ascii")
