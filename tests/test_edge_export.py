"""A task's model as TorchScript and as ONNX gives the outputs of the model, for any number of samples."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import save_safetensors
from ternbus.edge.shell import cli
from ternbus.edge.tasks import digits

RUN = CliRunner()
DICTS = """
import torch
from torch import nn
from ternbus.edge import TorchTask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        return self.out((self.words(ids) * mask[..., None]).sum(1))


def data(folder, split):
    ids = torch.arange(40).reshape(8, 5) % 9
    return {"ids": ids, "mask": torch.ones(8, 5), "labels": torch.arange(8) % 2}


TASK = TorchTask(name="dicts", model=Net, data=data)
ODD = TorchTask(name="odd", model=lambda: Odd(), data=data)


class Odd(Net):
    def forward(self, ids, mask):
        raise ValueError("no graph of this")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = tmp_path / "model.safetensors"
    save_safetensors(made, digits.TASK.initial(3), {})
    return made


def exported(*arguments: object) -> str:
    done = RUN.invoke(cli.app, ["export", *map(str, arguments)])
    if isinstance(done.exception, ConfigError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def outputs_of_digits(count: int) -> tuple[torch.Tensor, np.ndarray]:
    net = digits.model().eval()
    net.load_state_dict({name: torch.from_numpy(each) for name, each in digits.TASK.initial(3).items()}, strict=False)
    inputs = digits.data(None, "test")[0][:count]
    with torch.no_grad():
        return inputs, net(inputs).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
def test_torchscript_and_onnx_give_the_models_outputs(count: int, model: Path, tmp_path: Path) -> None:
    inputs, expected = outputs_of_digits(count)
    script, graph = tmp_path / "model.pt", tmp_path / "model.onnx"
    assert "parameters of" in exported("digits", script, "--model", model)
    exported("digits", graph, "--model", model)
    with pytest.warns(DeprecationWarning, match="torch.jit.load"), torch.no_grad():
        found = torch.jit.load(str(script))(inputs).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(str(graph))
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_with_named_inputs_is_written_too(tmp_path: Path) -> None:
    (tmp_path / "dicts.py").write_text(DICTS)
    task, model, graph = f"{tmp_path}/dicts:TASK", tmp_path / "m.safetensors", tmp_path / "m.onnx"
    assert RUN.invoke(cli.app, ["init-model", task, str(model)]).exit_code == 0
    exported(task, graph, "--model", model)
    exported(task, tmp_path / "m.pt", "--model", model)
    session = onnxruntime.InferenceSession(str(graph))
    assert [each.name for each in session.get_inputs()] == ["ids", "mask"]
    given = {"ids": np.arange(15).reshape(3, 5) % 9, "mask": np.ones((3, 5), np.float32)}
    assert session.run(None, given)[0].shape == (3, 2)
    for ending in (".pt", ".onnx"):
        with pytest.raises(ConfigError, match=f"the model of odd cannot be written as {ending}"):
            exported(f"{tmp_path}/dicts:ODD", tmp_path / f"odd{ending}", "--model", model)


def test_what_cannot_be_written_is_refused_in_words(model: Path, tmp_path: Path) -> None:
    wrong: list[tuple[list[object], str]] = [
        (["digits", tmp_path / "x.onnx"], "ternbus edge export TASK OUT.onnx --model FILE"),
        (["digits", tmp_path / "x.h5", "--model", model], "ends in .pt or .onnx"),
        (["digits-numpy", tmp_path / "x.pt", "--model", model], "has no PyTorch model"),
    ]
    for arguments, why in wrong:
        with pytest.raises(ConfigError, match=why):
            exported(*arguments)
    other = tmp_path / "other.safetensors"
    save_safetensors(other, {"w": np.zeros(3, np.float32)}, {})
    with pytest.raises(ConfigError, match="is missing in the model file"):
        exported("digits", tmp_path / "x.pt", "--model", other)
