"""Frames of private sums after section 16 of docs/protocol.md: a helper's own, and a device's update."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
from nacl.signing import SigningKey, VerifyKey

from stranger import sums, wire
from stranger.helper import Helper
from stranger.sums import Tensor
from stranger.wire import RefusedError

Sent = tuple[str, bytes, bool]  # kind, frame, whether it is retained


@dataclass
class HelperNode:
    """A helper as the broker sees it; it answers frames with frames."""

    name: str
    code: str
    aggregator: bytes
    helper: Helper
    roster: str = "aggregator"
    seq: int = 1
    session: int = 0
    enrolled: bool = False
    assembly: wire.Assembly = field(default_factory=wire.Assembly)

    @property
    def public(self) -> bytes:
        """Its Ed25519 key."""
        return bytes(self.helper.signing.verify_key)

    def connect(self) -> list[Sent]:
        """What it says when the broker has accepted it."""
        self.session += 1
        if self.enrolled:
            return self._present()
        body = wire.enroll_body(self.code, self.helper.federation, self.name, self.public)
        return [("enroll", self._frame("enroll", {"public_key": self.public}, body, seq=1)[0], False)]

    def take(self, kind: str, payload: bytes) -> list[Sent]:
        """What it says to a frame on its topic of this kind."""
        frame = wire.parse_frame(payload)
        if (frame.kind, frame.sender, frame.federation) != (kind, "aggregator", self.helper.federation):
            raise RefusedError(3, "the frame and its topic disagree")
        if frame.key != wire.key_id(self.aggregator):
            raise RefusedError(4, "unknown key")
        VerifyKey(self.aggregator).verify(wire.SIGNED + frame.header, frame.signature)
        if frame.digest != wire.digest(frame.body):
            raise RefusedError(6, "body digest")
        if kind == "receipt":
            about = (frame.meta["device"], frame.meta["device_key"], frame.meta["seq"], frame.meta["outcome"])
            if about != (self.name, wire.key_id(self.public), 1, "enrolled") or self.enrolled:
                return []
            self.enrolled = True
            return self._present()
        body = self.assembly.add(frame)
        answer = None if body is None else self.helper.answer(frame.meta, body)
        if answer is None:
            return []
        meta, masks = answer
        return [("answer", each, False) for each in self._frame("answer", meta, masks)]

    def _present(self) -> list[Sent]:
        card = {
            "federation": self.helper.federation,
            "helper": self.name,
            "public": self.public,
            "box_key": sums.public_of(self.helper.secret),
            "number": self.helper.number,
            "roster": self.roster,
            "min": self.helper.least,
        }
        content = msgpack.packb(card)
        signature = self.helper.signing.sign(sums.CARD + content).signature
        status = {"state": "online", "session": self.session, "base": -1, "software": "a stranger"}
        status["count"] = self.helper.count
        return [
            ("card", self._frame("card", {}, content + signature)[0], True),
            ("status", self._frame("status", status, b"")[0], True),
        ]

    def _frame(self, kind: str, meta: Mapping[str, Any], body: bytes, *, seq: int | None = None) -> list[bytes]:
        self.seq += 1
        about: dict[str, Any] = {"kind": kind, "federation": self.helper.federation, "sender": self.name}
        number = self.seq if seq is None else seq
        return wire.make_frames(self.helper.signing, **about, seq=number, meta=meta, body=body)


@dataclass(frozen=True)
class Version:
    """What a device has of a version: its head's frame, and the parts of its terms, as the broker retained them."""

    head: wire.Frame
    terms: bytes

    @classmethod
    def read(cls, head: bytes, terms: Sequence[bytes], aggregator: bytes, federation: str) -> "Version":
        """Check the frames, and that the plan names these terms."""
        about: dict[str, Any] = {"federation": federation, "sender": "aggregator", "public": aggregator}
        frame = wire.check_frame(head, kind="head", **about)
        assembly, content = wire.Assembly(), None
        for part in map(wire.parse_frame, terms):
            VerifyKey(aggregator).verify(wire.SIGNED + part.header, part.signature)
            content = assembly.add(part)
        plan = frame.meta["plan"]
        if content is None or plan.get("codec") != "private" or plan.get("terms") != wire.digest(content):
            raise RefusedError(7, "the plan names other terms")
        if plan.get("schema") != frame.meta["schema"]:
            raise RefusedError(7, "the plan names another schema")
        return cls(frame, content)

    @property
    def context(self) -> bytes:
        """The context of updates on it."""
        meta = self.head.meta
        plan = wire.digest(sums.plan_bytes(self.head.meta_bytes))
        return sums.context_of(meta["version"], meta["digest"], plan, wire.digest(self.terms))


def make_update(
    signing: SigningKey,
    device: str,
    seq: int,
    version: Version,
    tensors: Sequence[tuple[str, list[float]]],
    *,
    aggregator: bytes,
    least: int,
    draw: Callable[[], float],
    fresh: Callable[[int], bytes],
) -> tuple[list[bytes], list[int]]:
    """The frames of an update of these (role, change), and its values, which never leave a real device."""
    terms, layout = sums.read_terms(version.terms)
    scales = [each for (each,) in struct.iter_unpack("<f", terms["scales"])]
    scaled: list[Tensor] = [(role, scale, u) for (role, u), scale in zip(tensors, scales, strict=True)]
    values = sums.values_of(scaled, terms["levels"], 255, 0.0, draw)
    words = layout.write(values)
    public, sent, boxes = bytes(signing.verify_key), words, []
    for content, signature in terms["helpers"]:
        card = sums.read_card(content, signature)
        seed = sums.seed_of(words, fresh(32))
        sent = layout.add(sent, sums.mask_of(layout, seed, version.context, public, card["public"]))
        plain = sums.bound(version.context, public, card["public"], seq) + seed
        boxes.append(sums.make_box(card["box_key"], plain))
    meta = {
        "base": version.head.meta["version"],
        "samples": 1,
        "codec": "private",
        "encoding": "raw",
        "sealed": True,
        "metrics": {},
        "context": version.context,
        "min": least,
        "boxes": boxes,
    }
    body = wire.seal(sent, wire.key_id(public), seq, aggregator)
    federation = version.head.federation
    return wire.make_frames(
        signing, kind="update", federation=federation, sender=device, seq=seq, meta=meta, body=body
    ), values
