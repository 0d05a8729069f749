"""Models and blocks for the tests."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from stranger.wire import Floats, Schema

SMALL: dict[str, tuple[int, ...]] = {"one.weight": (40, 50), "one.bias": (40,), "two.weight": (64, 33)}
BIG: dict[str, tuple[int, ...]] = {"one.weight": (500, 400), "one.bias": (200,), "two.weight": (300, 333)}


def make_model(path: Path, shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, Floats]:
    """Write an initial model, with a tiny number and a negative zero in it."""
    random = np.random.default_rng(seed)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["one.weight"][0, :2] = [1e-40, -0.0]
    save_file(tensors, path)
    return tensors


def trits(schema: Schema, random: np.random.Generator) -> NDArray[np.int8]:
    """Draw a trit for each element of a ternary tensor."""
    return random.integers(-1, 2, sum(t.size for t in schema.ternary)).astype(np.int8)


def make_block(schema: Schema, codec: str, seed: int) -> bytes:
    """Draw an update's content."""
    random = np.random.default_rng(seed)
    if codec == "float32":
        return schema.float_content(random.normal(scale=0.01, size=schema.elements).astype(np.float32))
    dense = random.normal(scale=0.01, size=sum(t.size for t in schema.dense)).astype(np.float32)
    scales = random.uniform(0.001, 0.1, len(schema.ternary)).astype(np.float32)
    return schema.ternary_content([float(s) for s in scales], trits(schema, random), dense)


def assert_close(after: Floats, before: Floats, change: Floats) -> None:
    """`after` is `before + change` but for a few float32 roundings, and a coefficient's, to 2^-12 of it at most."""
    exact = before.astype(np.float64) + change.astype(np.float64)
    largest = np.maximum(np.maximum(np.abs(before), np.abs(change)), np.abs(after))
    assert np.all(np.abs(after - exact) <= 2 * np.spacing(largest) + np.abs(change) * 2.0**-12)
