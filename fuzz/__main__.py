"""Run the fuzzer: each target in its own process, and print a table of inputs, speed and memory."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz.seeds import CORPUS, ROOT
from fuzz.targets import TARGETS

FOUND: Final = ROOT / "fuzz" / "found"
INPUT_BYTES_MAX: Final = 4096
RESIDENT_MB_MAX: Final = 512  # a larger process is a finding
GROWTH_KIB_MAX: Final = 32 * 1024  # from the first tenth of the inputs to the last, with libFuzzer's own corpus
STARTUP_S: Final = 6.0  # until a target's process reads its first input
WORD: Final = re.compile(
    rb"[\xa0-\xbf]?[A-Za-z_][A-Za-z0-9_]{2,24}|\[+[a-z.]+\]+"
)  # with msgpack's length byte, if any
NOT_INSTALLED: Final = (
    "nothing fuzzed: atheris is not installed. On x86-64 Linux with Python 3.11 to 3.13, run: "
    "pip install -c constraints.txt -e '.[fuzz]'"
)
EPILOG: Final = """\
Without options, all targets share one minute, as in `make test`. Inputs that reach new code are kept during the run
only. Inputs that make a target fail are written to fuzz/found/. After the correction, copy the input to
fuzz/corpus/TARGET/found-NAME, which `make check` tests.

  python -m fuzz                          a minute for all targets
  python -m fuzz --runs 1000000           a million inputs for each target
  python -m fuzz header --seconds 3600    an hour for one target
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one target. Memory is resident, in KiB, after the first tenth and after the last input."""

    target: str
    inputs: int
    seconds: float
    early_kib: int
    late_kib: int
    corpus: int
    failed: str  # the reason; empty if the target did not fail

    def row(self) -> str:
        speed = self.inputs / max(self.seconds, 1e-9)
        return (
            f"{self.target:<16}{self.inputs:>10,}{self.seconds:>8.0f}{speed:>10,.0f}{self.corpus:>8}"
            f"{self.early_kib / 1024:>9.1f}{self.late_kib / 1024:>9.1f}  {self.failed or 'ok'}"
        )


HEADINGS: Final = f"{'target':<16}{'inputs':>10}{'s':>8}{'inputs/s':>10}{'corpus':>8}{'MiB early':>10}{'late':>8}"


def run(target: str, *, runs: int | None, seconds: float | None, seed: int) -> Outcome:
    """Fuzz one target; if it fails, its output is kept in ``fuzz/found``."""
    every = 1000 if runs is None else max(1, runs // 20)
    limit = f"-runs={runs}" if seconds is None else f"-max_total_time={max(1, round(seconds))}"
    FOUND.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        dictionary, scratch = Path(folder) / "words", Path(folder) / "corpus"
        found = words(target)
        dictionary.write_text("\n".join(found), encoding="ascii")
        scratch.mkdir()
        options = [
            limit,
            *([f"-dict={dictionary}"] if found else []),  # libFuzzer refuses an empty one
            f"-seed={seed}",
            f"-max_len={INPUT_BYTES_MAX}",
            f"-rss_limit_mb={RESIDENT_MB_MAX}",
            f"-artifact_prefix={FOUND}/{target}-",
            "-timeout=10",
            "-print_final_stats=1",
        ]
        command = [sys.executable, "-m", "fuzz.one", target, str(every), *options, str(scratch), str(CORPUS / target)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        began = time.monotonic()
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        spent = time.monotonic() - began
        corpus = len(list(scratch.iterdir()))
    output = ended.stdout.decode("utf-8", "replace")
    return judged(target, output, ended.returncode, seconds=spent, corpus=corpus, runs=runs)


def words(target: str) -> list[str]:
    """The dictionary for libFuzzer: names in the corpus, which random bytes would hardly produce."""
    found = {each for file in (CORPUS / target).iterdir() for each in WORD.findall(file.read_bytes())}
    return ['"' + "".join(f"\\x{byte:02x}" for byte in each) + '"' for each in sorted(found)]


def judged(target: str, output: str, code: int, *, seconds: float, corpus: int, runs: int | None) -> Outcome:
    """The outcome from libFuzzer's output and the samples of memory in it."""
    units = re.search(r"number_of_executed_units:\s*(\d+)", output)
    inputs = int(units[1]) if units else 0
    samples = [(int(n), int(kib)) for n, kib in re.findall(r"^memory (\d+) (\d+)$", output, re.MULTILINE)] or [(0, 0)]
    early = next((kib for n, kib in samples if 10 * n >= inputs), 0)
    late = samples[-1][1]
    failed = ""
    if code != 0:
        log = FOUND / f"{target}.log"
        FOUND.mkdir(exist_ok=True)
        log.write_text(output, encoding="utf-8")
        failed = f"FAILED, see {log.relative_to(ROOT)}: {_first_error(output)}"
    elif inputs < (runs or 1):
        failed = f"FAILED: only {inputs} inputs"
    elif late - early > GROWTH_KIB_MAX:
        failed = f"FAILED: memory grew by more than {GROWTH_KIB_MAX // 1024} MiB"
    return Outcome(
        target=target, inputs=inputs, seconds=seconds, early_kib=early, late_kib=late, corpus=corpus, failed=failed
    )


def _first_error(output: str) -> str:
    """The exception that the target raised, or libFuzzer's error message."""
    lines = [line for line in output.splitlines() if re.match(r"[\w.]+(Error|Exception|Warning)\b|.*ERROR: ", line)]
    return lines[0][:160] if lines else output.strip().rpartition("\n")[2][:160]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target", nargs="*", choices=[[], *TARGETS], help=f"target: {', '.join(TARGETS)} (default: all)"
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--runs", type=int, help="inputs for each target")
    limit.add_argument("--seconds", type=float, default=60.0, help="total duration (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="targets that run in parallel (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the fuzzer (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Return 0 if no target failed, else 1; without atheris print a message and return 0."""
    given = options()
    if importlib.util.find_spec("atheris") is None:
        print(NOT_INSTALLED, file=sys.stderr)
        return 0
    names = given.target or list(TARGETS)
    jobs = min(given.jobs, len(names))
    share = None if given.runs is not None else given.seconds * jobs / len(names) - STARTUP_S
    print(HEADINGS, flush=True)
    printing = threading.Lock()

    def one(name: str) -> bool:
        outcome = run(name, runs=given.runs, seconds=share, seed=given.seed)
        with printing:
            print(outcome.row(), flush=True)
        return not outcome.failed

    with ThreadPoolExecutor(jobs) as pool:
        return 0 if all(list(pool.map(one, names))) else 1


if __name__ == "__main__":
    sys.exit(main())
