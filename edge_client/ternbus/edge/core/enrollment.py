"""Enrollment of the device's key at the aggregator: one message, sent again until it is answered."""

from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED
from ternbus.broker.protocol.messages import PRIVATE, Receipt
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.sums.terms import Terms
from ternbus.edge.core.actions import Log, Publish
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.private_terms import PrivateTerms
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.resend import Resend

FIRST_RESEND_S: Final = 10.0
NEEDS_PINS: Final = (
    "the federation {} has private sums, and {} was given no --private: this command has sent nothing, so "
    "its invitation is still good; join with `--private --helper KEY`, with the key of each helper that you trust"
)
OTHER_KIND: Final = (
    'the private sums of the federation {} are of the kind "{}", and {} was given "{}": this command has sent nothing, '
    "so its invitation is still good; join with `--private-kind {}` if these are the sums that you want"
)

OTHER_PINS: Final = (
    "the private sums of the federation {} are not those that {} was given: {}; this command has sent nothing, so its "
    "invitation is still good"
)


@dataclass(slots=True, kw_only=True)
class Enrollment:
    """The pending enrollment, until the state is ``enrolled``. The caller decides whether a message may be sent."""

    profile: Profile
    pending: PendingState
    resend: Resend = field(init=False)
    _asked: bool = False

    def __post_init__(self) -> None:
        self.resend = Resend(salt=self.profile.key.hex(), first_s=FIRST_RESEND_S)

    def due_s(self, head: Head | None, terms: PrivateTerms) -> float | None:
        """The time of the next transmission; None if the key is enrolled, or before plan and terms that matter."""
        waits = self.profile.trains_next and (head is None or terms.missing)
        return None if waits or self.pending.state.enrolled else self.resend.due_s()

    def send(self, now: float) -> list[Publish]:
        self._asked = True
        self.resend.sent(1, now)
        return [self.profile.enroll()]

    def answered(self, receipt: Receipt, now: float) -> list[Log]:
        """Handle a receipt that is no refusal. Raises `ProtocolError` for an outcome that no enrollment has."""
        if receipt.outcome == "busy":
            self.resend.busy(receipt.retry_after_s, now)
            return []
        if receipt.outcome != "enrolled":
            raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for an enrollment")
        self.pending.put(replace(self.pending.state, enrolled=True))
        return [Log(event="enrolled", text=f"enrolled as {self.profile.device}")]

    def ending(self, head: Head | None, terms: Terms | None, *, is_checked: bool) -> tuple[int, str] | None:
        """How joining ends: the exit code, and why; None while it goes on. ``is_checked``: the task's model fits."""
        about = self.profile
        if self.pending.state.enrolled:
            return (EXIT_DONE, f"{about.device} has joined {about.federation}") if is_checked else None
        if not about.trains_next or self._asked or head is None or head.plan.get("codec") != PRIVATE:
            return None
        if about.sums is None:
            return EXIT_CONFIG, NEEDS_PINS.format(about.federation, about.device)
        if terms is not None and terms.kind != (ours := about.sums.kind):
            return EXIT_CONFIG, OTHER_KIND.format(about.federation, terms.kind, about.device, ours, terms.kind)
        if terms is not None and (fault := about.sums.pins_fault(terms)):
            return EXIT_CONFIG, OTHER_PINS.format(about.federation, about.device, fault)
        return None


def stopped_by(reason: str, role: str) -> tuple[int, str]:
    """Exit code and words of a device that is asked to stop: one that joins has not joined yet."""
    if role == "join":
        return EXIT_FAILED, f"{reason} came before the device had joined: join again"
    return EXIT_DONE, reason
