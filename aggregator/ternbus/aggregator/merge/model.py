"""The global model between merges: the published vector, the server's state, and the buffer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ternbus.aggregator.merge import optimizer, statistics
from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate, Journal
from ternbus.aggregator.merge.downlink import next_block
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.merge.mean import Mean, Sum
from ternbus.aggregator.merge.optimizer import ServerState
from ternbus.aggregator.merge.robust import Buffered, gather
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol.merge_log import Contribution
from ternbus.broker.protocol.schema import Schema, Vector, vector_digest
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.protocol.ternary import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge made."""

    version: int
    digest: bytes
    block: Block
    contributions: tuple[Contribution, ...]
    updates: int
    staleness_mean: float
    staleness_max: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What a merge comes to that has not happened: the version, and the server's state with it."""

    merged: Merged
    updates: tuple[AcceptedUpdate, ...]
    server: ServerState
    published: Vector


@dataclass(slots=True, kw_only=True)
class Model:
    """``published`` is bit for bit what every device holds; ``server.target`` is ahead of it by the residual."""

    settings: Settings
    schema: Schema
    version: int
    published: Vector
    server: ServerState
    kinds: TensorKinds  # none: as merges were before statistics were told apart
    digest: bytes = b""
    buffer: list[AcceptedUpdate] = field(default_factory=list)
    summing: Callable[[Schema], Sum] = ExactSum  # of buffers that begin from now on
    begins: Callable[[], None] = lambda: None  # called as a merge begins, which takes its time
    _gathered: Mean | Buffered = field(init=False)

    def __post_init__(self) -> None:
        self._gathered = gather(self.settings.merge, self.schema, self.summing)
        self.digest = self.digest or vector_digest(self.published)

    def accept(self, update: AcceptedUpdate, block: Block) -> None:
        """Put an update into the buffer."""
        self._gathered.add(update, block)
        self.buffer.append(update)

    def sum_by(self, summing: Callable[[Schema], Sum]) -> None:
        """Add up by another way from the next update on, or from the next buffer where this one has begun."""
        self.summing = summing
        if not self.buffer:
            self.empty()

    def empty(self) -> None:
        """Forget the buffer; what comes next is merged by the settings of now."""
        self.buffer = []
        self._gathered = gather(self.settings.merge, self.schema, self.summing)

    def refill(self, updates: Iterable[BufferedUpdate]) -> None:
        """Let the buffer hold these and no others."""
        self.empty()
        for update, block in updates:
            self.accept(update, block)

    def drop(self, device: str, journal: Journal) -> None:
        """Take a device's updates out of the buffer, the whole of which is in the journal."""
        left, gathered = [update for update in self.buffer if update.device != device], self._gathered
        # after a candidate was dissolved the sum lacks its updates
        if isinstance(gathered, Mean) and len(gathered.updates) == len(self.buffer) and gathered.subtracts:
            gathered.remove(journal.of(device))
            self.buffer = left
        else:
            self.refill(each for each in journal if each[0].device != device)
        assert len(self.buffer) == len(left)  # noqa: S101 - nothing that was accepted may be lost with them

    def merge(self) -> Merged:
        """Step the server's optimizer with what the buffer comes to, and the published vector towards it."""
        return self.adopt(self.prepare())

    def prepare(self, block: Block | None = None) -> Prepared:
        """What the buffer comes to, with a new buffer begun; nothing else changes.

        ``block`` is the change of the published vector where it was decided before.
        """
        self.begins()
        before = self.server
        weights = self.step_server()
        server, self.server = self.server, before
        if block is None:
            block = next_block(self.schema, self.settings.downlink.codec, self.published, server.target)
        published, staleness = block.apply(self.published), [update.staleness for update in self.buffer]
        merged = Merged(
            version=self.version + 1,
            digest=vector_digest(published),
            block=block,
            contributions=tuple(map(AcceptedUpdate.contribution, self.buffer, weights)),
            updates=len(staleness),
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
        )
        prepared = Prepared(merged=merged, updates=tuple(self.buffer), server=server, published=published)
        self.empty()
        return prepared

    def adopt(self, prepared: Prepared) -> Merged:
        """Let it have happened."""
        self.server, self.published = prepared.server, prepared.published
        self.version, self.digest = prepared.merged.version, prepared.merged.digest
        return prepared.merged

    def skip(self) -> Merged:
        """Make a version of no update, whose model is the one before; the buffer stays as it is."""
        block = next_block(self.schema, self.settings.downlink.codec, self.published, self.published)
        self.publish(block)
        return Merged(
            version=self.version,
            digest=self.digest,
            block=block,
            contributions=(),
            updates=0,
            staleness_mean=0.0,
            staleness_max=0,
        )

    def step_server(self) -> tuple[float, ...]:
        """The optimizer's part of a merge; replayed from the ledger at start. Returns the updates' weights."""
        change = self._gathered.result()
        before = self.server.target
        self.server = optimizer.apply(self.settings.optimizer, self.server, change.delta)
        statistics.average(self.schema, self.kinds, before, change.delta, self.server)
        return change.weights

    def restart_server(self) -> None:
        """Begin anew where the last optimizer came to: what it kept beside that means nothing to another."""
        self.server = optimizer.init(self.settings.optimizer, self.server.target)

    def publish(self, block: Block) -> None:
        """The devices' part of a merge, done by the very code that they use."""
        self.published = block.apply(self.published)
        self.version += 1
        self.digest = vector_digest(self.published)
