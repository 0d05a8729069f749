"""Models go out to safetensors files and come in from them; what is none is refused in words."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_safetensors, save_safetensors

SHAPES = {"conv.weight": (8, 3, 3, 4), "conv.bias": (8,), "fc.weight": (10, 32), "scale": ()}


def model() -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_safetensors_go_out_and_come_in(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, model(), {"version": "3"})
    back = load_safetensors(path)
    assert {name: (array.shape, array.tobytes()) for name, array in back.items()} == {
        name: (array.shape, array.tobytes()) for name, array in model().items()
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_only_floating_point_tensors_are_the_model_s(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415 - to write what we do not

    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones(3, dtype=np.float64), "steps": np.ones(1, dtype=np.int64)}, path)
    assert list(load_safetensors(path)) == ["w"]
    assert load_safetensors(path)["w"].dtype == np.float32
    save_file({"steps": np.ones(1, dtype=np.int64)}, path)
    with pytest.raises(ConfigError, match="no floating-point tensor"):
        load_safetensors(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match=r"^cannot read .*model\.safetensors: No such file or directory$"):
        load_safetensors(path)
    with pytest.raises(ConfigError, match=r"^cannot read .*: it is a folder, not a file; give the path of a file$"):
        load_safetensors(tmp_path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"cannot read .* as a safetensors file"):
        load_safetensors(path)
    with pytest.raises(ConfigError, match="cannot write"):
        save_safetensors(tmp_path / "none" / "model.safetensors", model(), {})
    with pytest.raises(ConfigError, match=r"^cannot write \.: it is a folder, not a file; give the path of a file$"):
        save_safetensors(Path(), model(), {})


def test_bfloat16_is_asked_to_be_saved_otherwise(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(ConfigError, match="save the tensor as float32"):
        load_safetensors(path)
