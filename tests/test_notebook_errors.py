"""What a notebook shows of an error: the lines of the user's own code and one that helps, in place of Ternbus' own."""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ternbus.broker.errors import ConfigError
from ternbus.lab import ClientError
from ternbus.lab.notebook.callbacks import checked

RUN = """
import sys, nbformat
from nbclient import NotebookClient
found = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(found, timeout=100, kernel_name="python3", allow_errors=True).execute()
nbformat.write(found, sys.argv[1])
"""
CELLS = [
    """
import numpy as np
from torch import nn
from ternbus.lab import Federation
data = np.ones((9, 3), np.float32), np.arange(9) % 2
calls = 0
def loss(outputs, targets):
    global calls
    calls += 1
    if calls > 1:
        raise ValueError("no such digit")
    return nn.functional.cross_entropy(outputs, targets)
def federation(**more):
    return Federation(lambda: nn.Linear(3, 2), clients={"a": data}, test=data, **more)
""",
    "1\nfederation(lss=3)",
    "federation(loss=loss).simulate(versions=1, callbacks=[])",
    "federation(loss=loss).simulate(versions=1, callbacks=[])",
]


def shown(directory: Path) -> list[str]:
    """What each cell of `CELLS` shows of its error, in a kernel of its own."""
    path = directory / "errors.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each.strip()) for each in CELLS]), path)
    environment = {**os.environ, "IPYTHONDIR": str(directory)}
    subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=directory, env=environment, timeout=300, check=True)
    found: Any = nbformat.read(path, as_version=4)
    errors = [[output for output in cell["outputs"] if "traceback" in output] for cell in found["cells"]]
    return ["\n".join(line for error in each for line in error["traceback"]) for each in errors]


@pytest.mark.slow
def test_a_kernel_shows_the_lines_of_the_cells_and_the_text(tmp_path: Path) -> None:
    _, config, client, evaluation = (text.splitlines() for text in shown(tmp_path))
    assert [line.strip() for line in config[1::2]] == [
        "federation(lss=3)",
        'return Federation(lambda: nn.Linear(3, 2), clients={"a": data}, test=data, **more)',
    ]
    assert re.fullmatch(r'  File ".*/ipykernel_\d+/\d+\.py", line 2, in <module>', config[0])
    assert config[4].startswith("ConfigError: Federation() has no argument 'lss' (do you mean loss?)")
    assert len(config) == 5
    place = r"bug in the task: \d+\.py, line 10: ValueError: no such digit"
    said = next(line for line in client if line.startswith("ClientError: a, training on version 0: a "))
    assert re.search(place, said)
    assert "ValueError: no such digit" in client  # the traceback of the user's own function
    assert 'raise ValueError("no such digit")' in map(str.strip, client)
    assert not [line for line in client if line.startswith("  File ") and "ipykernel" not in line]
    assert evaluation[-2].strip() == 'raise ValueError("no such digit")'  # the line, though another error names it
    assert re.search(place, evaluation[-1])
    assert len(evaluation) == 5


def test_the_lines_of_an_error_are_those_of_its_causes_too() -> None:
    def given() -> None:
        try:
            _ = dict[str, int]()["cause"]
        except KeyError as error:
            raise ConfigError("give another") from error

    with pytest.raises(ConfigError) as raised:
        given()
    raised.value.add_note("a note")
    lines = raised.value._render_traceback_()
    assert [line.splitlines()[1].strip() for line in lines[:-2]] == [
        "given()",
        'raise ConfigError("give another") from error',
        '_ = dict[str, int]()["cause"]',
    ]
    assert lines[-2:] == ["ConfigError: give another", "a note"]


def test_of_the_traceback_of_a_client_s_code_the_lines_of_ternbus_are_left_out() -> None:
    given: Any = [test_an_error_that_is_its_own_cause_is_shown_once, 3]
    try:
        checked(given)
    except ConfigError as wrong:
        trace = "".join(traceback.format_exception(wrong))
    error = ClientError("a", 0, "a bug in the task")
    error.add_note(trace)
    said = "\n".join(error._render_traceback_()).splitlines()
    place, line = next((number, line) for number, line in enumerate(said) if line.startswith("  File "))
    assert "test_notebook_errors.py" in line
    assert said[place + 1].strip() == "checked(given)"
    assert said[-1].startswith("ternbus.broker.errors.ConfigError: callbacks has 3: ")
    assert ("callbacks.py" in trace, "callbacks.py" in "".join(said)) == (True, False)
    assert error.__notes__ == [trace]  # whole, wherever else it is shown


def test_an_error_that_is_its_own_cause_is_shown_once() -> None:
    error = ConfigError("do this")
    with pytest.raises(ConfigError) as raised:
        raise error from error
    assert raised.value._render_traceback_()[-1] == "ConfigError: do this"
