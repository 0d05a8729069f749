"""The corpus is read or refused with a known error; the fuzzer finds planted faults, and memory that grows."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import __main__ as command
from fuzz.__main__ import GROWTH_KIB_MAX, Outcome, words
from fuzz.seeds import CORPUS, ROOT, seeds
from fuzz.targets import TARGETS, ends_well

CASES = [(target, file) for target in TARGETS for file in sorted((CORPUS / target).iterdir())]


@pytest.mark.parametrize(("target", "file"), CASES, ids=[f"{target}-{file.name}" for target, file in CASES])
def test_the_corpus_is_read_or_refused(target: str, file: Path) -> None:
    refused = file.name.startswith(("bad-", "found-")) and target != "update"  # what a core refuses it only counts
    assert ends_well(TARGETS[target], file.read_bytes()) != refused


def test_the_corpus_holds_what_the_vectors_say_today() -> None:
    made = seeds()
    assert set(made) == set(TARGETS)
    for target in made:
        stored = {file.name: file.read_bytes() for file in (CORPUS / target).iterdir() if "found-" not in file.name}
        assert stored.keys() == made[target].keys(), "run: python -m fuzz.seeds"
        if not target.endswith("-toml"):  # those change with every key, and an older one is as good a beginning
            assert stored == made[target], "run: python -m fuzz.seeds"


def test_names_are_offered_to_the_fuzzer_whole() -> None:
    assert '"' + "".join(f"\\x{byte:02x}" for byte in b"\xa4base") + '"' in words("header")
    assert '"' + "".join(f"\\x{byte:02x}" for byte in b"max_wait_s") + '"' in words("aggregator-toml")


def judged(target: str, output: str, code: int) -> Outcome:
    return command.judged(target, output, code, seconds=1.0, corpus=0, runs=1000)


def output(*kib: int, inputs: int = 1000) -> str:
    samples = "".join(f"memory {(i + 1) * inputs // len(kib)} {each}\n" for i, each in enumerate(kib))
    return f"{samples}stat::number_of_executed_units: {inputs}\n"


def test_memory_that_grows_is_a_failure_and_memory_that_was_taken_at_first_is_none() -> None:
    little, much = [100_000], [100_001 + GROWTH_KIB_MAX]
    assert judged("frame", output(*little, *19 * much), 0).failed == ""
    assert "memory grew" in judged("frame", output(*19 * little, *much), 0).failed


def test_fewer_inputs_than_were_asked_for_are_a_failure() -> None:
    assert judged("frame", output(1, 1, inputs=999), 0).failed == "FAILED: only 999 inputs"
    assert judged("frame", "", 0).failed


# The fuzzer itself, where there is one

with_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
PLANTED = """
from fuzz import one
def planted(data):
    if data[:2] == b"\\x93\\x93" and len(data) > 60:
        raise KeyError("planted")
one.TARGETS = {"schema": planted}
one.main()
"""


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@with_atheris
def test_an_error_that_is_not_ours_ends_the_run_and_leaves_its_input(tmp_path: Path) -> None:
    ended = run(
        "-c", PLANTED, "schema", "100", "-runs=1000", f"-artifact_prefix={tmp_path}/", str(CORPUS / "schema"),
        folder=tmp_path,
    )  # fmt: skip
    assert ended.returncode != 0
    (left,) = tmp_path.glob("crash-*")
    assert left.read_bytes() in {file.read_bytes() for file in (CORPUS / "schema").iterdir()}
    outcome = judged("schema", ended.stdout + ended.stderr, ended.returncode)
    assert "KeyError: 'planted'" in outcome.failed


@pytest.mark.slow
@with_atheris
def test_the_command_prints_a_row_for_each_target(tmp_path: Path) -> None:
    ended = run("-m", "fuzz", "schema", "header", "--runs", "2000", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    rows = {line.split()[0]: line.split() for line in ended.stdout.splitlines()[1:]}
    assert set(rows) == {"schema", "header"}
    assert all(row[1] == "2,000" and row[-1] == "ok" for row in rows.values())
