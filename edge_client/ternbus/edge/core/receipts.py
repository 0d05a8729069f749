"""What a receipt changes in what is kept: the table of outcomes, each a function of the memory alone."""

from dataclasses import replace

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.messages import Receipt
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.state import OutstandingUpdate, State

SEQ_MAX = 2**63  # a number beyond this is no honest counter's


def settled(kept: State, update: OutstandingUpdate, receipt: Receipt, schema: Schema) -> State:
    """The memory after an answer that is final: the update is forgotten, and nothing older is trained on again."""
    forgotten = replace(kept, outstanding=None, answered_base=max(kept.answered_base, update.base))
    match receipt.outcome:
        case "accepted":
            return replace(forgotten, accepted=kept.accepted + 1)
        case "stale":
            value = update.block(schema).value()
            return replace(forgotten, residual=value if kept.residual is None else kept.residual + value)
        case "duplicate" | "invalid":
            return forgotten
        case _:
            raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for an update")


def is_behind(update: OutstandingUpdate, receipt: Receipt) -> bool:
    """Whether our counter comes from an old copy of the disk: the aggregator has answered a higher number."""
    return receipt.outcome == "duplicate" and update.seq < receipt.highest_seq < SEQ_MAX


def sentence(receipt: Receipt, update: OutstandingUpdate) -> str:
    """The answer in words."""
    reason = f": {receipt.reason}" if receipt.reason else ""
    match receipt.outcome:
        case "accepted":
            return f"the update on version {update.base} was accepted"
        case "stale":
            return (
                f"the update on version {update.base} came too late (the head is {receipt.version}); kept for the next"
            )
        case _:
            return f"the update on version {update.base} was not taken ({receipt.outcome}{reason})"
