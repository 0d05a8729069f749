"""The tokens of nats-server's authorization callout: what it asks, and what it takes for an answer.

A token is a JSON Web Token, signed with Ed25519; its keys are written as "nkeys": a prefix byte, the key and a checksum
(CRC-16 of XMODEM) in base32.
"""

import base64
import binascii
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import Identity

ACCOUNT_PREFIX: Final = b"\0"
USER_PREFIX: Final = b"\xa0"
GLOBAL_ACCOUNT: Final = "$G"
HEADER: Final = {"typ": "JWT", "alg": "ed25519-nkey"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """May this client come in? `chain` is its certificate's PEM and those above it, verified; empty without one."""

    server: str
    user: str
    kind: str
    client_id: str
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Whom the client turned out to be, and the NATS subjects that it may write and read, until when (Unix time)."""

    name: str
    write: Sequence[str]
    read: Sequence[str]
    until: int


def account_key(identity: Identity) -> str:
    """The public key of who signs answers, as nats-server's configuration wants it."""
    return _nkey(ACCOUNT_PREFIX + identity.public)


def user_key(identity: Identity) -> str:
    """The same for who connects to hear the questions."""
    return _nkey(USER_PREFIX + identity.public)


def proof(identity: Identity, nonce: str) -> str:
    """What a user with a key answers to the nonce with which nats-server greets it."""
    return _base64(identity.sign(nonce.encode()))


def _nkey(content: bytes) -> str:
    return base64.b32encode(content + binascii.crc_hqx(content, 0).to_bytes(2, "little")).decode().rstrip("=")


def question(token: str) -> Question:
    """Take a question apart. Its signature is not looked at: it comes from our own nats-server's socket."""
    try:
        claims = json.loads(_from_base64(token.split(".")[1]))["nats"]
        client, tls = claims["client_info"], claims.get("client_tls") or {}
        chains = tls.get("verified_chains") or [[]]
        return Question(
            server=claims["server_id"]["id"],
            user=claims["user_nkey"],
            kind=client.get("type", ""),
            client_id=client.get("mqtt_id", ""),
            chain=tuple(chains[0]),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ProtocolError("bad-question", f"nats-server asks what we do not understand: {error!r}") from error


def welcome(identity: Identity, asked: Question, access: Access) -> str:
    """Let it in, as `access` says."""
    user = {
        "name": access.name,
        "aud": GLOBAL_ACCOUNT,
        "exp": access.until,
        "nats": {
            "pub": _only(access.write),
            "sub": _only(access.read),
            "subs": -1,
            "data": -1,
            "payload": -1,
            "allowed_connection_types": ["MQTT"],
            "type": "user",
            "version": 2,
        },
    }
    return _answer(identity, asked, {"jwt": _signed(identity, asked.user, user)})


def refusal(identity: Identity, asked: Question, why: str) -> str:
    """Keep it out; nats-server writes `why` into its log."""
    return _answer(identity, asked, {"error": why})


def _only(subjects: Sequence[str]) -> dict[str, Any]:
    return {"allow": list(subjects)} if subjects else {"deny": [">"]}


def _answer(identity: Identity, asked: Question, content: Mapping[str, str]) -> str:
    about = {"type": "authorization_response", "version": 2}
    return _signed(identity, asked.user, {"aud": asked.server, "nats": {**content, **about}})


def _signed(identity: Identity, subject: str, claims: Mapping[str, Any]) -> str:
    whole = {
        "jti": secrets.token_hex(16),
        "iat": int(time.time()),
        "iss": account_key(identity),
        "sub": subject,
        **claims,
    }
    text = f"{_base64(json.dumps(HEADER).encode())}.{_base64(json.dumps(whole).encode())}"
    return f"{text}.{_base64(identity.sign(text.encode()))}"


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _from_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
