"""The check of an update's header for private sums, against the federation and the base."""

from typing import Final

from ternbus.aggregator.sums.state import ContextOf, PrivateSums
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.messages import PRIVATE, Update
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import RAW
from ternbus.broker.sums.bfv import Slots
from ternbus.broker.sums.masks import BOX_BYTES
from ternbus.broker.sums.terms import BFV
from ternbus.broker.sums.words import BITS, Layout

METRICS: Final = frozenset({"epsilon", "delta"})  # all else would tell of one device's data


def check_header(sums: PrivateSums | None, update: Update) -> ContextOf:
    """The context of a private update's base; ProtocolError where the header does not go with it.

    Nothing is unsealed before this. In a plain federation, ``sums`` None, no private update is accepted.
    """
    if sums is None:
        raise ProtocolError("not-private", "this federation has no private sums: send a plain update")
    if not update.is_private:
        raise ProtocolError(
            "private-only", f"this federation takes updates of the codec {PRIVATE!r} only: join it with --private"
        )
    about = sums.contexts.get(update.base)
    if about is None or update.context != about.context:
        raise ProtocolError("wrong-context", f"another model, plan or terms than those of version {update.base}")
    terms = about.terms
    if len(update.boxes) != len(terms.helpers) or any(len(box) != BOX_BYTES for box in update.boxes):
        raise ProtocolError("bad-boxes", f"not one box of {BOX_BYTES} bytes for each of {len(terms.helpers)} helpers")
    if update.min > terms.devices_max:
        raise ProtocolError("bad-min", f"a sum of {update.min} devices, and one holds at most {terms.devices_max}")
    if not update.sealed or update.encoding != RAW or update.samples != 1:
        raise ProtocolError("bad-private", "a private update is sealed, its encoding is raw and its samples are 1")
    if not METRICS.issuperset(update.metrics):
        raise ProtocolError("bad-private", "a private update states no metrics but epsilon and delta")
    return about


def body_bytes_max(schema: Schema, kind: str) -> int:
    """The largest body that an update of this schema has under any terms of a kind; a helper's answer has no more."""
    layout = Layout(
        bits=BITS[-1], ternary=schema.ternary_elements, dense=schema.dense_elements, tensors=len(schema.tensors)
    )
    return Slots(layout).body_bytes if kind == BFV else 8 * layout.words
