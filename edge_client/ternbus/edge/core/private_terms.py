"""The terms of private sums that the head names: collected, compared with the owner's pins, and bound to a training.

The aggregator publishes terms before the head that names them, and the broker retains them. Where parts did not arrive
they are requested by name, as those of the model are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.parts import Collector, parts_max
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import bfv
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import BFV, SCHEMA, TERMS_BYTES_MAX, Terms, context, digest_of
from ternbus.edge.core.actions import Action, Log
from ternbus.edge.core.part_requests import PartRequests
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.learn.sum_content import SumJob
from ternbus.edge.plan.plan import Plan

GRACE_S: Final = 1.0  # for parts to arrive through the common subscription, before they are requested by name
RETRY_S: Final = 60.0  # until the next request, after other terms came than the head's
HELD_MAX: Final = 4  # terms that no head has named yet, or no longer
MESSAGES_MAX: Final = 4
NO_TERMS: Final = (
    "it names no terms of private sums; the aggregator has none while it waits for a helper, and `ternbus aggregator "
    "status` says for which"
)
OTHER_SCHEMA: Final = (
    "its plan does not name the schema of the model: who gets the tensors in another order has another model, and its "
    "update would be in a sum with the others'"
)


@dataclass(slots=True, kw_only=True)
class PrivateTerms:
    """The terms of the newest head; without a head, or in a head without private sums, none."""

    profile: Profile
    pending: PendingState
    requests: PartRequests = field(default_factory=PartRequests)
    terms: Terms | None = None
    fault: str = ""  # why the device makes no update by them
    _digest: bytes = b""  # of the head's terms; empty: it names none
    _plan_digest: bytes = b""
    _schema: bytes = b""  # digest, as the head's plan names it
    _collector: Collector = field(default_factory=lambda: Collector(MESSAGES_MAX, 2 * TERMS_BYTES_MAX))
    _held: dict[bytes, bytes] = field(default_factory=dict)  # by digest, the newest last
    _newest_seq: int = -1  # of parts that have arrived
    _ask_s: float | None = None  # when to request parts by name
    _asked: bool = False  # whether the head's terms were requested by name
    _checked: bool = False
    _logged: str = ""  # the last fault

    @property
    def missing(self) -> bool:
        """Whether the head names terms that have not arrived."""
        return bool(self._digest) and self.terms is None and not self.fault

    @property
    def refusal(self) -> str:
        """Why the device makes no update, for its owner; empty while terms may only be on their way."""
        late = "the terms of private sums that the aggregator's head names have not arrived"
        return late if self.missing and self._asked else self.fault

    def disconnected(self) -> None:
        self.requests.connected = False

    def reconnected(self, now: float) -> list[Action]:
        if self._ask_s is not None:
            self._ask_s = now + GRACE_S
        return [*self.requests.reconnected(now)]

    def due_s(self) -> float | None:
        """The time at which to call ``time_reached``; None if there is nothing to wait for."""
        return self.requests.due_s() if self.requests else self._ask_s

    def time_reached(self, now: float) -> list[Action]:
        due = self.due_s()
        if due is None or due > now:
            return []
        # The first part, until one has arrived, which has the number of parts.
        missing = self._collector.missing(topics.TERMS, self._newest_seq) or [0]
        return [*self.requests.cancel(), *self._request(missing, now)]

    def head_accepted(self, head: Head, meta_bytes: bytes, now: float) -> list[Action]:
        """Look for the terms that this head names. Raises ProtocolError where the plan has no bytes."""
        if not self.profile.is_private:
            return []
        digest = named_terms(head.plan)
        self._plan_digest, schema = digest_of(plan_bytes(meta_bytes)), head.plan.get(SCHEMA)
        self._schema = schema if isinstance(schema, bytes) else b""
        self._checked = False
        if digest == self._digest and digest:
            return []
        self._digest, self.terms, self.fault, self._ask_s, self._asked = digest, None, "", None, False
        if not digest:
            is_private = head.plan.get("codec") == PRIVATE  # any other codec is the plan's fault
            self.fault = NO_TERMS if is_private else ""
        elif digest in self._held:
            self._take(self._held[digest])
        else:
            self._ask_s = now + GRACE_S
        return [*self.requests.cancel()]

    def part_arrived(self, topic: str, frame: Frame, now: float) -> list[Action]:
        """Handle a part of any terms. Raises ProtocolError for one of a message that is too long."""
        if not self.profile.is_private:
            raise ProtocolError("not-asked", "terms of private sums")
        if frame.parts > parts_max(TERMS_BYTES_MAX):
            raise ProtocolError("too-long", f"terms in {frame.parts} parts")
        self._newest_seq = max(self._newest_seq, frame.seq)
        whole = self._collector.add(frame)
        actions: list[Action] = [*self.requests.arrived(topic, now)] if topic in self.requests else []
        if whole is not None:
            self._keep(whole.body)
        if not self.missing:
            return [*actions, *self.requests.cancel()]
        if actions and not self.requests:
            if whole is None and (rest := self._collector.missing(topics.TERMS, frame.seq)):
                return [*actions, *self._request(rest, now)]
            self._ask_s = now + RETRY_S  # the terms of another head: the next one may name them
        return actions

    def _keep(self, content: bytes) -> None:
        """Keep complete terms; with the head's, nothing else is awaited."""
        if len(content) > TERMS_BYTES_MAX:
            raise ProtocolError("too-long", f"terms of {len(content)} bytes")
        digest = digest_of(content)
        self._held.pop(digest, None)
        self._held[digest] = content
        while len(self._held) > HELD_MAX:
            self._held.pop(next(iter(self._held)))
        if digest == self._digest and self.missing:
            self._take(content)

    def _take(self, content: bytes) -> None:
        self._ask_s, self._checked = None, False
        try:
            self.terms = Terms.parse(content)
        except ProtocolError as error:
            self.fault = f"its terms of private sums are not valid ({error})"
            return
        for helper in self.terms.helpers:
            if helper.card.federation != self.profile.federation:
                self.terms, name = None, helper.card.helper
                self.fault = f"the helper {name!r} in its terms is one of the federation {helper.card.federation!r}"
                return

    def _request(self, parts: Iterable[int], now: float) -> list[Action]:
        self._ask_s, self._asked = now + RETRY_S, True
        wanted = (topics.terms(self.profile.federation, part) for part in parts)
        return [*self.requests.request(wanted, now)]

    def check(self, plan: Plan | None, schema: Schema | None) -> list[Log]:
        """Compare the terms with the owner's pins, and remember the helpers' box keys. Logs a new fault."""
        policy, terms, state = self.profile.sums, self.terms, self.pending.state
        if policy is None or plan is None or self._checked:
            return []
        if terms is not None and schema is not None:
            self._checked = True
            self.fault = policy.terms_fault(terms, schema, plan, state.cards)
            self.fault = self.fault or ("" if schema.digest == self._schema else OTHER_SCHEMA) or _key_fault(terms)
            if not self.fault and (cards := policy.seen_in(terms, state.cards)) != state.cards:
                self.pending.put(replace(state, cards=cards))
        if self.fault in {"", self._logged}:
            self._logged = self.fault
            return []
        self._logged = self.fault
        text = f"the device does not train by this plan: {self.fault}"
        return [Log(event="bad-plan", text=text, fields={"reason": self.fault})]

    def job(self, head: Head, schema: Schema) -> SumJob | None:
        """What makes an update of a training on the head's version private; None while the terms do not allow one.

        ``schema`` is that by which the vector is trained on. It is in the context as the plan's bytes are.
        """
        policy = self.profile.sums
        if policy is None or self.terms is None or self.fault or not self._checked or schema.digest != self._schema:
            return None
        bound = context(version=head.version, model=head.digest, plan=self._plan_digest, terms=self._digest)
        return SumJob(terms=self.terms, context=bound, honest=policy.honest(self.terms))


def _key_fault(terms: Terms) -> str:
    """Why nothing can be encrypted by terms that are accepted otherwise; empty if it can, and for masks."""
    if terms.kind != BFV:
        return ""
    try:
        bfv.check_key(terms.key)
    except ProtocolError as error:
        return f"the key of the helper in its terms is not valid ({error})"
    return ""


def named_terms(plan: Mapping[str, Any]) -> bytes:
    """The digest of the terms that a head's plan names; empty if it names none."""
    digest = plan.get(topics.TERMS)
    return digest if isinstance(digest, bytes) and len(digest) == 32 and plan.get("codec") == PRIVATE else b""
