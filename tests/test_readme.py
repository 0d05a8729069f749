"""The README's code runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = "\n".join(text for language, text in BLOCKS if language == "sh")

pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def block(word: str) -> str:
    (found,) = [text for text in PYTHON if word in text]
    return found


def test_the_model_loads_into_the_tasks_model_and_predicts(tmp_path: Path) -> None:
    run(tmp_path, "-m", "ternbus", "edge", "init-model", "digits", "model.safetensors")
    printed = run(tmp_path, "-W", "error", "-c", block("load_file"))
    assert printed.startswith("tensor([")


def test_the_example_of_ones_own_task_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(block("TASK = "), encoding="utf-8")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        inputs = rng.normal(size=(90, 20)).astype(np.float32)
        np.savez(tmp_path / f"{split}.npz", inputs=inputs, targets=inputs[:, :3].argmax(1))
    run(tmp_path, "-m", "ternbus", "edge", "init-model", "my_task:TASK", "model.safetensors")
    program = """
from pathlib import Path
from ternbus.edge import Plan, load_task
task = load_task("my_task:TASK")
start = task.initial(0)
trained = task.trainer(data=Path(), partition="iid:0/2").train(start, Plan(local_epochs=20), version=0, seed=0)
judge = task.evaluator(data=Path())
print(judge.evaluate(start).values["loss"] > judge.evaluate(trained.tensors).values["loss"])
"""
    assert run(tmp_path, "-c", program).strip() == "True"


def test_every_command_and_option_that_it_names_exists(tmp_path: Path) -> None:
    lines = re.findall(r"^(?:\S+/)?ternbus (.*?)(?: #.*)?$", SHELL, flags=re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        package, command, *rest = line.split()
        text = run(tmp_path, "-m", "ternbus", package, command, "--help")
        for option in (word for word in rest if word.startswith("--")):
            assert option in text, f"{line}: no {option}"
