"""Who somebody is: names, Ed25519 keys, signatures, sealed boxes, and the proof that joins a device."""

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
FEDERATION_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}\Z")
PUBLIC_KEY = re.compile(r"[0-9a-fA-F]{64}\Z")
DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


def is_federation(name: str) -> bool:
    """Whether ``name`` may be a federation's name."""
    return FEDERATION_NAME.match(name) is not None


def is_device(name: str) -> bool:
    """Whether ``name`` may be a device's name; what begins with ``aggregator`` is taken."""
    return DEVICE_NAME.match(name) is not None and not name.startswith(AGGREGATOR)


def is_public_key(text: str) -> bool:
    """Whether ``text`` is an Ed25519 public key in 64 hex digits."""
    return PUBLIC_KEY.match(text) is not None


def check_federation(name: str) -> str:
    """Return ``name`` or raise ConfigError."""
    if not is_federation(name):
        raise ConfigError(f"{name!r} cannot name a federation: use 1 to 32 of a-z, 0-9 and '-', not beginning with '-'")
    return name


def check_device(name: str) -> str:
    """Return ``name`` or raise ConfigError."""
    if not is_device(name):
        raise ConfigError(
            f"{name!r} cannot name a device: use 1 to 64 of a-z, 0-9, '_' and '-', beginning with a letter or "
            "digit and not with 'aggregator'"
        )
    return name


def key_id(public: bytes) -> KeyId:
    """The first 8 bytes of BLAKE2b-256 of an Ed25519 public key."""
    return KeyId(blake2b(public, digest_size=32).digest()[:8])


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key pair, made from its 32-byte seed; the seed never shows in a repr."""

    seed: bytes = field(repr=False)
    _signing: nacl.signing.SigningKey = field(init=False, repr=False, compare=False)
    public: bytes = field(init=False)
    key_id: KeyId = field(init=False)

    def __post_init__(self) -> None:
        signing = nacl.signing.SigningKey(self.seed)
        object.__setattr__(self, "_signing", signing)
        object.__setattr__(self, "public", bytes(signing.verify_key))
        object.__setattr__(self, "key_id", key_id(self.public))

    @classmethod
    def generate(cls) -> "Identity":
        return cls(nacl.utils.random(32))

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature over ``message``."""
        return self._signing.sign(message).signature

    def unseal(self, box: bytes) -> bytes:
        """Open a libsodium sealed box made for this key (converted to X25519)."""
        try:
            return nacl.public.SealedBox(self._signing.to_curve25519_private_key()).decrypt(box)
        except (nacl.exceptions.CryptoError, ValueError, TypeError) as error:
            raise ProtocolError("bad-seal", "the sealed box does not open with the aggregator's key") from error


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Raise ProtocolError unless ``signature`` over ``message`` is by ``public``."""
    try:
        nacl.signing.VerifyKey(public).verify(message, signature)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError) as error:
        raise ProtocolError("bad-signature", "the signature does not verify") from error


def seal(public: bytes, plain: bytes) -> bytes:
    """A libsodium sealed box (X25519, XSalsa20-Poly1305) to the holder of the Ed25519 key ``public``."""
    box = nacl.public.SealedBox(nacl.signing.VerifyKey(public).to_curve25519_public_key())
    return box.encrypt(plain)


def enroll_proof(code: str, federation: str, device: str, public_key: bytes) -> bytes:
    """BLAKE2b-256, keyed with the invitation code, over what binds this key to this device of this federation."""
    parts = (b"ternbus/1 enroll", federation.encode(), device.encode(), public_key)
    return blake2b(b"\0".join(parts), digest_size=32, key=code.encode("utf-8")).digest()
