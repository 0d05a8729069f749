"""The travelling state of a PyTorch model: the tensors that are sent, and how to load and read them.

Trained parameters and floating-point buffers (batch norm's statistics) are sent, in float32; tied ones once, under
their first name. Not sent are frozen parameters, all tensors of a submodule whose parameters are all frozen, counters,
buffers that are not finite (a mask of -inf, an observer that has seen nothing) or empty, and those not persistent.
A buffer may be another tensor after a training: `buffers.py`.
Local are the tensors that a task names with `stays_local`: they are trained like the others, and not sent either.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.tensor_kinds import NONNEGATIVE, TensorKinds, matching
from ternbus.edge.plan.tensors import FloatArray, Tensors
from ternbus.edge.torch.buffers import Buffers, Snapshot

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class TravellingState:
    """The part of a model that is sent. Raises `ConfigError` for a model that cannot be trained in a federation.

    `stays_local` has glob patterns of the names of local tensors.
    """

    def __init__(self, model: nn.Module, stays_local: Sequence[str] = ()) -> None:
        self._model = model
        self._frozen = list(_frozen_parts(model))
        stays = {id(tensor) for part in self._frozen for tensor in part.state_dict(keep_vars=True).values()}
        self._state: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        reset: dict[str, Tensor] = {}
        local: dict[str, Tensor] = {}
        self.not_finite: list[str] = []
        """The buffers that stay on the device because they are not finite as `model()` makes them."""
        self.unsized: list[str] = []
        """The buffers that stay on the device because a training gives them their size."""
        names = _names(model)
        unsized = {id(buffer) for part in _unsized_parts(model, names) for buffer in part.buffers()}
        for tensor, (name, *others) in names.items():
            parameter = isinstance(tensor, nn.Parameter)
            if id(tensor) in stays or (parameter and not tensor.requires_grad):
                fixed[name] = tensor
            elif not (parameter or tensor.is_floating_point()):
                reset[name] = tensor
            else:
                _check(name, tensor)
                if not parameter and not torch.isfinite(tensor).all():
                    self.not_finite.append(name)
                    reset[name] = tensor
                elif not parameter and (id(tensor) in unsized or not tensor.numel()):
                    self.unsized.append(name)
                    reset[name] = tensor
                elif matching([name, *others], stays_local):
                    local[name] = tensor
                else:
                    self._state[name] = tensor
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("the model has no trained parameter: set requires_grad = True for at least one")
        _check_patterns(stays_local, [name for each in names.values() for name in each], self._state)
        _check_apart({**self._state, **local})
        self._fixed = fixed
        self._buffers = Buffers(model, names)
        self._reset = [Snapshot(tensor) for tensor in reset.values()]
        self._local = {name: (tensor, tensor.detach().clone()) for name, tensor in local.items()}
        dtypes = {parameter.dtype for parameter in model.parameters()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        """The dtype of all parameters; None if they differ."""

    @property
    def local(self) -> list[str]:
        """The names of the local tensors."""
        return list(self._local)

    @property
    def fixed(self) -> Mapping[str, bytes]:
        """A digest of each frozen tensor: they must be the same on every device."""
        return {name: _digest(tensor) for name, tensor in self._fixed.items()}

    def load(self, tensors: Tensors) -> None:
        """Load `tensors`, which are not modified, into the model, and reset what stays on the device.

        Local tensors that are not among `tensors` become as `model()` made them.
        """
        with torch.no_grad():
            self._buffers.put_back()
            for each in self._reset:
                each.load()
            for name, tensor in self._state.items():
                tensor.copy_(_rounded(tensor, tensors[name]))
            for name, (tensor, first) in self._local.items():
                own = tensors.get(name)
                if own is not None and own.shape != tensor.shape:
                    raise ConfigError(
                        f"the local tensor {name} that this device keeps has shape {own.shape}, and the task's model "
                        f"{tuple(tensor.shape)}: the task was changed; give that tensor another name, or change it back"
                    )
                tensor.copy_(first if own is None else _rounded(tensor, own))

    @property
    def kinds(self) -> TensorKinds:
        """Statistics are the buffers, which no optimizer trains; of these a `running_var` is never negative."""
        buffers = frozenset(name for name, tensor in self._state.items() if not isinstance(tensor, nn.Parameter))
        return TensorKinds(statistics=buffers, nonnegative=matching(buffers, NONNEGATIVE))

    def arrays(self) -> dict[str, FloatArray]:
        """Copies of the tensors in float32. Raises `ConfigError` for one that is not finite."""
        found = {name: _float32(tensor) for name, tensor in self._state.items()}
        for name, array in found.items():
            if not np.isfinite(array).all():
                if torch.isfinite(self._state[name]).all():
                    raise ConfigError(
                        f"the model's {name} has a value that float32, in which it travels, has no room for: give it "
                        "smaller ones, or, where it is a buffer such as a mask, register it with persistent=False"
                    )
                raise ConfigError(f"the model's {name} is not finite as model() makes it: give it finite values")
        return found

    def local_arrays(self) -> dict[str, FloatArray]:
        """Copies of the local tensors in float32."""
        return {name: _float32(self._buffers.now(name, tensor)) for name, (tensor, _) in self._local.items()}

    def check_private(self) -> None:
        """Raises `ConfigError` for a local buffer: under `dp = "sample"` it would carry samples to later trainings."""
        for name, (tensor, _) in self._local.items():
            if not isinstance(tensor, nn.Parameter):
                raise ConfigError(
                    f'dp = "sample" does not allow stays_local for the buffer {name}, which is no parameter and may '
                    "hold samples: leave it out of stays_local"
                )

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
                now = self._buffers.now(name, tensor)
                change = now.detach().cpu().double() - _rounded(tensor, start[name]).cpu().double()
                share = 1.0 if parameter else statistics_rate
                arrays[name] = _float32(torch.tensor(start[name]).double() + share * change)
        return arrays

    def begin_training(self) -> None:
        """Set training mode, except in frozen submodules, whose batch norm keeps its statistics.

        To be called after `load`: a variance below 0, which an older aggregator may have published, becomes 0.
        """
        self._model.train()
        for part in self._frozen:
            part.eval()
        with torch.no_grad():
            for name in self.kinds.nonnegative:
                self._state[name].clamp_(min=0)


def initial(
    draw: Callable[[int], nn.Module], seed: int, task: str, stays_local: Sequence[str]
) -> dict[str, FloatArray]:
    """Version 0 of the model that `draw` makes with a seed.

    Raises `ConfigError` if it cannot be trained in a federation, or if models differ in what must be the same.
    """
    travelling = TravellingState(draw(seed), stays_local)
    fixed = travelling.fixed
    if fixed or travelling.not_finite:
        again = TravellingState(draw(seed + 1), stays_local)
        if differ := [name for name in fixed if fixed[name] != again.fixed.get(name)]:
            raise ConfigError(
                f"the task {task}: {differ[0]} is frozen and not sent, but differs in each call of model(): "
                "load it from a checkpoint, or draw it with a fixed seed"
            )
        if changing := sorted({*travelling.not_finite} ^ {*again.not_finite}):
            raise ConfigError(
                f"the task {task}: the buffer {changing[0]} is finite in one call of model() and not in another: "
                "give it fixed initial values, or register it with persistent=False"
            )
    return travelling.arrays()


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    """All names of each tensor of the model."""
    found: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # get_extra_state may be anything
            found.setdefault(tensor, []).append(name)
    return found


def _check_patterns(patterns: Sequence[str], names: Sequence[str], state: Mapping[str, Tensor]) -> None:
    for pattern in patterns:
        if not matching(names, [pattern]):
            raise ConfigError(
                f"stays_local has {pattern!r}, which matches no tensor of the model; its first is named {names[0]!r}"
            )
    if not any(isinstance(tensor, nn.Parameter) for tensor in state.values()):
        raise ConfigError("all trained parameters match stays_local, and nothing is left to train together")


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest submodules that have parameters, all of them frozen."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        yield module
    elif trained:
        for child in module.children():
            yield from _frozen_parts(child)


def _unsized_parts(module: nn.Module, persistent: Container[Tensor]) -> Iterator[nn.Module]:
    """The largest submodules without parameters in which a buffer is empty, as in an observer of each channel.

    Their first batch gives them their sizes, also to the buffers beside the empty one.
    """
    if next(module.parameters(), None) is not None:
        for child in module.children():
            yield from _unsized_parts(child, persistent)
    elif any(each in persistent and each.is_floating_point() and not each.numel() for each in module.buffers()):
        yield module


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
