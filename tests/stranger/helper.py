"""A helper of private sums after section 16.7 of docs/protocol.md: what it answers to asks, and what it keeps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nacl.signing import SigningKey

from stranger import sums
from stranger.sums import Layout
from stranger.wire import Frame, RefusedError

Member = tuple[bytes, Frame]


class RefusalError(Exception):
    """An ask is refused: with a word, and the devices whose update is at fault."""

    def __init__(self, word: str, updates: Iterable[str] = ()) -> None:
        """Say why, and whose."""
        super().__init__(word)
        self.word = word
        self.updates = sorted(set(updates))


@dataclass
class Helper:
    """What a helper has on disk."""

    federation: str
    signing: SigningKey
    secret: bytes  # of its box key
    number: int  # likewise
    least: int = 2  # its own `min`
    own_roster: bool = False
    count: int = 0
    stopped: bool = False
    states: dict[bytes, str] = field(default_factory=dict)
    used: dict[tuple[str, int], bytes] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    names: dict[bytes, str] = field(default_factory=dict)

    def admit(self, device: str, public: bytes) -> None:
        """Put a device on the roster."""
        self.keys[device], self.names[public] = public, device

    def answer(self, meta: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Answer an ask; None, and never again anything, where this state is an old copy."""
        if self.stopped or meta["count"] > self.count:
            self.stopped = True
            return None
        name = meta["set"]
        try:
            outcome, masks = self._step(meta["step"], name, body)
        except RefusalError as error:
            refused = {"outcome": "refused", "set": name, "count": self.count, "reason": error.word}
            return {**refused, "updates": error.updates[:50]}, b""
        return {"outcome": outcome, "set": name, "count": self.count}, masks

    def _step(self, step: str, name: bytes, body: bytes) -> tuple[str, bytes]:
        state = self.states.get(name)
        if step == "abandon":
            if state == "opened":
                raise RefusalError("opened")
            if state != "abandoned":
                self._write(name, "abandoned")
                self.used = {update: at for update, at in self.used.items() if at != name}
            return "abandoned", b""
        if state == "abandoned":
            raise RefusalError("abandoned")
        context, version, layout, members, seeds = self._check(name, body)
        if step == "prepare":
            if state is None:
                self._write(name, "prepared")
                self.used |= {(device, version): name for device in members}
                if not self.own_roster:
                    for device, (public, _) in members.items():
                        self.admit(device, public)
            return "prepared", b""
        if state is None:
            raise RefusalError("not-prepared")
        if state == "prepared":
            self._write(name, "opened")
        total, own = bytes(layout.length), bytes(self.signing.verify_key)
        for device, (public, _) in members.items():
            total = layout.add(total, sums.mask_of(layout, seeds[device], context, public, own))
        return "opened", total

    def _write(self, name: bytes, state: str) -> None:
        self.states[name] = state
        self.count += 1

    def _check(self, name: bytes, body: bytes) -> tuple[bytes, int, Layout, dict[str, Member], dict[str, bytes]]:
        """All checks of the table, in its order."""
        try:
            ask = sums.read_ask(body)
        except RefusedError as error:
            raise RefusalError("bad") from error
        if ask.terms["kind"] != "mask":
            raise RefusalError("bad-terms")
        place = self._place(ask.terms)
        members = self._members(ask.rows)
        if sums.set_digest(ask.context, {device: frame.header for device, (_, frame) in members.items()}) != name:
            raise RefusalError("wrong-set")
        n = len(members)
        if self.states.get(name) != "opened":
            if n < max(self.least, ask.terms["min"]):
                raise RefusalError("too-few")
            if n * ask.terms["levels"] > 2 ** (ask.terms["bits"] - 1) - 1:
                raise RefusalError("too-many")
            self._records(name, ask.context, ask.version, members)
        seeds = {device: self._seed(ask, place, *member) for device, member in members.items()}
        if missing := [device for device, seed in seeds.items() if not seed]:
            raise RefusalError("bad-box", missing)
        return ask.context, ask.version, ask.layout, members, seeds

    def _seed(self, ask: sums.Ask, place: int, public: bytes, frame: Frame) -> bytes:
        """The seed in the helper's own box; nothing where it is none."""
        boxes, own = frame.meta["boxes"], bytes(self.signing.verify_key)
        if len(boxes) != len(ask.terms["helpers"]):
            return b""
        try:
            return sums.open_box(self.secret, boxes[place], sums.bound(ask.context, public, own, frame.seq))
        except RefusedError:
            return b""

    def _place(self, terms: Mapping[str, Any]) -> int:
        for place, (content, signature) in enumerate(terms["helpers"]):
            card = sums.read_card(content, signature)
            if card["public"] == bytes(self.signing.verify_key):
                if (card["number"], card["box_key"]) != (self.number, sums.public_of(self.secret)):
                    raise RefusalError("old-card")
                return place
        raise RefusalError("foreign-terms")

    def _members(self, rows: list[list[bytes]]) -> dict[str, Member]:
        found: dict[str, Member] = {}
        for public, header, signature in rows:
            try:
                frame = sums.read_member(public, header, signature, self.federation)
            except RefusedError as error:
                raise RefusalError("bad") from error
            if frame.sender in found or public in {key for key, _ in found.values()}:
                raise RefusalError("twice")
            found[frame.sender] = public, frame
        return found

    def _records(self, name: bytes, context: bytes, version: int, members: Mapping[str, Member]) -> None:
        """Look at each member; the word is that of the first one at fault."""
        faults: dict[str, str] = {}
        for device, (public, frame) in members.items():
            if self.names.get(public, device) != device:
                faults[device] = "key-of-another"
            elif self.own_roster and self.keys.get(device) != public:
                faults[device] = "not-admitted"
            elif (frame.meta["context"], frame.meta["base"]) != (context, version):
                faults[device] = "other-context"
            elif frame.meta["min"] > len(members):
                faults[device] = "too-few"
            elif self.used.get((device, version), name) != name:
                faults[device] = "repeated"
        if faults:
            raise RefusalError(next(iter(faults.values())), faults)
