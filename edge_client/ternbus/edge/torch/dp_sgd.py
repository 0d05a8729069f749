"""Per-sample differential privacy in PyTorch: DP-SGD (Abadi et al. 2016, algorithm 1) on Opacus' per-sample gradients.

Opacus clips the gradients and sums them. The samples of a batch, and the noise, come from `RandomSource`: the secure
source of Opacus, torchcsprng, is no longer built. Opacus is loaded at the first use.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

Loss = Callable[[Tensor], Tensor]  # rows -> the mean loss of these samples


def descend(
    model: nn.Module, loss: Loss, *, samples: int, plan: Plan, rate: float, random_source: RandomSource
) -> dict[str, float]:
    """Run the plan's steps on the model, in place, in training mode. Returns their number and the last batch's loss.

    The sum of clipped gradients and noise is divided by the expected batch size, `plan.batch_size` or all samples: the
    actual batch size is secret. Raises `ConfigError` for a model without per-sample gradients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = local_optimizer.begin(plan, [parameter.detach() for parameter in parameters])
    expected = min(plan.batch_size, samples)
    steps, last = plan.steps(samples), 0.0
    with _per_sample(model, parameters, plan) as clipping:
        for _ in range(steps):
            clipping.zero_grad(set_to_none=True)
            rows = random_source.sampled(samples, expected / samples)
            if len(rows):
                last = _backward(loss(torch.from_numpy(rows)), clipping, parameters)
            with torch.no_grad():
                noisy = [_noisy(each, plan.dp_noise * plan.dp_clip, expected, random_source) for each in parameters]
                optimizer.step(noisy, rate)
    return {"loss": last, "steps": steps}


def _backward(loss: Tensor, clipping: "DPOptimizer", parameters: Sequence[nn.Parameter]) -> float:
    """Compute each parameter's `summed_grad`, the sum of its clipped per-sample gradients. Returns the loss."""
    loss.backward()
    if any(getattr(parameter, "grad_sample", None) is None for parameter in parameters):
        raise ConfigError(
            'dp = "sample" cannot train this model: its output does not depend on one of its parameters; freeze it'
        )
    clipping.clip_and_accumulate()
    return loss.item()


def _noisy(parameter: nn.Parameter, deviation: float, expected: int, random_source: RandomSource) -> Tensor:
    noise = torch.from_numpy(random_source.normal(parameter.numel())).reshape(parameter.shape) * deviation
    clipped: Tensor | None = getattr(parameter, "summed_grad", None)
    if clipped is not None:  # else the batch was empty, which must stay secret too
        noise += clipped
    return (noise / expected).to(parameter.dtype)


@contextmanager
def _per_sample(model: nn.Module, parameters: Sequence[nn.Parameter], plan: Plan) -> Iterator["DPOptimizer"]:
    """Attach Opacus' hooks to the model; yields the optimizer that clips the per-sample gradients."""
    try:
        from opacus import GradSampleModule  # noqa: PLC0415 - takes seconds and loads scipy
        from opacus.optimizers import DPOptimizer  # noqa: PLC0415 - likewise
        from opacus.validators import ModuleValidator  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        raise ConfigError("the plan's dp = \"sample\" needs the package opacus: pip install 'ternbus[dp]'") from error
    if errors := ModuleValidator.validate(model, strict=False):
        raise ConfigError(f'dp = "sample" cannot train this model: {errors[0]}')
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the inputs need no gradient
        hooked = GradSampleModule(model)
        try:
            yield DPOptimizer(
                torch.optim.SGD(parameters, lr=1.0),  # never steps: the plan's optimizer does
                noise_multiplier=0.0,
                max_grad_norm=plan.dp_clip,
                expected_batch_size=None,
                loss_reduction="sum",
            )
        finally:
            hooked.to_standard_module()
            for parameter in parameters:
                parameter.grad = None
