"""The answers to asks: what is written down of a set, and what leaves; each step of a set can be asked for again."""

from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.broker.protocol.parts import Whole
from ternbus.broker.sums import sets
from ternbus.broker.sums.sets import ABANDON, PREPARE, REASON_BYTES_MAX, Answer, AskStep
from ternbus.helper.core.ask_check import AskCheck, AskRefusedError, CheckedAsk
from ternbus.helper.core.opening_log import Opening
from ternbus.helper.core.profile import Profile
from ternbus.helper.core.records import ABANDONED, OPENED, Abandoned, Opened, Prepared, Records, Step
from ternbus.helper.core.state import State

_TEXTS: Final = {
    sets.PREPARED: "prepared a set",
    sets.OPENED: "opened a set",
    sets.ABANDONED: "abandoned a set",
    sets.REFUSED: "refused a set",
}
_REMEDIES: Final = {"not-admitted": "; `ternbus helper admit` lets a device in"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The state and the step to save before ``answer`` may leave with ``body``."""

    state: State
    answer: Answer
    step: Step | None = None
    body: bytes = field(default=b"", repr=False)
    reason: str = ""  # of a refusal, a short constant

    @property
    def text(self) -> str:
        """For the log."""
        text = f"{_TEXTS[self.answer.outcome]} ({self.answer.set.hex()[:16]})"
        return f"{text}: {self.answer.reason}{_REMEDIES.get(self.reason, '')}" if self.answer.reason else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers asks from the records; it keeps no seed, and nothing else that the records do not have."""

    profile: Profile
    records: Records

    def reply(self, ask: Whole, state: State, unix_s: float) -> Reply:
        """The reply to a whole ask. Raises `ProtocolError` if it cannot be told which set it is about."""
        step = AskStep.from_meta(ask.meta)
        try:
            return self._step(step, ask.body, state, unix_s)
        except AskRefusedError as error:
            return refusal(step.set, state, error)

    def _step(self, step: AskStep, content: bytes, state: State, unix_s: float) -> Reply:
        before = self.records.state_of(step.set)
        if step.step == ABANDON:
            return self._abandon(step.set, before, state, unix_s)
        if before == ABANDONED:
            raise AskRefusedError("abandoned", "it will never be opened")
        checked = AskCheck(profile=self.profile, box_keys=state.box_keys, records=self.records).check(content, step.set)
        if step.step == PREPARE:
            return self._prepare(checked, before, state, unix_s)
        if before is None:
            raise AskRefusedError("not-prepared", "prepare it at every helper before it is opened")
        return self._open(checked, before, state, unix_s)

    def _prepare(self, ask: CheckedAsk, before: str | None, state: State, unix_s: float) -> Reply:
        if before is not None:  # prepared, or opened since
            return Reply(state=state, answer=_answer(sets.PREPARED, ask.digest, state))
        after = replace(state, count=state.count + 1)
        step = Prepared(
            digest=ask.digest,
            context=ask.context,
            base=ask.base,
            count=after.count,
            unix_s=unix_s,
            members=tuple((each.device, each.public) for each in ask.members),
        )
        return Reply(state=after, step=step, answer=_answer(sets.PREPARED, ask.digest, after))

    def _open(self, ask: CheckedAsk, before: str, state: State, unix_s: float) -> Reply:
        body = ask.opened(self.profile)
        if before == OPENED:
            return Reply(state=state, answer=_answer(sets.OPENED, ask.digest, state), body=body)
        entry = Opening(
            federation=self.profile.federation,
            helper=self.profile.helper,
            number=state.log_length + 1,
            count=state.count + 1,
            digest=ask.digest,
            context=ask.context,
            base=ask.base,
            members=tuple((each.device, each.header) for each in ask.members),
            previous=state.log_hash,
        ).signed(self.profile.identity)
        after = replace(state, count=state.count + 1, log_length=state.log_length + 1, log_hash=entry.hash)
        step = Opened(digest=ask.digest, count=after.count, unix_s=unix_s, entry=entry.pack())
        return Reply(state=after, step=step, answer=_answer(sets.OPENED, ask.digest, after), body=body)

    def _abandon(self, digest: bytes, before: str | None, state: State, unix_s: float) -> Reply:
        """Abandon a set, known or not: a `prepare` that is still under way must not bring it back."""
        if before == OPENED:
            raise AskRefusedError("opened", "its sum has left")
        if before == ABANDONED:
            return Reply(state=state, answer=_answer(sets.ABANDONED, digest, state))
        after = replace(state, count=state.count + 1)
        step = Abandoned(digest=digest, count=after.count, unix_s=unix_s)
        return Reply(state=after, step=step, answer=_answer(sets.ABANDONED, digest, after))


def refusal(digest: bytes, state: State, error: AskRefusedError) -> Reply:
    """The reply that refuses a set, and changes nothing."""
    shown = str(error).encode("utf-8", "replace")[:REASON_BYTES_MAX].decode("utf-8", "ignore")
    answer = Answer(outcome=sets.REFUSED, set=digest, count=state.count, reason=shown, updates=error.updates)
    return Reply(state=state, answer=answer, reason=error.reason)


def _answer(outcome: str, digest: bytes, state: State) -> Answer:
    return Answer(outcome=outcome, set=digest, count=state.count)


@dataclass(slots=True, kw_only=True)
class WaitingAsks:
    """Whole asks that wait for their turn, bounded; beyond that the oldest are dropped, and asked for again."""

    number_max: int
    bytes_max: int
    dropped: int = 0
    _asks: list[Whole] = field(default_factory=list)

    def add(self, ask: Whole) -> None:
        AskStep.from_meta(ask.meta)  # ProtocolError before it takes a place
        self._asks.append(ask)
        while len(self._asks) > self.number_max or sum(len(each.body) for each in self._asks) > self.bytes_max:
            del self._asks[0]
            self.dropped += 1

    def next(self) -> Whole:
        return self._asks.pop(0)

    def clear(self) -> None:
        self._asks.clear()

    def __len__(self) -> int:
        return len(self._asks)
