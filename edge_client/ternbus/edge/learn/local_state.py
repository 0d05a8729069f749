"""Tensors that stay on a device (FedBN, Li et al. 2021; FedPer, Arivazhagan et al. 2019), as its outbox has them."""

import numpy as np

from ternbus.edge.plan.tensors import FloatArray, Tensors


def packed(tensors: Tensors) -> bytes:
    """The tensors in the safetensors format; empty for none. Equal tensors give equal bytes."""
    if not tensors:
        return b""
    from safetensors.numpy import save  # noqa: PLC0415 - most devices keep none

    return save({name: np.asarray(tensor, np.float32, order="C") for name, tensor in tensors.items()})


def unpacked(content: bytes) -> dict[str, FloatArray]:
    """What `packed` was given."""
    if not content:
        return {}
    from safetensors.numpy import load  # noqa: PLC0415 - as above

    return load(content)
