"""The buffers of a model, by where the model has them: forward() may assign one anew, as in `self.mean = new`.

The place then holds another tensor. Before a training, `Buffers` puts back what `model()` put there; after it, a
buffer's values are those of the tensor that is in its place now.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ternbus.broker.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Place:
    module: nn.Module
    attribute: str
    made: Tensor  # by model()

    @property
    def now(self) -> object:
        return getattr(self.module, self.attribute, None)


class Buffers:
    """Those of a model's buffers that are among ``tensors``; the model was just made.

    Others are the model's own affair, as tables that it fills when it first needs them: it may keep elsewhere that it
    has, and would not fill one again that was put back.
    """

    def __init__(self, model: nn.Module, tensors: Container[Tensor]) -> None:
        self._of: dict[Tensor, list[_Place]] = {}
        for module in model.modules():
            for attribute, made in vars(module).get("_buffers", {}).items():
                if made is not None and made in tensors:
                    self._of.setdefault(made, []).append(_Place(module, attribute, made))
        self._shapes = {made: made.shape for made in self._of if not is_lazy(made)}

    def put_back(self) -> None:
        """Have each place hold again what `model()` put there; values that were changed in place stay changed."""
        for places in self._of.values():
            for place in places:
                if place.now is not place.made:
                    setattr(place.module, place.attribute, place.made)

    def now(self, name: str, made: Tensor) -> Tensor:
        """The tensor that is in the place of this one, or in all of its places; a parameter itself.

        Raises `ConfigError` for another shape, and for tied buffers that are so no longer.
        """
        if made not in self._of:
            return made
        found = []
        for place in self._of[made]:
            now = place.now
            if not isinstance(now, Tensor) or now.shape != self._shapes[made]:
                shape = tuple(now.shape) if isinstance(now, Tensor) else None
                raise ConfigError(
                    f"training gave the buffer {name} the shape {shape}, and model() {tuple(self._shapes[made])}: keep "
                    "its shape, or register it with persistent=False"
                )
            found.append(now)
        first, *others = found
        if any(other is not first and not torch.equal(first, other) for other in others):
            raise ConfigError(
                f"training put different tensors in the {len(others) + 1} places of the buffer {name}, which is one "
                "tensor in model(): change it in place, as by copy_()"
            )
        return first


class Snapshot:
    """The values of a tensor that each training begins with anew."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._shape = tensor.shape
        # Nothing can be written to a tensor that repeats its own memory (expand), and to sparse ones nobody does.
        usual = tensor.layout is torch.strided and not tensor.is_nested
        writable = usual and all(
            stride or size <= 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        self._values = tensor.detach().clone() if writable else None

    def load(self) -> None:
        """Write them to the tensor; one that was resized in place gets its shape back."""
        if self._values is not None:
            if self.tensor.shape != self._shape:
                self.tensor.resize_(self._shape)
            self.tensor.copy_(self._values)
