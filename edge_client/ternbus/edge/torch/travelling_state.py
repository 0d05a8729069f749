"""The travelling state of a PyTorch model: the tensors that are sent, and how to load and read them.

Trained parameters and floating-point buffers (batch norm's statistics) are sent, in float32; tied ones once, under
their first name. Not sent are frozen parameters, all tensors of a submodule whose parameters are all frozen, counters,
and buffers that are not persistent.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.tensors import FloatArray, Tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VARIANCE = "running_var"  # its name in torch's batch norm


class TravellingState:
    """The part of a model that is sent. Raises `ConfigError` for a model that cannot be trained in a federation."""

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
            raise ConfigError("the model has no trained parameter: set requires_grad = True for at least one")
        _check_apart(self._state)
        self._fixed = fixed
        self._counters = {name: (tensor, tensor.detach().clone()) for name, tensor in counters.items()}
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        """The dtype of all parameters; None if they differ."""

    @property
    def fixed(self) -> Mapping[str, bytes]:
        """A digest of each frozen tensor: they must be the same on every device."""
        return {name: _digest(tensor) for name, tensor in self._fixed.items()}

    def load(self, tensors: Tensors) -> None:
        """Load `tensors`, which are not modified, into the model, and reset its counters."""
        with torch.no_grad():
            for name, tensor in self._state.items():
                tensor.copy_(_rounded(tensor, tensors[name]))
                if name.endswith(VARIANCE):
                    tensor.clamp_(min=0)  # merged updates can make it negative, and batch norm takes its root
            for counter, first in self._counters.values():
                counter.copy_(first)

    def arrays(self) -> dict[str, FloatArray]:
        """Copies of the tensors in float32."""
        return {name: _float32(tensor) for name, tensor in self._state.items()}

    def arrays_since(self, start: Tensors, statistics_rate: float) -> dict[str, FloatArray]:
        """Copies in float32 after training from `start`, with the share `statistics_rate` of the buffers' change.

        A training moves batch norm's statistics all the way to the device's own. If several devices do so from one
        version, the sum overshoots, and diverges: with a delay of d versions x += g·(own - x) is stable only for
        g < 2·sin(pi / (4d + 2)) (Levin & May 1976).

        If a dtype cannot represent `start` exactly, the rounding error is not part of the change: it is removed.
        """
        arrays = {}
        for name, tensor in self._state.items():
            parameter = isinstance(tensor, nn.Parameter)
            if parameter and tensor.dtype == torch.float32:
                arrays[name] = _float32(tensor)
            elif not parameter and statistics_rate == 0:  # whatever the change is: 0 times infinity is NaN
                arrays[name] = np.array(start[name], np.float32)
            else:
                change = tensor.detach().cpu().double() - _rounded(tensor, start[name]).cpu().double()
                share = 1.0 if parameter else statistics_rate
                arrays[name] = _float32(torch.tensor(start[name]).double() + share * change)
        return arrays

    def begin_training(self) -> None:
        """Set training mode, except in frozen submodules, whose batch norm keeps its statistics."""
        self._model.train()
        for part in self._frozen:
            part.eval()


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest submodules that have parameters, all of them frozen."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        yield module
    elif trained:
        for child in module.children():
            yield from _frozen_parts(child)


def _check(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ConfigError(f"the model's {name} has no shape yet: use a layer with sizes, as Linear for LazyLinear")
    if tensor.dtype not in DTYPES:
        dtype, known = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, DTYPES[0]))
        raise ConfigError(f"the model's {name} is {dtype}, which cannot be sent: make it {known} or freeze it")
    if tensor.device.type == "meta":
        raise ConfigError(f"the model's {name} has no values: create it on the CPU instead of the device 'meta'")


def _check_apart(state: Mapping[str, Tensor]) -> None:
    """Raises `ConfigError` for tensors that share memory but are not one parameter."""
    # Loading one of them would overwrite the other.
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
                f"the model's {one} and {other} share memory but are two tensors: assign the same Parameter to tie them"
            )


def _rounded(tensor: Tensor, values: FloatArray) -> Tensor:
    # torch.tensor() copies: `values` may be a view of a read-only vector, and must stay as it is.
    return torch.tensor(values).to(tensor.dtype)


def _float32(tensor: Tensor) -> FloatArray:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return blake2b(values.cpu().numpy().data, digest_size=16).digest()
