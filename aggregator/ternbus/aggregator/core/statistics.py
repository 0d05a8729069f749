"""Federated statistics: the operator's request goes out in heads, and each device's one answer is added up.

One request is open at a time. It ends at its time, when all devices have answered, or when another takes its place.
"""

from dataclasses import dataclass, field
from typing import Final

import msgpack

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Action, Log, Save, StatisticsRequested
from ternbus.aggregator.core.registry import DEVICE, EVALUATOR, Member, Registry
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.validation import Verdict
from ternbus.aggregator.core.versions import Versions
from ternbus.aggregator.merge.pooled import Pooled
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.plural import counted
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.frame import HEADER_BYTES_MAX, Frame
from ternbus.broker.protocol.statistics import (
    CONTENT_BYTES_MAX,
    NONE,
    REQUEST_BYTES_MAX,
    Measured,
    StatisticsAnswer,
    StatisticsRequest,
)

SEALED_BYTES: Final = 64  # of a box, beside the content of an answer: key id, seq, and what the box adds
ANSWERED: Final = "answered"
REFUSED: Final = "refused: "
INVALID: Final = "invalid: "


@dataclass(slots=True, kw_only=True)
class StatisticsState:
    """What the ledger holds of the newest request; ``outcomes`` is what became of it, by device."""

    pooled: Pooled | None = None  # with the request; None: there was none
    wait_s: float = 0.0
    is_open: bool = False
    outcomes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class FederatedStatistics:
    """Asks, takes answers, and ends a request."""

    state: StatisticsState
    registry: Registry
    versions: Versions
    updates: Updates
    due: float | None = None  # when the open request ends

    def start(self, now: float) -> None:
        """Go on with a request that was open when the process before ended: its time begins anew."""
        if self.state.is_open and self.state.pooled is not None:
            self.due, self.versions.asked = now + self.state.wait_s, self.state.pooled.request.meta()

    def ask(self, event: StatisticsRequested, now: float) -> list[Action]:
        """Publish a request; ConfigError, in words, for one that no device may answer."""
        request = self._request(event)
        known = StatisticsState(pooled=Pooled(request=request), wait_s=event.wait_s, is_open=True)
        self.state, self.due = known, now + event.wait_s
        self.versions.asked = request.meta()
        asked = records.StatisticsAsked(request=bytes(msgpack.packb(request.meta())), wait_s=event.wait_s)
        text = f"asks devices for statistics of their data: {', '.join(request.kinds)}"
        return [
            Save(record=asked),
            *self.versions.renew_head(),
            Log(text=text, event="statistics", fields={"request": request.id, "kinds": list(request.kinds)}),
        ]

    def _request(self, event: StatisticsRequested) -> StatisticsRequest:
        dp, noise = self.versions.settings.noise_of_plan
        if self.versions.private is not None or dp == plan_keys.SUM:
            raise ConfigError("devices of private sums give no numbers of their own, so no statistics either")
        if dp == NONE and event.noise is not None:
            raise ConfigError('--noise is for a plan with dp = "device" or "sample", and this plan has none')
        try:
            request = StatisticsRequest(
                id=self.versions.frames.seq + 1,
                kinds=event.kinds,
                features=event.features,
                low=event.low,
                high=event.high,
                bins=event.bins,
                labels=event.labels,
                dp=dp,
                noise=0.0 if dp == NONE else noise if event.noise is None else event.noise,
            )
            request = StatisticsRequest.from_meta(request.meta())  # as devices will read it
        except ProtocolError as error:
            raise ConfigError(f"no such request: {error.detail or error}") from error
        size = len(msgpack.packb(request.meta()))
        most = min(HEADER_BYTES_MAX, self.versions.frames.frame_bytes)
        if size > REQUEST_BYTES_MAX or len(self.versions.published.head_frame) + size > most:
            raise ConfigError(f"a request of {size} bytes does not fit into a head: name fewer features or labels")
        return request

    def take(self, member: Member, frame: Frame, now: float) -> list[Action]:
        """Take in a device's answer. Each device has one for a request, and the same receipt again for another."""
        self.updates.afford(member, now)
        answer, pooled = StatisticsAnswer.from_meta(frame.meta), self.state.pooled
        if frame.parts != 1 or len(frame.body) > CONTENT_BYTES_MAX + SEALED_BYTES:
            raise ProtocolError("bad-body", "statistics are one part, of a bounded length")
        if pooled is None or answer.request != pooled.request.id:
            return self._receipt(member, frame, Verdict("stale", "this request has ended"))
        if (known := self.state.outcomes.get(member.name)) is not None:
            return self._receipt(member, frame, _verdict(known))
        if not self.state.is_open:
            return self._receipt(member, frame, Verdict("stale", "this request has ended"))
        outcome = self._add(member, frame, pooled)
        self.state.outcomes[member.name] = outcome
        if outcome.startswith(INVALID):
            self.updates.counters.refuse("bad-statistics", now)
        content = pooled.pack() if outcome == ANSWERED else b""
        saved = Save(record=records.StatisticsAnswered(device=member.name, outcome=outcome, pooled=content))
        return [saved, *self._receipt(member, frame, _verdict(outcome))]

    def _add(self, member: Member, frame: Frame, pooled: Pooled) -> str:
        """Add the answer; what became of it."""
        if member.role == EVALUATOR:
            return INVALID + "an evaluator has no data of its own"
        try:
            plain = self.versions.frames.identity.unseal(frame.body)
            if plain[:16] != bytes(frame.key) + frame.seq.to_bytes(8, "little"):
                return INVALID + "sealed for another message than this"
            found = Measured.read(plain[16:], pooled.request)
            if found.refusal:
                return REFUSED + found.refusal
            pooled.add(found)
        except ProtocolError as error:
            return INVALID + str(error)
        return ANSWERED

    def _receipt(self, member: Member, frame: Frame, verdict: Verdict) -> list[Action]:
        return self.updates.receipt(member.name, member.key, frame.seq, verdict)

    def on_time(self, now: float) -> list[Action]:
        """End the open request if it is time, or nobody is left to answer."""
        if self.due is None or not (now >= self.due or self._all_answered()):
            return []
        self.due, self.state.is_open, self.versions.asked = None, False, None
        counts = sum(outcome == ANSWERED for outcome in self.state.outcomes.values())
        refusals = counted(len(self.state.outcomes) - counts, "refusal")
        text = f"the request for statistics has ended: {counted(counts, 'answer')}, {refusals}"
        ended = Log(text=text, event="statistics-ended", fields={"answered": counts})
        return [Save(record=records.StatisticsEnded()), *self.versions.renew_head(), ended]

    def _all_answered(self) -> bool:
        """Whether all have that could: whether an owner allows it, nobody here knows."""
        outcomes = self.state.outcomes
        return bool(outcomes) and not any(  # this is asked at each event: it ends at the first that is missing
            each.name not in outcomes and each.role == DEVICE and not each.revoked
            for each in self.registry.members.values()
        )


def _verdict(outcome: str) -> Verdict:
    if outcome.startswith(INVALID):
        return Verdict("invalid", outcome.removeprefix(INVALID))
    return Verdict("accepted")
