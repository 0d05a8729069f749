"""The device's retained status: its work, and why that fails; the last will is the same message, "offline"."""

from dataclasses import dataclass, field
from typing import Final

from ternbus.edge.core.actions import Publish
from ternbus.edge.core.evaluation import EvaluationPolicy
from ternbus.edge.core.failures import shown
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.presence import Presence
from ternbus.edge.core.profile import OFFLINE, Profile
from ternbus.edge.core.training_policy import TrainingPolicy

RECENT_MAX = 8
BURST: Final = 10.0  # statuses of trainings that begin and end quickly one after the other
PER_S: Final = 1.0  # beyond the burst: a status costs device, broker and aggregator as much as a small update


@dataclass(slots=True, kw_only=True)
class OwnStatus:
    """Makes the statuses, and remembers numbers of statuses and metrics, which a revocation may answer."""

    profile: Profile
    pending: PendingState
    presence: Presence
    training: TrainingPolicy
    evaluation: EvaluationPolicy
    recent_seqs: set[int] = field(default_factory=set)
    due_s: float | None = None  # when the status is published that had to wait
    _left: float = BURST
    _counted_s: float = 0.0

    def changed(self, now: float) -> list[Publish]:
        """The status when a training begins or ends; it may have to wait, and then says what is so by then.

        Not where updates are private: there the aggregator waits for who trains on a version.
        """
        if self.profile.is_private:
            return self.now()
        if self.due_s is None:
            self._left = min(BURST, self._left + (now - self._counted_s) * PER_S)
            self._counted_s = now
            if self._left >= 1:
                self._left -= 1
                return self.now()
            self.due_s = now + (1 - self._left) / PER_S
        return []

    def time_reached(self, now: float) -> list[Publish]:
        """The status that had to wait."""
        if self.due_s is None or now < self.due_s:
            return []
        self._left, self._counted_s = 0.0, now
        return self.now()

    def now(self) -> list[Publish]:
        """The status, unless the key is not enrolled: the aggregator could not verify it."""
        self.due_s = None
        state, training = self.pending.state, self.training
        if not state.enrolled or self.profile.role in {"join", "export"}:
            return []
        seen = state.head_version if self.presence.is_behind else -1  # a sign that the aggregator lost versions
        work, base = ("idle", seen) if training.running is None else ("training", training.running.base)
        reason = training.failures.reason or self.evaluation.failures.reason
        failing = shown(reason, private=training.private, sealed=training.sealed)
        if not failing and self.profile.role == "train":  # no data decide what is said then, nor whether it is
            failing = shown(state.refusal, private=False, sealed=False)
        seq = self.pending.next_seq()
        return [self.noted(self.profile.status(work, seq=seq, session=state.session, base=base, failing=failing))]

    def offline(self) -> Publish:
        return self.profile.status(OFFLINE, seq=self.pending.next_seq(), session=self.pending.state.session)

    def noted(self, publish: Publish) -> Publish:
        self.recent_seqs = {*sorted(self.recent_seqs)[-RECENT_MAX + 1 :], publish.seq}
        return publish
