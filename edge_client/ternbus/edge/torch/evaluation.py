"""The evaluation of a model on a whole split, on as many samples at a time as the memory allows."""

from typing import TYPE_CHECKING, Any, Final

import torch

from ternbus.edge.learn.failure import is_memory
from ternbus.edge.learn.task import Evaluation
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch import device as devices
from ternbus.edge.torch import scoring
from ternbus.edge.torch.autotune import Way
from ternbus.edge.torch.batches import inputs_of, prepared
from ternbus.edge.torch.objective import Objective, number
from ternbus.edge.torch.samples import Samples
from ternbus.edge.torch.tree import Tree, leaves, row_count, some_rows

if TYPE_CHECKING:
    from ternbus.edge.torch.torch_task import TorchTask
    from ternbus.edge.torch.trainer import Shared

BATCH: Final = 500  # samples at most, unless the plan asks for more
# Bytes of inputs, up to which a batch may be larger than the plan's: outputs of the first layers, several times as
# large, should stay in a processor's cache. A GPU needs more samples for all of its cores.
PROCESSOR_BYTES: Final = 2**18
GPU_BYTES: Final = 2**20


class Scorer:
    """Evaluates the model, which is loaded and in evaluation mode, on one split."""

    def __init__(self, task: "TorchTask", samples: Samples, objective: Objective) -> None:
        self._task = task
        self._samples = samples
        self._objective = objective
        self._metrics = task.measured()
        self._sample_bytes: int | None = None  # of one sample's inputs as float32; 0 if they are no numbers

    def evaluated(self, shared: "Shared", plan: Plan, *, private: bool) -> Evaluation:
        """The metrics of all samples at once, and their mean loss.

        If the samples are private, a batch that raises an exception, as it may for one of them, does not end it early:
        others see when the training after it begins.
        """
        scores, loss, fault = scoring.Scores(self._metrics), 0.0, None
        for batch in self._samples.in_order(min(shared.fitting, self._size(plan, shared.device))):
            try:
                loss += self._scored(shared, batch, plan, scores)
            except code_errors() as error:
                if not private:
                    raise
                fault = fault or error
        if fault is not None:
            raise fault
        return Evaluation(
            samples=len(self._samples),
            values={**scores.values(), "loss": loss / len(self._samples)},
            better=scoring.directions(self._metrics),
        )

    def _scored(self, shared: "Shared", batch: Tree, plan: Plan, scores: scoring.Scores) -> float:
        """The sum of the samples' losses; what is too much for the memory is evaluated by halves."""
        count = row_count(batch)
        fits = count is None or count <= shared.fitting
        try:
            if fits:
                ready = prepared(batch, shared.travelling.dtype, shared.device)
                found = self._objective.of(shared.model, ready, plan, Way())
                loss = number(found.value, "loss()") * (count or _count(batch))
                if (outputs := self._objective.outputs(shared.model, ready, found)) is not None:
                    scores.keep(outputs, self._task.targets(ready))
                return loss
        except code_errors() as error:
            if count is None or count < 2 or not is_memory(error):
                raise
            shared.fitting = count // 2
        assert count is not None  # noqa: S101 - see above
        devices.free(shared.device)
        half = shared.fitting
        parts = [some_rows(batch, slice(first, first + half)) for first in range(0, count, half)]
        return sum(self._scored(shared, part, plan, scores) for part in parts)

    def _size(self, plan: Plan, device: torch.device) -> int:
        """The plan's batch size, so that an evaluation needs no more memory than a training; more of small inputs."""
        asked = plan.evaluation_batch_size
        if asked is not None:
            return asked
        if self._sample_bytes is None:
            found = list(leaves(inputs_of(self._samples.batch(slice(0, 1)))))
            size = sum(leaf.numel() * max(4, leaf.element_size()) for leaf in found)
            numbers = all(leaf.is_floating_point() or leaf.dtype == torch.uint8 for leaf in found)  # no words to embed
            self._sample_bytes = max(1, size) if numbers else 0
        limit = PROCESSOR_BYTES if device.type == "cpu" else GPU_BYTES
        small = limit // self._sample_bytes if self._sample_bytes else 0
        return min(BATCH, max(plan.batch_size, small))


def _count(batch: Any) -> int:
    """The number of samples of a batch whose tensors differ in length: that of the first."""
    return next((len(leaf) for leaf in leaves(batch) if leaf.dim()), 1)
