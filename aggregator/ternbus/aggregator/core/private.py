"""Private sums in the aggregator's core: what helpers send, and when terms begin (docs/protocol.md, section 16)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Action, Log, MessageArrived, Save
from ternbus.aggregator.core.rate_limit import BURST_S, MINUTE_S, TokenBucket
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import Invited, Registry, check_code, key_in
from ternbus.aggregator.core.set_merging import EMPTY_EVERY_S, SetMerging
from ternbus.aggregator.core.sets import Held
from ternbus.aggregator.core.terms import PrivateTerms
from ternbus.aggregator.core.versions import Versions
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums.helper import Helper
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, header_bytes, parse
from ternbus.broker.protocol.messages import CLOSED, Enroll, Receipt, Status
from ternbus.broker.sums.bfv import KEY_BYTES
from ternbus.broker.sums.sets import Answer
from ternbus.broker.sums.terms import CARD_BYTES_MAX, SignedCard

HELPER_HEADER_BYTES: Final = 8192  # an answer that names 50 devices takes half of it
NOT_KNOWN: Final = "this aggregator does not know this helper: it may have been restored from before it joined"
SETTINGS_KEY: Final = "aggregator.toml names another key for this helper, or does not name it ([private] helpers)"
RESTORED: Final = "was its folder put back from a backup? Then run: ternbus helper restored DIR"


@dataclass(slots=True, kw_only=True)
class Private:
    """Takes in the messages of helpers, and begins terms; only in a federation with private sums."""

    settings: Settings
    sums: PrivateSums
    terms: PrivateTerms
    versions: Versions
    refusals: Refusals
    codes: Mapping[str, Invited]  # open invitations of helpers, by name
    merging: SetMerging
    _frames: dict[str, TokenBucket] = field(default_factory=dict)
    _tries: dict[str, TokenBucket] = field(default_factory=dict)
    _strangers: TokenBucket = field(default_factory=TokenBucket)  # of names that the settings do not have
    _answers: TokenBucket = field(default_factory=TokenBucket)  # to helpers that have not enrolled
    _settled: tuple[int, int] | None = None  # for which revision and version the terms were looked at
    _not_before: float = 0.0  # the next version because of new terms
    _told: dict[str, str] = field(default_factory=dict)  # for whom private updates wait, as the operator knows

    @classmethod
    def of(
        cls,
        settings: Settings,
        sums: PrivateSums,
        *,
        held: Held,
        is_closing: bool,
        codes: Mapping[str, Invited],
        registry: Registry,
        versions: Versions,
        refusals: Refusals,
    ) -> Self:
        """Of what the ledger has: ``held`` are private updates that no version contains."""
        begun = sums.contexts.get(versions.model.version)
        retained = b"" if begun is None else begun.terms_digest
        merging = SetMerging(
            settings=settings,
            sums=sums,
            registry=registry,
            versions=versions,
            counters=refusals.counters,
            held=held,
            is_closing=is_closing,
        )
        versions.private = PrivateTerms(settings=settings, sums=sums, retained=retained, held=merging.bases)
        return cls(
            settings=settings,
            sums=sums,
            terms=versions.private,
            versions=versions,
            refusals=refusals,
            codes=codes,
            merging=merging,
        )

    def start(self, now: float) -> list[Action]:
        """Ask again what helpers were asked before, and begin the terms of now."""
        return [*self.merging.start(now), *self.renew(now)]

    def subscriptions(self) -> tuple[str, ...]:
        federation = self.settings.federation
        return tuple(f"{topics.root(federation)}/help/+/{kind}" for kind in sorted(topics.HELPER_KINDS))

    # --- what helpers send

    def take(self, event: MessageArrived, address: topics.Address, now: float) -> list[Action]:
        """Take in a message on a topic below ``help/``; ProtocolError for one that is dropped."""
        self._take_frame(address.device or "", now)
        if (size := header_bytes(event.payload)) > HELPER_HEADER_BYTES:  # without an access list anybody may write here
            raise ProtocolError("header-too-long", f"{size} bytes, on a topic of a helper")
        frame = parse(event.payload)
        topics.check(frame, address)
        if frame.kind == Enroll.KIND:
            return self._enroll(frame, now, event.clock_s)
        helper = self.sums.helpers.get(frame.sender)
        if helper is None or not helper.enrolled or frame.key != helper.key:
            return self._unknown(frame, now)
        frame.check_authentic(helper.public)
        match frame.kind:
            case Status.KIND:
                return self._status(helper, frame, now)
            case topics.CARD:
                return self._card(helper, frame)
            case _:  # the topics that a helper may write on leave only answers
                return self._answer(helper, frame, now)

    def _take_frame(self, name: str, now: float) -> None:
        limits, helper = self.settings.limits, self.sums.helpers.get(name)
        if helper is None:
            if not self._strangers.take(now, limits.refusals_per_s, limits.refusals_per_s):
                raise ProtocolError(
                    "too-fast", f"unknown helpers send more than {limits.refusals_per_s} frames a second"
                )
            return
        per_s = limits.frames_per_s if helper.enrolled else limits.refusals_per_s
        if not self._frames.setdefault(name, TokenBucket()).take(now, per_s, per_s * BURST_S):
            raise ProtocolError("too-fast", f"{name} sends more than {per_s} frames a second")

    def _enroll(self, frame: Frame, now: float, clock_s: float) -> list[Action]:
        """Admit the key that the settings name, or answer why not. ``clock_s`` is the time of day, in Unix seconds."""
        helper = self.sums.helpers.get(frame.sender)
        per_minute = self.settings.limits.enrolments_per_minute
        if helper is not None and not self._tries.setdefault(helper.name, TokenBucket()).take(
            now, per_minute / MINUTE_S, per_minute
        ):
            raise ProtocolError("too-many-enrolments", f"{helper.name} tries too often")
        public = key_in(frame)
        try:
            admitted = self._admit(helper, public, frame, clock_s)
        except ProtocolError as error:  # `refused`
            text = f"the helper {frame.sender} may not enroll: {error.detail}"
            refused = self.refusals.refuse("refused-enroll", text, now)
            return [*refused, *self._receipt(frame, "refused", error.detail)]
        return [*admitted, *self._receipt(frame, "enrolled")]

    def _admit(self, helper: Helper | None, public: bytes, frame: Frame, clock_s: float) -> list[Action]:
        if helper is None or helper.public != public:
            raise ProtocolError("refused", SETTINGS_KEY)
        if helper.proof == frame.body:
            return []
        check_code(self.codes.get(helper.name), frame, self.settings.federation, public, clock_s)
        helper.proof = frame.body
        self.codes = {name: each for name, each in self.codes.items() if name != helper.name}
        self.sums.revision += 1
        saved = Save(record=records.HelperEnrolled(helper=helper.name, public=public, proof=frame.body))
        return [saved, Log(text=f"the helper {helper.name} enrolled")]

    def _unknown(self, frame: Frame, now: float) -> list[Action]:
        """Tell the holder of a key that it is not known here, at a low rate; an invited helper may say who it is."""
        error = ProtocolError("unknown-helper", frame.sender)
        per_s = self.settings.limits.refusals_per_s
        joins = frame.kind == Status.KIND and frame.sender in self.codes
        if joins or frame.part > 0 or not self._answers.take(now, per_s, per_s):
            raise error
        receipt = self._receipt(frame, "unknown", NOT_KNOWN)
        return [*receipt, *self.refusals.drop(f"{frame.kind} of the helper {frame.sender}", error, now)]

    def _receipt(self, frame: Frame, outcome: str, reason: str = "") -> list[Action]:
        receipt = Receipt(
            device=frame.sender,
            device_key=frame.key,
            seq=frame.seq,
            outcome=outcome,
            version=self.versions.model.version,
            reason=reason,
        )
        return self.versions.frames.to_helper(receipt)

    def _status(self, helper: Helper, frame: Frame, now: float) -> list[Action]:
        frame.check_bodiless()
        status, before, before_seq = Status.from_meta(frame.meta), helper.status, helper.status_seq
        if not helper.observe(status, frame.seq):
            return []
        told: list[Action] = []
        if status.online:
            known, is_sound = helper.count, helper.counted(status.count, frame.seq)
            # The broker delivers an old status again: only with a later session one is surely of now.
            is_later = before is not None and status.session > before.session
            if is_later and status.count < known and (not is_sound or frame.seq < before_seq):
                told = self._behind(helper, known, status.count, now)
        again = self.merging.sets.asks.again(helper.name, now) if status.online else []
        saved = Save(record=records.HelperObserved(helper=helper.name, count=helper.count, status=status))
        return [*told, saved, *again]

    def _behind(self, helper: Helper, known: int, count: int, now: float) -> list[Action]:
        """Tell the operator that a helper has begun with a lower count than it had."""
        text = (
            f"the helper {helper.name} says that it has written down {max(count, 0)} steps, and it had {known}: it "
            f"forgets which updates were opened; {RESTORED}"
        )
        return self.refusals.refuse("helper-behind", text, now)

    def _card(self, helper: Helper, frame: Frame) -> list[Action]:
        if frame.parts != 1 or len(frame.body) > CARD_BYTES_MAX + 64 + KEY_BYTES:
            raise ProtocolError("bad-card", "a card is a message of one part")
        signed = SignedCard.of_body(frame.body)
        try:
            if not helper.take_card(signed, frame.seq, self.settings.federation):
                return []
        except ProtocolError as error:
            if error.reason != "old-card":
                raise
            raise ProtocolError(error.reason, f"{error.detail}; {RESTORED}") from error
        self.sums.revision += 1
        return [Save(record=records.CardReceived(helper=helper.name, card=frame.body))]

    def _answer(self, helper: Helper, frame: Frame, now: float) -> list[Action]:
        """Take in a part of an answer."""
        answer = Answer.from_meta(frame.meta)
        saved: list[Action] = []
        if frame.part == 0:
            helper.counted(answer.count, frame.seq)  # the broker may deliver an older one again
            saved.append(Save(record=records.HelperObserved(helper=helper.name, count=helper.count, answered=True)))
        return [*saved, *self.merging.sets.answer(helper.name, frame, now)]

    # --- invitations

    def invite(self, codes: Mapping[str, Invited]) -> None:
        """These are the open invitations of helpers now."""
        self.codes = dict(codes)

    def cancel(self, helper: str) -> list[Action]:
        """Make a helper's open invitation void."""
        self.codes = {name: each for name, each in self.codes.items() if name != helper}
        saved = Save(record=records.HelperInvitationCancelled(helper=helper))
        return [saved, Log(text=f"the invitation of the helper {helper} is cancelled")]

    def check_revocation(self, name: str) -> None:
        """Raise ConfigError for the name of a helper: it is taken out of the settings."""
        if name in self.sums.helpers:
            raise ConfigError(
                f"{name} is a helper, which is replaced, not revoked: take it out of private.helpers in "
                "aggregator.toml and restart the aggregator; the next version has terms without it. Devices whose "
                "owners pinned it send nothing until they join again"
            )

    # --- terms

    @property
    def due(self) -> float | None:
        """When ``on_time`` has something to do."""
        return None if self._is_settled else self._not_before

    def on_time(self, now: float) -> list[Action]:
        """Begin new terms, if anything changed that they depend on."""
        ends_version = self.versions.model.version in self.sums.contexts
        return [] if self._is_settled or (ends_version and now < self._not_before) else self.renew(now)

    @property
    def _is_settled(self) -> bool:
        return self._settled == self._state or self.versions.published.state == CLOSED

    @property
    def _state(self) -> tuple[int, int]:
        return self.sums.revision, self.versions.model.version

    def renew(self, now: float) -> list[Action]:
        """Begin terms with the newest version, or with another one where that has other terms or another plan."""
        actions: list[Action] = []
        if self.terms.is_outdated(self.versions.model):
            self._not_before = now + EMPTY_EVERY_S
            actions = self.versions.empty()
        elif self.terms.can_begin(self.versions.model):
            actions = self.versions.renew_head()
        self._settled = self._state
        return [*actions, *self._tell()]

    def _tell(self) -> list[Action]:
        """Tell the operator for whom devices wait, once."""
        waits, before = self.sums.waits_for(), self._told
        self._told = waits
        if waits == before:
            return []
        if not waits:
            return [Log(text="all helpers are ready: devices may send private updates")]
        whom = "; ".join(f"{name}: {why}" for name, why in waits.items())
        return [Log(text=f"private updates wait for helpers: {whom}")]
