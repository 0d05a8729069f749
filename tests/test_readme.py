"""The code in README and in the pages of docs/ works as it is printed there."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ternbus.command import app
from ternbus.lab.scenario import scenario

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md"]
WORDS = 1600  # what a newcomer reads in five minutes
NESTED = {"log"}  # commands that have commands of their own

pytestmark = pytest.mark.slow


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for tag, text in found if tag == language]


def block(word: str) -> str:
    (found,) = [text for text in blocks(README, "python") if word in text]
    return found


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@cache
def help_of(*names: str) -> str:
    """In this process: a page names dozens of commands, and each would cost a second of imports."""
    found = CliRunner().invoke(app, [*names, "--help"])
    assert found.exit_code == 0, found.output
    return found.output


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `ternbus` of each command in the page's shell blocks."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    for line in re.findall(r"^(?:sudo -u ternbus )?(?:\S+/)?ternbus (.*?)(?: #.*)?$", text, flags=re.MULTILINE):
        yield line.split()


def test_it_is_read_in_five_minutes() -> None:
    shown = re.sub(r"<!--.*?-->", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(shown.split()) <= WORDS


def test_the_model_loads_into_the_tasks_model_and_predicts(tmp_path: Path) -> None:
    run(tmp_path, "-m", "ternbus", "edge", "init-model", "digits", "model.safetensors")
    printed = run(tmp_path, "-W", "error", "-c", block("load_file"))
    assert printed.startswith("tensor([")


def test_the_example_of_ones_own_task_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(block("TASK = "), encoding="utf-8")
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        inputs = rng.normal(size=(90, 20)).astype(np.float32)
        np.savez(tmp_path / "data" / f"{split}.npz", inputs=inputs, targets=inputs[:, :3].argmax(1))
    run(tmp_path, "-m", "ternbus", "edge", "check", "my_task:TASK", "--data", "data")
    run(tmp_path, "-m", "ternbus", "edge", "init-model", "my_task:TASK", "model.safetensors")
    program = """
from pathlib import Path
from ternbus.edge import Plan, load_task
task = load_task("my_task:TASK")
start = task.initial(0)
data = Path("data")
trained = task.trainer(data=data, partition="iid:0/2").train(start, Plan(local_epochs=20), version=0, seed=0)
judge = task.evaluator(data=data)
print(judge.evaluate(start).values["loss"] > judge.evaluate(trained.tensors).values["loss"])
"""
    assert run(tmp_path, "-c", program).strip() == "True"


def test_the_federation_of_arrays_runs_and_becomes_a_task(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(block("Federation("), encoding="utf-8")
    run(tmp_path, "-W", "error", "notebook.py")
    assert (tmp_path / "my_task.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_imports_public_names_only(page: Path) -> None:
    imported = re.findall(r"^\s*(?:from|import) (ternbus\S*)", "\n".join(blocks(page, "python")), flags=re.MULTILINE)
    public = re.compile(r"ternbus\.(?:edge|lab|broker)|ternbus\.edge\.(?:adapters|tasks\.\w+)")
    assert [name for name in imported if not public.fullmatch(name)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name_of)
def test_every_command_and_option_that_a_page_names_exists(page: Path) -> None:
    for component, command, *rest in commands(page):
        names = [component, command, *(rest[:1] if command in NESTED else [])]
        known = help_of(*names)
        for option in (word for word in rest if word.startswith("--")):
            assert option in known, f"ternbus {' '.join(names)} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_of_a_command_in_the_text_of_a_page_exists(page: Path) -> None:
    said = r"`(--[a-z-]+)[^`]*`\s+of\s+`(?:ternbus )?([a-z]+) ([a-z-]+)[^`]*`"
    for option, component, command in re.findall(said, page.read_text(encoding="utf-8")):
        assert option in help_of(component, command), f"ternbus {component} {command} has no {option}"


def test_the_scenarios_of_the_lab_page_are_some() -> None:
    whole, *parts = blocks(ROOT / "docs" / "lab.md", "toml")
    assert scenario.loads(whole, "docs/lab.md").devices == 20
    assert parts
    for part in parts:
        scenario.loads(f'task = "digits"\n{part}', "docs/lab.md")
