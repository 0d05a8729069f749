"""The Hypothesis profiles of conftest.py: a run in CI draws new inputs, and the seed that it prints repeats them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
DRAWING = """
from hypothesis import given, settings, strategies as st

@settings(max_examples=5)
@given(number=st.integers(0, 2**60))
def test_numbers_are_drawn(number):
    print("drawn", number)
"""


def drawn(test: Path, *options: str, ci: bool = True) -> tuple[str | None, list[str]]:
    """The seed that a run prints, and what its one test draws."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-c", ROOT / "pyproject.toml", "-p", "conftest", *options, test],
        env={**environment, "PYTHONPATH": str(ROOT / "tests"), **({"CI": "true"} if ci else {})},
        cwd=test.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seed = re.search(r"--hypothesis-seed=(\d+)", ran.stdout)
    return None if seed is None else seed[1], re.findall(r"drawn \d+", ran.stdout)


@pytest.fixture
def test(tmp_path: Path) -> Path:
    path = tmp_path / "test_drawing.py"
    path.write_text(DRAWING, encoding="utf-8")
    return path


def test_in_ci_each_run_draws_other_inputs_and_its_seed_repeats_them(test: Path) -> None:
    seed, first = drawn(test)
    assert seed is not None
    assert drawn(test, f"--hypothesis-seed={seed}") == (seed, first)
    other_seed, second = drawn(test)
    assert (other_seed, second) != (seed, first)
    assert second != first


def test_elsewhere_no_seed_is_chosen(test: Path) -> None:
    assert drawn(test, ci=False)[0] is None
