"""The examples for those who come from other systems: short, what they reach, and as notebooks that run."""

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LIMITS = {"from_secretflow": 12, "from_tff": 15, "from_fate": 25}  # lines of the user's own
LEAST = {"from_secretflow": 0.9, "from_tff": 0.9, "from_fate": 0.85}


def own_lines(text: str) -> list[str]:
    """Without the title, imports, comments and empty lines."""
    lines = text.splitlines()
    _, *statements = ast.parse(text).body
    kept = [each for each in statements if not isinstance(each, ast.Import | ast.ImportFrom)]
    found = [line for each in kept for line in lines[each.lineno - 1 : each.end_lineno]]
    return [line for line in found if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("name", LIMITS)
def test_an_example_is_as_short_as_it_says(name: str) -> None:
    assert 0 < len(own_lines((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))) <= LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_a_notebook_has_the_lines_of_its_example(name: str) -> None:
    made = runpy.run_path(str(EXAMPLES / "notebooks.py"))["notebook"](EXAMPLES / f"{name}.py")
    kept: Any = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert made == kept, "run python examples/notebooks.py"
    code = "\n".join(cell["source"] for cell in kept["cells"] if cell["cell_type"] == "code")
    script = own_lines((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    takes_data = any("--data" in line for line in script)
    shown = [line for line in script if "parse" not in line]  # a notebook has no command line
    folder = ['folder: Path | None = None  # or Path("DIR")'] if takes_data else []
    assert own_lines(f"''\n{code}") == [*folder, *shown, "run.plot()"]


EXTENDED = pytest.mark.extended


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["from_tff", *(pytest.param(name, marks=EXTENDED) for name in ("from_secretflow", "from_fate"))]
)
def test_an_example_prints_what_it_reached(name: str) -> None:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    found = re.search(r"^accuracy (\d\.\d+)$", printed.getvalue(), flags=re.MULTILINE)
    assert found is not None
    assert float(found[1]) > LEAST[name]


@pytest.mark.slow
def test_the_writers_of_mnist_are_clients_where_their_data_are(tmp_path: Path) -> None:
    """A few images in the files that torchvision and QMNIST have."""
    raw, rng = tmp_path / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, count in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)).astype(np.uint8))
        write_idx(raw / f"{split}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    rows = np.zeros((60, 8), np.int32)
    rows[:, 2] = np.arange(60) % 6 + 100
    write_idx(raw / "qmnist-train-labels-idx2-int", rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["from_tff.py", "--data", str(tmp_path)])
        names = runpy.run_path(str(EXAMPLES / "from_tff.py"), run_name="__main__")
    assert names["run"].devices["samples"].tolist() == [10] * 5


def write_idx(path: Path, array: Any) -> None:
    kind = {np.uint8: 0x08, np.int32: 0x0C}[array.dtype.type]
    header = bytes([0, 0, kind, array.ndim]) + b"".join(size.to_bytes(4) for size in array.shape)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


RUN = """
import sys, nbformat
from nbclient import NotebookClient
found = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(found, timeout=500, kernel_name="python3").execute()
nbformat.write(found, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["from_secretflow", *(pytest.param(name, marks=EXTENDED) for name in ("from_tff", "from_fate"))],
)
def test_a_notebook_runs_in_jupyter_and_shows_what_it_reached(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made.ipynb"
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(EXAMPLES / f"{name}.ipynb"), str(made)],
        cwd=tmp_path, env={**os.environ, "IPYTHONDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    outputs = [output for cell in nbformat.read(made, as_version=4)["cells"] for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    assert float(texts.partition("accuracy ")[2].split()[0]) > LEAST[name]
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("<progress max=" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)
