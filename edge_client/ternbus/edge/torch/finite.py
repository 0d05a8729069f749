"""Why the model of a training is not finite: its samples, where some are not, or else the plan."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from ternbus.edge.learn.task import TrainingError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.torch.batches import is_pair
from ternbus.edge.torch.tree import Tree, parts

if TYPE_CHECKING:
    from ternbus.edge.torch.samples import Samples

READ_MAX: Final = 1000  # samples of a Dataset or a stream, which may take long to read


def diverged(samples: "Samples", plan: Plan) -> TrainingError:
    """Of a training by the plan whose model is not finite: what to do, by whether the samples are finite.

    It does not look where others would see how long that takes, and may not know of the failure.
    """
    known = plan.dp == NO_DP and samples.at_random
    if (known or not plan.hides_failures) and (faults := samples.faults()):
        return TrainingError(f"{faults}: correct or remove them in the data")
    return TrainingError(
        "training diverged (the data are finite, the model is not): lower the plan's learning_rate"
        if known
        else "training diverged (the model is not finite): lower the plan's learning_rate, or remove NaN from the data"
    )


def parts_of(sample: Tree) -> Iterator[tuple[str, Tree]]:
    """The parts of a sample, or of a batch, by what they are called."""
    return zip(("inputs", "targets"), sample, strict=True) if is_pair(sample) else iter([("values", sample)])


def told(name: str, count: int, of: str) -> str:
    return f"{count} of {of} samples have {name} that are not finite (NaN or infinity)"


def faults_of(samples: Iterable[Any], total: int) -> str:
    """How many of the first samples are not finite, in words; empty if none is. They are read one at a time.

    Those that come after one that cannot be read are not looked at.
    """
    counts: Counter[str] = Counter()
    read = 0
    try:
        for sample in islice(samples, READ_MAX):
            counts.update(name for name, part in parts_of(sample) if not _is_finite(part))
            read += 1
    except code_errors():
        pass
    of = str(total) if read >= total else f"the first {read}"
    return next((told(name, counts[name], of) for name in ("inputs", "targets", "values") if counts[name]), "")


def _is_finite(part: Tree) -> bool:
    return all(map(_is_finite_leaf, parts(part)))


def _is_finite_leaf(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return bool(torch.isfinite(leaf).all())
    if not isinstance(leaf, np.ndarray | np.generic | float | complex) and not hasattr(leaf, "to_numpy"):
        return True
    array = np.asarray(leaf)
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
