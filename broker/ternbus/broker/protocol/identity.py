"""Identities: names, Ed25519 keys, signatures, sealed boxes, and the proof with which a device enrolls."""

import re
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NewType

import nacl.exceptions
import nacl.public
import nacl.signing
import nacl.utils

from ternbus.broker.errors import ConfigError, ProtocolError

KeyId = NewType("KeyId", bytes)

AGGREGATOR = "aggregator"
HELPER_USER = "aggregator_help_"  # begins no device's name, and no federation's user: those have no underscore
READER_USER = "aggregator_read_"  # likewise
HELPER_NAME_MAX = 48  # with HELPER_USER or READER_USER in front it still is the common name of a certificate
FEDERATION_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}\Z")
PUBLIC_KEY = re.compile(r"[0-9a-fA-F]{64}\Z")
DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


def is_federation(name: str) -> bool:
    """Whether ``name`` is a valid name of a federation."""
    return FEDERATION_NAME.match(name) is not None


def is_device(name: str) -> bool:
    """Whether ``name`` is a valid name of a device; names that begin with ``aggregator`` are reserved."""
    return DEVICE_NAME.match(name) is not None and not name.startswith(AGGREGATOR)


def is_public_key(text: str) -> bool:
    """Whether ``text`` is an Ed25519 public key in 64 hex digits."""
    return PUBLIC_KEY.match(text) is not None


def check_federation(name: str) -> str:
    """Return ``name`` or raise ConfigError."""
    if not is_federation(name):
        raise ConfigError(
            f"invalid federation name {name!r}: use 1 to 32 of a-z, 0-9 and '-', with a letter or digit first"
        )
    return name


def check_device(name: str) -> str:
    """Return ``name`` or raise ConfigError."""
    if not is_device(name):
        raise ConfigError(
            f"invalid device name {name!r}: use 1 to 64 of a-z, 0-9, '_' and '-', with a letter or digit first; "
            "a name must not begin with 'aggregator'"
        )
    return name


def is_helper_user(name: str) -> bool:
    """Whether ``name`` is the MQTT user name of a helper."""
    return name.startswith(HELPER_USER) and is_helper(name.removeprefix(HELPER_USER))


def helper_user(helper: str) -> str:
    """The MQTT user name and client id of a helper, and the common name of its certificate."""
    return f"{HELPER_USER}{helper}"


def is_reader_user(name: str) -> bool:
    """Whether ``name`` is the MQTT user name of a reader, who is shown the federation and takes no part in it."""
    return name.startswith(READER_USER) and is_helper(name.removeprefix(READER_USER))


def reader_user(reader: str) -> str:
    """The MQTT user name and client id of a reader, and the common name of its certificate."""
    return f"{READER_USER}{reader}"


def check_reader(name: str) -> str:
    """Return ``name`` or raise ConfigError; readers are named as helpers are."""
    if not is_helper(name):
        raise ConfigError(
            f"invalid reader name {name!r}: use 1 to {HELPER_NAME_MAX} of a-z, 0-9, '_' and '-', with a letter or "
            "digit first; a name must not begin with 'aggregator'"
        )
    return name


def is_helper(name: str) -> bool:
    """Whether ``name`` is a valid name of a helper; helpers and devices may have the same names."""
    return is_device(name) and len(name) <= HELPER_NAME_MAX


def check_helper(name: str) -> str:
    """Return ``name`` or raise ConfigError."""
    if not is_helper(name):
        raise ConfigError(
            f"invalid helper name {name!r}: use 1 to {HELPER_NAME_MAX} of a-z, 0-9, '_' and '-', with a letter or "
            "digit first; a name must not begin with 'aggregator'"
        )
    return name


def key_id(public: bytes) -> KeyId:
    """The first 8 bytes of BLAKE2b-256 of an Ed25519 public key."""
    return KeyId(blake2b(public, digest_size=32).digest()[:8])


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key pair, derived from its 32-byte seed; its repr does not contain the seed."""

    seed: bytes = field(repr=False)
    _signing: nacl.signing.SigningKey = field(init=False, repr=False, compare=False)
    public: bytes = field(init=False)
    key_id: KeyId = field(init=False)
    _box: list[nacl.public.SealedBox[nacl.public.PrivateKey]] = field(
        init=False, repr=False, compare=False
    )  # empty until one is opened

    def __post_init__(self) -> None:
        signing = nacl.signing.SigningKey(self.seed)
        object.__setattr__(self, "_signing", signing)
        object.__setattr__(self, "public", bytes(signing.verify_key))
        object.__setattr__(self, "key_id", key_id(self.public))
        object.__setattr__(self, "_box", [])

    @classmethod
    def generate(cls) -> "Identity":
        return cls(nacl.utils.random(32))

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature over ``message``."""
        return self._signing.sign(message).signature

    def unseal(self, box: bytes) -> bytes:
        """Decrypt a libsodium sealed box for this key (converted to X25519); ProtocolError if that fails."""
        try:
            if not self._box:
                self._box.append(nacl.public.SealedBox(self._signing.to_curve25519_private_key()))
            return self._box[0].decrypt(box)
        except (nacl.exceptions.CryptoError, ValueError, TypeError) as error:
            raise ProtocolError("bad-seal", "the aggregator's key does not decrypt the sealed box") from error


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Raise ProtocolError unless ``signature`` is the signature of ``public`` over ``message``."""
    try:
        nacl.signing.VerifyKey(public).verify(message, signature)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError) as error:
        raise ProtocolError("bad-signature", "the signature is not valid") from error


def seal(public: bytes, plain: bytes) -> bytes:
    """A libsodium sealed box (X25519, XSalsa20-Poly1305) for the holder of the Ed25519 key ``public``."""
    box = nacl.public.SealedBox(nacl.signing.VerifyKey(public).to_curve25519_public_key())
    return box.encrypt(plain)


def enroll_proof(code: str, federation: str, device: str, public_key: bytes) -> bytes:
    """BLAKE2b-256, keyed with the invitation code, over the federation, the device and its public key."""
    parts = (b"ternbus/1 enroll", federation.encode(), device.encode(), public_key)
    return blake2b(b"\0".join(parts), digest_size=32, key=code.encode("utf-8")).digest()
