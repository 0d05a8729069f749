"""Helpers of private sums for tests: their keys, cards, terms, and what opens a box."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import nacl.public

from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.parts import Whole
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import masks
from ternbus.broker.sums.terms import MASK, OWN, Card, SignedCard, Terms
from ternbus.broker.sums.words import Words

FEDERATION = "fed"


def helper_key(number: int) -> Identity:
    return Identity(bytes([100 + number]) * 32)


def box_secret(number: int, generation: int = 1) -> bytes:
    return bytes([200 + number, generation]) * 16


@cache
def box_public(secret: bytes) -> bytes:
    return bytes(nacl.public.PrivateKey(secret).public_key)


def card(which: int = 1, **changes: Any) -> SignedCard:
    """The card of the helper h-1, h-2, …; ``number`` is that of its box key."""
    generation = changes.get("number", 1)
    made = Card(
        federation=FEDERATION,
        helper=f"h-{which}",
        public=helper_key(which).public,
        box_key=box_public(box_secret(which, generation)),
        number=generation,
        roster=OWN,
        min=2,
    )
    return replace(made, **changes).signed(helper_key(which))


def terms_for(schema: Schema, **changes: Any) -> Terms:
    made = Terms(
        kind=MASK,
        bits=6,
        levels=1,
        helpers=(card(),),
        min=5,
        ternary=schema.ternary_elements,
        dense=schema.dense_elements,
        scales=(1.0,) * len(schema.tensors),
        samples=0.0,
    )
    return replace(made, **changes)


def seeds_in(frame: Frame, device: bytes, helpers: Iterable[int] = (1,), generation: int = 1) -> list[bytes]:
    """What each helper finds in its box of a private update."""
    update = Update.from_meta(frame.meta)
    about: dict[str, Any] = {"context": update.context, "device": device, "seq": frame.seq}
    return [
        masks.open_box(box_secret(number, generation), box, helper=helper_key(number).public, **about)
        for number, box in zip(helpers, update.boxes, strict=True)
    ]


def opened(terms: Terms, whole: Whole, device: Identity, unsealed: bytes, seeds: Iterable[bytes]) -> Words:
    """The words of one update without its masks, as all helpers and the aggregator together could have them."""
    update = Update.from_meta(whole.meta)
    assert unsealed[:16] == bytes(whole.key) + whole.seq.to_bytes(8, "little")
    words = terms.layout.read(unsealed[16:]).copy()
    for helper, seed in zip(terms.helpers, seeds, strict=True):
        one = masks.mask(terms.layout, seed, context=update.context, device=device.public, helper=helper.card.public)
        terms.layout.subtract(words, one)
    return words
