"""An accepted update as one value, the same from its validation to the ledger and back."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.merge_log import Contribution
from ternbus.broker.protocol.ternary import Block

PUBLISHED, WITHDRAWN = "published", "withdrawn"  # what becomes of the candidate of a canary


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedUpdate:
    """Who sent an update, what it says of itself, and what it counts in a merge; all but its content.

    An update counts by ``samples`` times ``discount``. A merge rule turns these into the update's weight, which the
    log of merges names (``Contribution.weight``).
    """

    device: str
    key: KeyId
    seq: int
    base: int  # the version that it was trained on
    digest: bytes  # of the message, as the log of merges names it
    staleness: int  # versions between its base and the model when it was accepted
    samples: int  # how many examples it counts for: what its device says, or less where that is unusual
    discount: float  # s(staleness), times the factor that clipped it to the largest norm, or to what is usual
    codec: str
    encoding: str
    epsilon: float | None = None  # what its device says that it has spent of privacy, with this update
    # What the bound on later updates follows from; None where nothing is bounded by it, or was not yet.
    norm: float | None = None  # of its block, at most (``influence.norm_at_most``), and no more than the bound
    stated: int | None = None  # samples, as its device says
    loss: float | None = field(default=None, compare=False)  # of the training, as its device says; not kept
    arm: int | None = None  # of the search, by which it was trained
    seconds: float | None = None  # of its training, as its device says; only with an arm
    gain: float | None = None  # of its training on held-out data, the higher the better; likewise

    def contribution(self, weight: float) -> Contribution:
        """Its line in the log of merges, with the weight that a rule gave it (``mean.Change``)."""
        return Contribution(device=self.device, key=self.key, seq=self.seq, digest=self.digest, weight=weight)


BufferedUpdate = tuple[AcceptedUpdate, Block]  # an update in the buffer, and its content


class Journal:
    """What waits for a merge as it is written down, in order, each content read when it is its turn. Here: nothing."""

    def __iter__(self) -> Iterator[BufferedUpdate]:
        return iter(())

    def of(self, device: str) -> Iterator[BufferedUpdate]:
        """Only the updates of a device."""
        return (each for each in self if each[0].device == device)
