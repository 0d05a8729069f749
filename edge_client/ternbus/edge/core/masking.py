"""An outstanding update of a private sum: its mask and boxes for a key and a number, and what its words carry.

Whatever key and number it is sent under, it has the same words and the same seeds. So the aggregator, which can have it
sent again at will, never gets two masks for one content, nor one mask for two.
"""

from dataclasses import replace

from ternbus.broker.protocol.messages import PRIVATE
from ternbus.broker.protocol.ternary import RAW
from ternbus.broker.sums import masks
from ternbus.broker.sums.terms import BFV, Terms
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import OutstandingUpdate, PrivatePart, sealed
from ternbus.edge.learn.sum_content import SumContent, SumJob


def masked(update: OutstandingUpdate, profile: Profile) -> OutstandingUpdate:
    """The same update, masked or encrypted, with boxes and sealed body for the profile's key and its number."""
    part = update.private
    assert part is not None  # noqa: S101 - the caller has looked
    terms, device = Terms.parse(part.terms), profile.identity.public
    cards = [helper.card for helper in terms.helpers]
    words = terms.layout.read(update.encoded)
    seeds = [(card.public, seed) for card, seed in zip(cards, part.seeds, strict=True)]
    if terms.kind == BFV:
        body = profile.encrypt(terms.key, terms.layout, words)
    else:
        body = masks.masked(terms.layout, words, seeds, context=part.context, device=device).tobytes()
    boxes = tuple(
        profile.box(card.box_key, seed, context=part.context, device=device, helper=card.public, seq=update.seq)
        for card, seed in zip(cards, part.seeds, strict=True)
    )
    return sealed(replace(update, private=replace(part, boxes=boxes)), profile.key, profile.seal, body)


def prepare_private(
    content: SumContent,
    job: SumJob,
    profile: Profile,
    *,
    seq: int,
    base: int,
    metrics: dict[str, float],
    frame_bytes: int,
) -> OutstandingUpdate:
    """The update with this content, ready to be sent."""
    assert profile.sums is not None  # noqa: S101 - only a device with pinned helpers gets such a job
    update = OutstandingUpdate(
        seq=seq,
        base=base,
        samples=1,  # all weigh the same: a weight would single out a device in the sum
        metrics=metrics,
        codec=PRIVATE,
        encoding=RAW,
        encoded=content.words,
        frame_bytes=frame_bytes,
        private=PrivatePart(terms=job.terms.content(), context=job.context, min=profile.sums.min, seeds=content.seeds),
    )
    return masked(update, profile)
