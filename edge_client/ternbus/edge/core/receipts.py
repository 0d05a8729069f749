"""The effect of a receipt on the state, for each outcome, and its text for the log."""

from dataclasses import replace
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.broker.protocol.messages import Receipt
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.state import OutstandingUpdate, State

ENDINGS: Final = frozenset({"revoked", "unknown"})  # they end a device, and may answer a status
EVALUATOR: Final = "evaluator"  # the reason of "invalid" for each update of one


def ends(receipt: Receipt, frame_seq: int, state: State, *, enrollment: bool) -> bool:
    """Whether the receipt, in a frame of the aggregator with the number ``frame_seq``, ends the device.

    Only the key's owner can cause "revoked", which holds for good, and "refused", which answers an enrollment. Before a
    key is enrolled, anybody can cause "unknown" for it and keep the receipt. So a device that has joined believes it
    only under a higher number than the newest head had, and each receipt by which the aggregator knew the key. Raises
    ProtocolError for another.
    """
    match receipt.outcome:
        case "revoked":
            return True
        case "refused":
            return enrollment
        case "unknown" if state.enrolled:
            if frame_seq <= (newest := max(state.receipt_seq, state.head_seq)):
                raise ProtocolError("old-receipt", f"'unknown' under seq {frame_seq}, and {newest} came before")
            return True
        case _:
            return False


def is_for_good(receipt: Receipt) -> bool:
    """Whether no update of this device will ever be accepted: its invitation was an evaluator's."""
    return receipt.outcome == "invalid" and receipt.reason.startswith(f"{EVALUATOR}:")


def after_receipt(state: State, update: OutstandingUpdate, receipt: Receipt, schema: Schema) -> State:
    """The state after a final receipt: without the update, and with its base marked as answered."""
    match receipt.outcome:
        case "accepted":
            return settled(state, update, accepted=1)
        case "stale" if update.private is None:
            return _put_back(settled(state, update), update, schema)
        case "stale" | "duplicate" | "invalid":
            return settled(state, update)
        case _:
            raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for an update")


def is_out(state: State, update: OutstandingUpdate) -> bool:
    """Whether a frame of this private update may have left: then a sum with it may be opened, so its receipt counts."""
    return update.private is not None and update.base <= state.left


def settled(state: State, update: OutstandingUpdate, accepted: int = 0) -> State:
    """The state without the update, and with its base marked as answered; ``accepted`` is 1 if it was."""
    answered_base = max(state.answered_base, update.base)
    return replace(state, outstanding=None, answered_base=answered_base, accepted=state.accepted + accepted)


def _put_back(state: State, update: OutstandingUpdate, schema: Schema) -> State:
    """The state with the change of an update that is in no model in the residual; never that of a private one.

    A private sum has nothing but what devices learned on its version: what came later, at learning rate 0, would come
    in company that adds nothing.
    """
    value = update.block(schema).value()
    return replace(state, residual=value if state.residual is None else state.residual + value)


def counter_is_behind(update: OutstandingUpdate, receipt: Receipt) -> bool:
    """Whether the sequence counter is from an old copy of the disk: the aggregator has answered a higher number."""
    return receipt.outcome == "duplicate" and update.seq < receipt.highest_seq < COUNTER_MAX


def fate(update: OutstandingUpdate) -> str:
    """What happens to the change of an update that is too late, for the log."""
    if update.private is None:
        return "its change is added to the next update"
    return "its change is not sent again, since private sums keep no residual"


def describe(receipt: Receipt, update: OutstandingUpdate) -> str:
    """The log text for the receipt of an update."""
    reason = f": {receipt.reason}" if receipt.reason else ""
    match receipt.outcome:
        case "accepted":
            return f"the update on version {update.base} was accepted"
        case "stale":
            return f"the update on version {update.base} was too late (the head is {receipt.version}); {fate(update)}"
        case _:
            return f"the update on version {update.base} was not accepted ({receipt.outcome}{reason})"


def describe_refusal(receipt: Receipt) -> str:
    """The reason to stop after a receipt that refuses or revokes the device, or says that it is unknown."""
    reason = f" ({receipt.reason})" if receipt.reason else ""
    if is_for_good(receipt):
        return (
            f"the aggregator takes no updates of this device{reason}; run `ternbus edge evaluate`, or ask its operator "
            "for an invitation without --evaluator"
        )
    if receipt.outcome == "unknown":
        return (
            f"the aggregator does not know this device{reason}; "
            "ask its operator for a new invitation and run: ternbus edge rejoin"
        )
    verb = "revoked this device's key" if receipt.outcome == "revoked" else "refused the invitation"
    return f"the aggregator has {verb}{reason}; ask its operator for a new invitation"
