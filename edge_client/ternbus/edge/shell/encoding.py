"""What a training sends of its change: a block, or the values of a private sum."""

from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.learn import private_sum
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.local_change import LocalChange
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.sum_content import SumContent


def encoded(
    job: StartTraining, change: Vector | LocalChange, residual: Vector | None, samples: int, random_source: RandomSource
) -> tuple[Block | SumContent, Vector | None]:
    """The content by the job's codec, and the new residual.

    Only a private sum draws from ``random_source``. It takes no residual, and leaves none.
    """
    if job.sums is None:
        compressed = compress(job.schema, job.plan, change, residual, job.seed)
        return compressed.block, compressed.residual
    vector = change.vector() if isinstance(change, LocalChange) else change
    content = private_sum.encode(
        job.schema, job.sums.terms, job.plan, vector, samples=samples, random_source=random_source
    )
    return content, None
