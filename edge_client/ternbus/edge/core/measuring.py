"""Federated statistics: the request in the newest head, the job that answers it, and the answer until its receipt.

Each request is answered once, by a number or by a refusal in words: what it costs, its answer, and that it is answered
are one durable write, before a frame leaves. A device whose owner did not allow statistics ignores requests.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.messages import CLOSED, Receipt
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.statistics import StatisticsAnswer, StatisticsRequest
from ternbus.edge.core.actions import Action, Log, Publish, StartStatistics
from ternbus.edge.core.events import StatisticsMeasured
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.resend import Resend
from ternbus.edge.core.state import Asked, Statistics
from ternbus.edge.core.training_policy import TrainingPolicy

FIRST_RESEND_S: Final = 60.0
SETTLE_S: Final = 2.0  # a broker first delivers heads that waited: a newer one may ask for something else, or nothing
ENVELOPE_BYTES: Final = 1024  # of a frame, beside the content of an answer
ASKED_MAX: Final = 100  # answers that the owner can look up
SETTLED: Final = ("accepted", "duplicate", "stale", "invalid")


@dataclass(slots=True, kw_only=True)
class Measuring:
    """At most one request is worked on. The caller decides whether a message may be sent."""

    profile: Profile
    pending: PendingState
    request: StatisticsRequest | None = None  # of the newest head
    running: bool = False
    begin_due_s: float | None = None  # until then newer heads are waited for
    resend: Resend = field(init=False)
    _seqs: set[int] = field(default_factory=set)  # under which the answer was sent, by this process
    _is_closed: bool = False

    def __post_init__(self) -> None:
        self.resend = Resend(salt=f"{self.profile.key.hex()}/statistics", first_s=FIRST_RESEND_S)

    @property
    def _state(self) -> Statistics:
        return self.pending.state.statistics

    def reconnected(self, now: float) -> None:
        """The answer is sent again; newer heads are waited for before a request is answered."""
        self.resend.restart(now)
        self.begin_due_s = None if self.request is None else now + SETTLE_S

    def head_accepted(self, head: Head, asked: Any, now: float) -> list[Action]:
        """Read the request of a head, ``asked``, if it has one, and forget an answer that it asks for no more."""
        if self.profile.statistics is None:
            return []
        before = self.request
        self.request, self._is_closed, actions = None, head.state == CLOSED, list[Action]()
        if isinstance(asked, dict):
            try:
                self.request = StatisticsRequest.from_meta(asked)
            except ProtocolError as error:
                text = f"the device answers no request for statistics that it cannot read: {error}"
                actions.append(Log(event="bad-request", text=text, fields={"reason": str(error)}))
        if self._state.content and (self.request is None or self.request.id != self._state.request):
            self._put(replace(self._state, content=b""))
        if self.request is None:
            self.begin_due_s = None
        elif self.request != before:
            self.begin_due_s = now + SETTLE_S
        return actions

    def begin(self, training: TrainingPolicy, frame_bytes: int, now: float) -> list[StartStatistics]:
        """Start the job, unless a condition is missing: the account must not change meanwhile."""
        request, state = self.request, self.pending.state
        if self.begin_due_s is not None and now < self.begin_due_s:
            return []
        self.begin_due_s = None
        if request is None or self.running or self._is_closed or request.id <= self._state.request:
            return []
        if self.profile.role != "train" or not state.enrolled or training.running is not None or not frame_bytes:
            return []
        self.running = True
        return [
            StartStatistics(
                request=request,
                plan=training.plan,
                refusal=training.refusal,
                account=state.account,
                asked=self._state.asked,
                per_day=self.profile.statistics or 0,
                is_private=self.profile.sums is not None,
                content_bytes=frame_bytes - ENVELOPE_BYTES,
            )
        ]

    def finished(self, event: StatisticsMeasured, now: float) -> Log:
        """Keep the answer, with what it cost, for as long as it is asked for."""
        self.running = False
        kinds = " ".join(event.request.kinds)
        asked = Asked(at=event.clock_s, kinds=kinds, outcome=event.refusal or "answered")
        before = self._state.asked
        if before and before[-1].is_limit and asked.is_limit:  # a flood of requests pushes none out that counts
            before = before[:-1]
        known = Statistics(request=event.request.id, content=event.content, asked=(*before, asked)[-ASKED_MAX:])
        state = replace(self.pending.state, statistics=known)
        self.pending.put(state if event.account is None else replace(state, account=event.account))
        self._seqs.clear()
        self.resend.restart(now)
        if event.refusal:
            text = f"refused to give statistics ({kinds}): {event.refusal}"
        else:
            failure = f"; the task's code failed, and only noise is sent: {event.failure}" if event.failure else ""
            text = f"gives statistics of its data ({kinds}) to the aggregator{failure}"
        return Log(event="statistics", text=text, fields={"kinds": kinds, "outcome": asked.outcome})

    def due_s(self) -> float | None:
        """When the answer is to be sent next; None without one, or once its owner no longer allows statistics."""
        return self.resend.due_s() if self._state.content and self.profile.statistics is not None else None

    def send(self, now: float) -> list[Publish]:
        """The answer, under a new number and in a new box: the aggregator takes one of each device and request."""
        seq = self.pending.next_seq()
        self._seqs.add(seq)
        self.resend.sent(1, now)
        body = self.profile.seal(self.profile.key + seq.to_bytes(8, "little") + self._state.content)
        message = StatisticsAnswer(request=self._state.request)
        return [self.profile.message(message.KIND, seq, message.meta(), body=body)]

    def owns(self, seq: int) -> bool:
        """Whether the answer was sent under this number."""
        return bool(self._state.content) and seq in self._seqs

    def acknowledged(self, seq: int, now: float) -> None:
        """The broker has the answer, if this is its number."""
        if seq in self._seqs:
            self.resend.acknowledged(now)

    def answered(self, receipt: Receipt, now: float) -> list[Log]:
        """Handle the receipt of the answer. Raises `ProtocolError` for an outcome that no answer has."""
        if receipt.outcome == "busy":
            self.resend.busy(receipt.retry_after_s, now)
            return []
        if receipt.outcome not in SETTLED:
            raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for statistics")
        self._put(replace(self._state, content=b""))
        if receipt.outcome == "accepted":
            return []
        reason = f": {receipt.reason}" if receipt.reason else ""
        text = f"the aggregator did not take the statistics ({receipt.outcome}{reason})"
        return [Log(event="statistics-refused", text=text, fields={"outcome": receipt.outcome})]

    def _put(self, known: Statistics) -> None:
        self.pending.put(replace(self.pending.state, statistics=known))
