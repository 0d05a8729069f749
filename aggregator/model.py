"""The global model between merges: what devices hold, what the server holds, and the buffer in between."""

from dataclasses import dataclass, field

from aggregator import optimizer
from aggregator.downlink import next_block
from aggregator.merge import Mean
from aggregator.optimizer import ServerState
from aggregator.settings import Settings
from broker.schema import Schema, Vector, vector_digest
from broker.ternary import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An update in the buffer; its block is already in the mean."""

    device: str
    staleness: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge made."""

    version: int
    digest: bytes
    block: Block
    updates: int
    staleness_mean: float
    staleness_max: int


@dataclass(slots=True, kw_only=True)
class Model:
    """``published`` is bit for bit what every device holds; ``server.target`` is ahead of it by the residual."""

    settings: Settings
    schema: Schema
    version: int
    published: Vector
    server: ServerState
    digest: bytes = b""
    buffer: list[Accepted] = field(default_factory=list)
    _mean: Mean = field(init=False)

    def __post_init__(self) -> None:
        self._mean = Mean(self.schema)
        self.digest = self.digest or vector_digest(self.published)

    def accept(self, update: Accepted, block: Block, discount: float) -> None:
        """Put an update into the buffer; ``discount`` is s(tau), times what clipping left of it."""
        self._mean.add(block, update.samples, discount)
        self.buffer.append(update)

    def merge(self) -> Merged:
        """Step the server's optimizer with the buffer's mean, and the published vector towards it."""
        self.step_server()
        block = next_block(self.schema, self.settings.downlink.codec, self.published, self.server.target)
        staleness = [update.staleness for update in self.buffer]
        self.publish(block)
        merged = Merged(
            version=self.version,
            digest=self.digest,
            block=block,
            updates=len(staleness),
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
        )
        self.buffer = []
        return merged

    def step_server(self) -> None:
        """The optimizer's part of a merge; replayed from the ledger at start."""
        about = self.settings.optimizer
        self.server = optimizer.apply(
            about.name, self.server, self._mean.result(), learning_rate=about.learning_rate, momentum=about.momentum
        )
        self._mean = Mean(self.schema)

    def publish(self, block: Block) -> None:
        """The devices' part of a merge, done by the very code that they use."""
        self.published = block.apply(self.published)
        self.version += 1
        self.digest = vector_digest(self.published)
