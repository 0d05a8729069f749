"""Which tensors of a PyTorch model travel, and how they get into it and out again.

Trained parameters and floating-point buffers (batch norm's statistics) travel, in float32; tied ones once, under their
first name. What is frozen stays where it is: frozen parameters, and all of a part of the model in which every
parameter is frozen. So do counters, and buffers that are not persistent.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.tensors import FloatArray, Tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VARIANCE = "running_var"  # as torch's batch norm calls it


class TravellingState:
    """The part of a model that travels. Raises `ConfigError` for a model that cannot be trained in a federation."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen = list(_frozen_parts(model))
        stays = {id(tensor) for part in self._frozen for tensor in part.state_dict(keep_vars=True).values()}
        self._state: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        counters: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor) or id(tensor) in seen:
                continue  # get_extra_state may be anything
            seen.add(id(tensor))
            parameter = isinstance(tensor, nn.Parameter)
            if id(tensor) in stays or (parameter and not tensor.requires_grad):
                fixed[name] = tensor
            elif parameter or tensor.is_floating_point():
                _check(name, tensor)
                self._state[name] = tensor
            else:
                counters[name] = tensor
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("the model has no parameter that is trained: every one has requires_grad = False")
        _check_apart(self._state)
        self._fixed = fixed
        self._counters = {name: (tensor, tensor.detach().clone()) for name, tensor in counters.items()}
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        """Of every parameter; None where they differ."""

    @property
    def fixed(self) -> Mapping[str, bytes]:
        """A digest of each tensor that is frozen: they must be the same on every device."""
        return {name: _digest(tensor) for name, tensor in self._fixed.items()}

    def load(self, tensors: Tensors) -> None:
        """Make the model that of `tensors`, which are not modified; counters start again."""
        with torch.no_grad():
            for name, tensor in self._state.items():
                tensor.copy_(_rounded(tensor, tensors[name]))
                if name.endswith(VARIANCE):
                    tensor.clamp_(min=0)  # what others added may have carried it below, and batch norm takes its root
            for counter, first in self._counters.values():
                counter.copy_(first)

    def arrays(self) -> dict[str, FloatArray]:
        """Copies in float32."""
        return {name: _float32(tensor) for name, tensor in self._state.items()}

    def arrays_since(self, start: Tensors, statistics_rate: float) -> dict[str, FloatArray]:
        """The same of a model that was trained from `start`; of a buffer's change only that share.

        A training brings batch norm's statistics all the way to the device's own. When several do so from one version
        their sum overshoots, and ever wider: with a delay of d versions x += g·(own - x) settles only for
        g < 2·sin(pi / (4d + 2)) (Levin & May 1976).

        Where a dtype cannot hold `start` exactly, what rounding it took is no part of what was learned: it is undone.
        """
        arrays = {}
        for name, tensor in self._state.items():
            parameter = isinstance(tensor, nn.Parameter)
            if parameter and tensor.dtype == torch.float32:
                arrays[name] = _float32(tensor)
            else:
                change = tensor.detach().double() - _rounded(tensor, start[name]).double()
                share = 1.0 if parameter else statistics_rate
                arrays[name] = _float32(torch.tensor(start[name]).double() + share * change)
        return arrays

    def begin_training(self) -> None:
        """Training mode, but for what is frozen: there batch norm uses the statistics that it came with."""
        self._model.train()
        for part in self._frozen:
            part.eval()


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of the model that have parameters, all of them frozen."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        yield module
    elif trained:
        for child in module.children():
            yield from _frozen_parts(child)


def _check(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ConfigError(f"the model's {name} has no shape yet: give the lazy layer its sizes (Linear for LazyLinear)")
    if tensor.dtype not in DTYPES:
        dtype, known = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, DTYPES[0]))
        raise ConfigError(f"the model's {name} is {dtype}: only real numbers travel, make it {known} or freeze it")
    if tensor.device.type == "meta":
        raise ConfigError(f"the model's {name} has no values (it is on the device 'meta')")


def _check_apart(state: Mapping[str, Tensor]) -> None:
    """Tensors that share memory without being the same parameter: loading one would overwrite the other."""
    places = []
    for name, tensor in state.items():
        if not tensor.numel():
            raise ConfigError(f"the model's {name} is empty, of shape {tuple(tensor.shape)}: leave it out")
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if span < tensor.numel():
            raise ConfigError(f"the model's {name} repeats its own memory (expand?): call .clone() on it")
        first = tensor.data_ptr()
        places.append((first, first + span * tensor.element_size(), name))
    places.sort()
    for (_, end, one), (begin, _, other) in pairwise(places):
        if begin < end:
            raise ConfigError(
                f"the model's {one} and {other} share memory but are two tensors: to tie them assign the same Parameter"
            )


def _rounded(tensor: Tensor, values: FloatArray) -> Tensor:
    # torch.tensor() copies: `values` may be a view of a read-only vector, and must stay as it is.
    return torch.tensor(values).to(tensor.dtype)


def _float32(tensor: Tensor) -> FloatArray:
    return tensor.detach().to(torch.float32, copy=True).contiguous().numpy()


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return blake2b(values.numpy().data, digest_size=16).digest()
