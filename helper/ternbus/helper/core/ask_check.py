"""Every check of an ask, before anything of it is used: all or nothing (docs/protocol.md, section 16).

Each check answers an attack. Two sets that share an update, a set of one device beside others that are known, and a
device in other company under another model would each single out what one device sent.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import is_device
from ternbus.broker.protocol.messages import Update
from ternbus.broker.sums import masks
from ternbus.broker.sums.bfv import Slots
from ternbus.broker.sums.sets import NAMED_MAX, Ask, SetMember, first_part, set_digest
from ternbus.broker.sums.terms import OWN
from ternbus.broker.sums.words import Layout, Words
from ternbus.helper.core.profile import Profile
from ternbus.helper.core.records import OPENED, Records
from ternbus.helper.core.state import BoxKey

ANSWER_BYTES_MAX: Final = 2**29  # of a sum: a helper may be a small machine


class AskRefusedError(Exception):
    """Why an ask is refused: ``reason`` is a short constant, ``text`` tells more, ``updates`` are devices' names."""

    def __init__(self, reason: str, text: str = "", updates: Iterable[str] = ()) -> None:
        super().__init__(f"{reason}: {text}" if text else reason)
        self.reason = reason
        self.updates = tuple(updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedMember:
    """An update of a set, with the seed of its mask for this helper."""

    device: str
    public: bytes
    header: bytes  # digest
    seed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAsk:
    """An ask that may be answered. ``members`` are in the order of their names."""

    digest: bytes
    context: bytes
    base: int
    layout: Layout
    members: tuple[CheckedMember, ...]
    sum: bytes = field(default=b"", repr=False)  # of the kind `bfv`: what is to be decrypted

    def opened(self, profile: Profile) -> bytes:
        """What a helper answers: the sum of the masks, or the decrypted sum of ciphertexts."""
        if profile.bfv is None:
            return self.sum_of_masks(profile.identity.public).tobytes()
        try:
            return profile.bfv.decrypt(Slots(self.layout), self.sum)
        except ProtocolError as error:
            raise AskRefusedError("bad-sum", str(error)) from None

    def sum_of_masks(self, helper: bytes) -> Words:
        """The sum of the members' masks for the helper with this public key."""
        about = {"context": self.context, "helper": helper}
        return self.layout.sum(masks.mask(self.layout, each.seed, device=each.public, **about) for each in self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class AskCheck:
    """What an ask is checked against."""

    profile: Profile
    box_keys: Sequence[BoxKey]
    records: Records

    def check(self, content: bytes, asked: bytes) -> CheckedAsk:
        """The set in the body of an ask, whose message names it ``asked``; AskRefusedError if it may not be opened.

        Of a set that was opened already only the content counts: it gets the same answer.
        """
        try:
            ask = Ask.parse(content)
            terms = ask.parsed_terms
        except ProtocolError as error:
            raise AskRefusedError(error.reason, error.detail) from None
        layout, size = terms.layout, len(ask.members)
        if terms.kind != self.profile.kind or 8 * layout.words > ANSWER_BYTES_MAX:
            raise AskRefusedError("bad-terms", "this helper opens no such sums")
        place, key = self._own_place(ask)
        members = self._members(ask)
        digest = set_digest(ask.context, {name: member.digest for name, (member, _, _) in members.items()})
        if digest != asked:
            raise AskRefusedError("wrong-set", "the members and the context have another digest")
        if self.records.state_of(digest) != OPENED:
            if size < (least := max(self.profile.min, terms.min)):
                raise AskRefusedError("too-few", f"{size} updates; at least {least} are wanted")
            if size > terms.devices_max:
                raise AskRefusedError("too-many", f"{size} updates; the bits hold {terms.devices_max}")
            _refuse(self._fault(digest, ask, each) for each in members.values())
        found, faults = [], []
        for name in sorted(members):
            member = members[name][0]
            try:
                seed = self._seed(ask, members[name], place, key)
            except ProtocolError as error:
                faults.append((error.reason, name))
            else:
                found.append(CheckedMember(device=name, public=member.public, header=member.digest, seed=seed))
        _refuse(faults)
        return CheckedAsk(
            digest=digest, context=ask.context, base=ask.version, layout=layout, members=tuple(found), sum=ask.sum
        )

    def _own_place(self, ask: Ask) -> tuple[int, BoxKey]:
        """The place of the helper's own card in the terms, and the box key that the card states."""
        for place, signed in enumerate(ask.parsed_terms.helpers):
            if signed.card.public == self.profile.identity.public:
                if signed.card.roster == OWN != self.profile.roster:
                    raise AskRefusedError("old-card", "this helper has no roster of its own any more")
                for key in self.box_keys:
                    if (key.number, key.public) == (signed.card.number, signed.card.box_key):
                        return place, key
                raise AskRefusedError("old-card", f"box key {signed.card.number} is not kept")
        raise AskRefusedError("foreign-terms", "this helper's card is not in the terms")

    def _members(self, ask: Ask) -> dict[str, tuple[SetMember, Frame, Update]]:
        """The members by name, all authentic, each device and each key once."""
        found: dict[str, tuple[SetMember, Frame, Update]] = {}
        faults: list[tuple[str, str]] = []
        for member in ask.members:
            try:
                frame, update = first_part(member, self.profile.federation)
            except ProtocolError as error:
                faults.append((error.reason, _name_in(member)))
                continue
            if frame.sender in found:
                faults.append(("twice", frame.sender))
            found[frame.sender] = member, frame, update
        keys = Counter(member.public for member, _, _ in found.values())
        faults += [("twice", name) for name, (member, _, _) in found.items() if keys[member.public] > 1]
        _refuse(faults)
        return found

    def _fault(self, digest: bytes, ask: Ask, entry: tuple[SetMember, Frame, Update]) -> tuple[str, str] | None:
        """Why an update may not be in this set, and its device."""
        member, frame, update = entry
        device = frame.sender
        known, active = self.records.device_of(member.public), self.records.key_of(device)
        used = self.records.used_in(device, ask.version)
        if known not in {None, device}:
            reason = "key-of-another"
        elif self.profile.roster == OWN and active != member.public:
            reason = "not-admitted"
        elif (update.context, update.base) != (ask.context, ask.version):
            reason = "other-context"
        elif update.min > len(ask.members):
            reason = "too-few"
        elif used not in {None, digest}:
            reason = "repeated"
        else:
            return None
        return reason, device

    def _seed(self, ask: Ask, entry: tuple[SetMember, Frame, Update], place: int, key: BoxKey) -> bytes:
        member, frame, update = entry
        if len(update.boxes) != len(ask.parsed_terms.helpers):
            raise ProtocolError("bad-box", "not one box for each helper of the terms")
        return masks.open_box(
            key.secret,
            update.boxes[place],
            context=ask.context,
            device=member.public,
            helper=self.profile.identity.public,
            seq=frame.seq,
        )


def _refuse(found: Iterable[tuple[str, str] | None]) -> None:
    """Raise AskRefusedError for all faults (reason, device) together, if there is any; the first gives the reason."""
    faults = [each for each in found if each is not None]
    if not faults:
        return
    reason, first = faults[0]
    names = sorted({name for _, name in faults if name})[:NAMED_MAX]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise AskRefusedError(reason, f"the update of {first or 'a device'}{more}", names)


def _name_in(member: SetMember) -> str:
    """The device that a header names which is not authentic; "" if it names none."""
    try:
        sender = member.frame().sender
    except ProtocolError:
        return ""
    return sender if is_device(sender) else ""
