"""The effect of a receipt on the state, for each outcome, and its text for the log."""

from dataclasses import replace
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.broker.protocol.messages import Receipt
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.masking import carried, comes_back
from ternbus.edge.core.state import OutstandingUpdate, State

ENDINGS: Final = frozenset({"revoked", "unknown"})  # they end a device, and may answer a status


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


def after_receipt(state: State, update: OutstandingUpdate, receipt: Receipt, schema: Schema) -> State:
    """The state after a final receipt: without the update, and with its base marked as answered."""
    without_update = _answered(state, update)
    match receipt.outcome:
        case "accepted":
            return replace(without_update, accepted=state.accepted + 1)
        case "stale":
            return without_update if is_out(state, update) else withdrawn(state, update, schema)
        case "duplicate" | "invalid":
            return without_update
        case _:
            raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for an update")


def is_out(state: State, update: OutstandingUpdate) -> bool:
    """Whether a frame of this private update may have left: then its change never comes back into the residual.

    A sum with it may be opened, whatever its receipt says. At learning rate 0 the next update would have the same
    content, in other company.
    """
    return update.private is not None and update.base <= state.left


def withdrawn(state: State, update: OutstandingUpdate, schema: Schema) -> State:
    """The state without the update, which is in no model, and with its change in the residual if it comes back."""
    if not comes_back(update):
        return _answered(state, update)
    value = carried(update, schema)
    residual = value if state.residual is None else state.residual + value
    return replace(_answered(state, update), residual=residual)


def _answered(state: State, update: OutstandingUpdate) -> State:
    return replace(state, outstanding=None, answered_base=max(state.answered_base, update.base))


def counter_is_behind(update: OutstandingUpdate, receipt: Receipt) -> bool:
    """Whether the sequence counter is from an old copy of the disk: the aggregator has answered a higher number."""
    return receipt.outcome == "duplicate" and update.seq < receipt.highest_seq < COUNTER_MAX


def fate(update: OutstandingUpdate) -> str:
    """What happens to the change of an update that is in no model, for the log."""
    if comes_back(update):
        return "its change is added to the next update"
    return 'its change is lost, since dp = "sum" keeps no residual'


def describe(receipt: Receipt, update: OutstandingUpdate, *, is_out: bool) -> str:
    """The log text for the receipt of an update."""
    reason = f": {receipt.reason}" if receipt.reason else ""
    match receipt.outcome:
        case "accepted":
            return f"the update on version {update.base} was accepted"
        case "stale":
            late = f"the update on version {update.base} was too late (the head is {receipt.version})"
            return f"{late}; {'its change is not sent again, since a sum may have it' if is_out else fate(update)}"
        case _:
            return f"the update on version {update.base} was not accepted ({receipt.outcome}{reason})"


def describe_refusal(receipt: Receipt) -> str:
    """The reason to stop after a receipt that refuses or revokes the device, or says that it is unknown."""
    if receipt.outcome == "unknown":
        return (
            f"the aggregator does not know this device ({receipt.reason}); "
            "ask its operator for a new invitation and run: ternbus edge rejoin"
        )
    verb = "revoked this device's key" if receipt.outcome == "revoked" else "refused the invitation"
    reason = f" ({receipt.reason})" if receipt.reason else ""
    return f"the aggregator has {verb}{reason}; ask its operator for a new invitation"
