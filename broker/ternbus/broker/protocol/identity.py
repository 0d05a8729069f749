"""Who somebody is: names, Ed25519 keys, the files that keep secrets, and the proof that joins a device."""

import os
import re
import shlex
import stat
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NewType

import nacl.exceptions
import nacl.public
import nacl.signing
import nacl.utils

from ternbus.broker.errors import ConfigError, ProtocolError

KeyId = NewType("KeyId", bytes)

AGGREGATOR = "aggregator"
FEDERATION_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}\Z")
DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


def is_federation(name: str) -> bool:
    """Whether ``name`` may be a federation's name."""
    return FEDERATION_NAME.match(name) is not None


def is_device(name: str) -> bool:
    """Whether ``name`` may be a device's name; what begins with ``aggregator`` is taken."""
    return DEVICE_NAME.match(name) is not None and not name.startswith(AGGREGATOR)


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

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read a key file (64 hex digits, mode 0600)."""
        try:
            seed = bytes.fromhex(read_secret(path).decode("ascii").strip())
        except ValueError:
            seed = b""
        if len(seed) != 32:
            raise ConfigError(f"{path} is not a key file (64 hex digits); restore it from a backup")
        return cls(seed)

    def save(self, path: Path) -> None:
        write_secret(path, self.seed.hex().encode("ascii") + b"\n")

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


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all, and on stable storage when this returns."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_exposed(path: Path) -> bool:
    """Whether others on this machine can do anything with a file; OSError where there is none."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def check_secret(path: Path) -> Path:
    """Return the path of a secret; refuse one that others on this machine can read, with the command that mends it."""
    try:
        exposed = is_exposed(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if exposed:
        raise ConfigError(f"{path} holds a secret that other users can read; run: chmod 600 {shlex.quote(str(path))}")
    return path


def read_secret(path: Path) -> bytes:
    """Read a secret that only its owner can read, else ConfigError."""
    try:
        return check_secret(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def read_password(path: Path) -> str:
    """The first line of a password file, mode 0600; ConfigError where there is none."""
    password = read_secret(path).decode("utf-8", "replace").partition("\n")[0].rstrip("\r")
    if not password:
        raise ConfigError(f"{path} has no password in its first line")
    return password
