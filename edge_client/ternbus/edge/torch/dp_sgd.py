"""Per-sample differential privacy in PyTorch: DP-SGD (Abadi et al. 2016, algorithm 1) on Opacus' per-sample gradients.

Opacus computes each sample's gradient. Gradients of any values are clipped and summed here, in float64. The samples of
a batch, and the noise, come from `RandomSource`: the secure source of Opacus, torchcsprng, is no longer built. Opacus
is loaded at the first use.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.noise import ROUNDING, RandomSource
from ternbus.edge.plan.plan import Plan

Loss = Callable[[Tensor], Tensor]  # rows -> the mean loss of these samples
ELEMENTS: Final = 2**18  # of gradients, converted to float64 at a time


def descend(
    model: nn.Module,
    loss: Loss,
    *,
    probe: Callable[[], Tensor],
    samples: int,
    plan: Plan,
    rate: float,
    random_source: RandomSource,
) -> dict[str, float]:
    """Run the plan's steps on the model, in place, in training mode. Returns their number and the last batch's loss.

    The sum of clipped gradients and noise is divided by the expected batch size, `plan.batch_size` or all samples: the
    actual batch size is secret. A sample affects the steps by its clipped gradient only: one whose gradient is not
    finite, or whose loss raises an exception, counts as 0 (and in `failed_samples` of the result). `probe` returns the
    loss of samples that are not from the data. Raises `ConfigError` for a model without per-sample gradients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = local_optimizer.begin(plan, [parameter.detach() for parameter in parameters])
    expected = min(plan.batch_size, samples)
    ends = None if plan.local_seconds is None else time.perf_counter() + plan.local_seconds
    steps = 0
    with _per_sample(model):
        gradients = _Gradients(model, parameters, loss, plan.dp_clip)
        gradients.check(probe)
        while steps < plan.steps(samples) and not (steps and ends is not None and time.perf_counter() >= ends):
            sums = gradients.clipped_sums(torch.from_numpy(random_source.sampled(samples, expected / samples)))
            with torch.no_grad():
                noisy = [
                    _noisy(clipped, parameter, plan.dp_noise * plan.dp_clip, expected, random_source)
                    for clipped, parameter in zip(sums, parameters, strict=True)
                ]
                optimizer.step(noisy, rate)
            steps += 1
    failed = {"failed_samples": float(gradients.failed)} if gradients.failed else {}
    return {"loss": gradients.loss, "steps": steps, **failed}


def clipped_sum(gradients: Sequence[Tensor], clip: float) -> tuple[list[Tensor], int]:
    """sum_i g_i·min(1, C/|g_i|) over the samples i, in float64; and the number of samples that are not finite.

    Those count as 0. Each of `gradients` belongs to one parameter, shape (samples, …); |g_i| is the L2 norm over all
    parameters. One sample changes the sum by at most C, up to the rounding of a float64 sum.
    """
    flat = [gradient.reshape(len(gradient), -1) for gradient in gradients]
    squares = torch.zeros(len(flat[0]), dtype=torch.float64)
    for gradient in flat:
        for rows, part in _doubled(gradient):
            squares[rows] += torch.linalg.vecdot(part, part)
    finite = squares.isfinite()  # no square of a finite float32 overflows in float64
    failed = int((~finite).sum())
    factors = ROUNDING * (clip / squares.sqrt()).clamp(max=1.0)
    factors[~finite] = 0.0
    sums = []
    for gradient, shaped in zip(flat, gradients, strict=True):
        total = torch.zeros(gradient.shape[1], dtype=torch.float64)
        for rows, part in _doubled(gradient):
            if failed:
                part[~finite[rows]] = 0.0
            total.addmv_(part.t(), factors[rows])
        sums.append(total.reshape(shaped.shape[1:]))
    return sums, failed


def _doubled(gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Convert some rows at a time to float64, always in the same memory, which stays in the processor's cache."""
    count = max(1, ELEMENTS // max(1, gradient.shape[1]))
    memory = torch.empty(min(count, len(gradient)), gradient.shape[1], dtype=torch.float64)
    for first in range(0, len(gradient), count):
        rows = slice(first, min(first + count, len(gradient)))
        yield rows, memory[: rows.stop - first].copy_(gradient[rows])


@dataclass(slots=True)
class _Gradients:
    """The clipped gradients of a batch, under Opacus' hooks."""

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    compute_loss: Loss
    clip: float
    failed: int = 0  # samples, in all steps
    loss: float = 0.0  # of the last batch

    def check(self, probe: Callable[[], Tensor]) -> None:
        """Raises `ConfigError` for a model with a parameter that its output does not depend on."""
        try:
            probe().backward()
        except Exception:  # noqa: BLE001 - a task may reject samples that are not data; later failures are counted
            return self._forget()
        unused = any(getattr(parameter, "grad_sample", None) is None for parameter in self.parameters)
        self._forget()
        if unused:
            raise ConfigError(
                'dp = "sample" cannot train this model: its output does not depend on one of its parameters; freeze it'
            )
        return None

    def clipped_sums(self, rows: Tensor) -> list[Tensor]:
        """Returns one sum for each parameter. If the batch raises an exception, its samples are tried one by one."""
        if not len(rows):  # an empty batch must stay secret too
            return self._nothing()
        found = self._of_batch(rows)
        if found is not None:
            return found
        total = self._nothing()
        for row in rows:
            if (one := self._of_batch(row[None])) is None:
                self.failed += 1
                continue
            total = [sum_ + each for sum_, each in zip(total, one, strict=True)]
        return total

    def _of_batch(self, rows: Tensor) -> list[Tensor] | None:
        """Returns None for a batch whose loss raises an exception."""
        try:
            loss = self.compute_loss(rows)
            loss.backward()
            found, failed = clipped_sum([self._of_samples(each, len(rows)) for each in self.parameters], self.clip)
            self.loss = loss.item()
        except Exception:  # noqa: BLE001 - it may depend on the data: nobody else may see it
            self._forget()
            return None
        self._clear()
        self.failed += failed
        return found

    def _of_samples(self, parameter: nn.Parameter, count: int) -> Tensor:
        found: Tensor | None = getattr(parameter, "grad_sample", None)
        if found is None:  # the loss of this batch does not depend on the parameter
            return parameter.detach().new_zeros(count, *parameter.shape)
        return found

    def _nothing(self) -> list[Tensor]:
        return [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in self.parameters]

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus adds it

    def _forget(self) -> None:
        """Remove what an interrupted forward pass has left in the hooks: the next pass would use it."""
        self._clear()
        for parameter in self.parameters:
            setattr(parameter, "_forward_counter", 0)  # noqa: B010 - internal to Opacus, which has no function to reset it
        for keeper in (*self.parameters, *self.model.modules()):
            for name in ("_current_grad_sample", "activations", "max_batch_len"):
                if hasattr(keeper, name):
                    delattr(keeper, name)


def _noisy(
    clipped: Tensor, parameter: nn.Parameter, deviation: float, expected: int, random_source: RandomSource
) -> Tensor:
    noise = torch.from_numpy(random_source.normal(parameter.numel())).reshape(parameter.shape)
    return ((clipped + noise * deviation) / expected).to(parameter.dtype)


@contextmanager
def _per_sample(model: nn.Module) -> Iterator[None]:
    """Attach Opacus' hooks to the model."""
    try:
        from opacus import GradSampleModule  # noqa: PLC0415 - takes seconds and loads scipy
        from opacus.validators import ModuleValidator  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        raise ConfigError("the plan's dp = \"sample\" needs the package opacus: pip install 'ternbus[dp]'") from error
    if errors := ModuleValidator.validate(model, strict=False):
        raise ConfigError(f'dp = "sample" cannot train this model: {errors[0]}')
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the inputs need no gradient
        hooked = GradSampleModule(model)
        try:
            yield
        finally:
            hooked.to_standard_module()
            for parameter in model.parameters():
                parameter.grad = None
