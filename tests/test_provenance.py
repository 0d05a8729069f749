"""A finished run of an experiment counts only for the same code of the task, data and version of Ternbus."""

import os
from pathlib import Path

import pytest

from ternbus.broker.errors import ConfigError
from ternbus.broker.version import software
from ternbus.lab.experiment.provenance import DATA, Provenance, code_digest


@pytest.fixture
def task(tmp_path: Path) -> str:
    """A task that imports a module, a package and a relative one from its folder, and has another beside it."""
    folder = tmp_path / "code"
    (folder / "parts").mkdir(parents=True)
    (folder / "own.py").write_text("import numpy\nimport helper\nfrom parts import one\nTASK = None\n")
    (folder / "helper.py").write_text("import json\n")
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "one.py").write_text("from . import two\n")
    (folder / "parts" / "two.py").write_text("")
    (folder / "stranger.py").write_text("")
    return f"{folder}/own.py:TASK"


@pytest.mark.parametrize("name", ["own.py", "helper.py", "parts/__init__.py", "parts/one.py", "parts/two.py"])
def test_the_code_is_the_module_and_what_it_imports_from_its_folder(task: str, name: str) -> None:
    path = Path(task).parent / name
    before = code_digest(task)
    assert code_digest(task) == before
    path.write_text(path.read_text() + "# changed\n")
    assert code_digest(task) != before


def test_other_files_in_the_folder_are_no_code_of_the_task(task: str) -> None:
    before = code_digest(task)
    (Path(task).parent / "stranger.py").write_text("changed = True\n")
    assert code_digest(task) == before


def test_a_module_that_python_cannot_read_has_a_digest_until_its_run_says_why(task: str) -> None:
    before = code_digest(task)
    (Path(task).parent / "own.py").write_text("def (\n")
    assert code_digest(task) != before
    with pytest.raises(ConfigError, match="no file"):
        code_digest(f"{Path(task).parent}/none.py")


def test_built_in_tasks_have_digests() -> None:
    assert len({code_digest(name) for name in ("digits", "digits-numpy")}) == 1  # of one package
    assert code_digest("digits") != code_digest("json:TASK")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("1")
    (folder / "b").write_text("2")
    (folder / "broken").symlink_to(folder / "nothing")
    return folder


def name_of(folder: Path, data: Path) -> str:
    """The data's name in a new process."""
    return Provenance(folder).of("digits-numpy", data)["data"]


def test_data_are_the_same_until_a_file_changes_or_goes(tmp_path: Path, data: Path) -> None:
    first = name_of(tmp_path, data)
    assert name_of(tmp_path, data) == first
    (data / "computed").write_text("a task keeps features here")
    assert name_of(tmp_path, data) == first
    os.utime(data / "deep" / "a", ns=(1, 1))
    second = name_of(tmp_path, data)
    (data / "b").unlink()
    third = name_of(tmp_path, data)
    assert len({first, second, third, ""}) == 4


def test_without_a_note_of_the_data_a_new_one_is_made(tmp_path: Path, data: Path) -> None:
    first = name_of(tmp_path, data)
    for text in ("", "[]", '{"a": 1}', "{}"):
        (tmp_path / DATA).write_text(text)
        assert name_of(tmp_path, data) == first
    made_of = Provenance(tmp_path).of("digits-numpy", None)
    assert (made_of["data"], made_of["software"]) == ("", software())
