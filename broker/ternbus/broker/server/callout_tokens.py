"""The request and response tokens of nats-server's authorization callout.

A token is a JSON Web Token, signed with Ed25519. Keys are written as "nkeys": a prefix byte, the key and a checksum
(CRC-16/XMODEM) in base32.
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
    """A client that asks to connect. `chain` is its verified certificate chain as PEM, its own first, or empty."""

    server: str
    user: str
    kind: str
    client_id: str
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The name of an admitted client, the NATS subjects that it may publish and subscribe, and the end (Unix time)."""

    name: str
    write: Sequence[str]
    read: Sequence[str]
    until: int


def account_key(identity: Identity) -> str:
    """The public account key, which signs the responses, as an nkey for nats-server's configuration."""
    return _nkey(ACCOUNT_PREFIX + identity.public)


def user_key(identity: Identity) -> str:
    """The public key of the user that subscribes to the requests, as an nkey."""
    return _nkey(USER_PREFIX + identity.public)


def proof(identity: Identity, nonce: str) -> str:
    """The signature over the nonce in nats-server's INFO line, for CONNECT."""
    return _base64(identity.sign(nonce.encode()))


def _nkey(content: bytes) -> str:
    return base64.b32encode(content + binascii.crc_hqx(content, 0).to_bytes(2, "little")).decode().rstrip("=")


def question(token: str) -> Question:
    """Parse a request token. Its signature is not verified: it arrives on the connection to our own nats-server."""
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
        raise ProtocolError("bad-question", f"cannot parse nats-server's authorization request: {error!r}") from error


def welcome(identity: Identity, asked: Question, access: Access) -> str:
    """The response that admits the client with these permissions."""
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
    """The response that refuses the client; nats-server writes `why` into its log."""
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
