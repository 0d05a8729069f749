"""The files that a platform or a library reads from the root: valid, and in agreement with the project."""

import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from support.deployed import BIN

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CITATION = ROOT / "CITATION.cff"


@pytest.mark.parametrize(("schema", "file"), [("github-workflows", WORKFLOW), ("citation-file-format", CITATION)])
def test_it_follows_its_schema(schema: str, file: Path) -> None:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_names_the_project_as_its_metadata_do() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load(CITATION.read_text())
    assert citation["version"] == project["version"] == version("ternbus")
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]


def test_a_hosted_run_does_what_the_local_one_does_on_a_python_that_is_supported() -> None:
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"][0] == lowest
