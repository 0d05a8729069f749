"""One target under libFuzzer, which ends the process; ``fuzz.__main__`` starts it.

python -m fuzz.one TARGET SAMPLE_EVERY [libFuzzer's options and corpus …]
"""

import importlib
import os
import sys
import warnings
from pathlib import Path

import atheris
from atheris.import_hook import HookManager

# With data-flow tracing, atheris 3.0.0 loses the results of comparisons of arrays. Modules that decode arrays (and, for
# speed, tomllib) are therefore traced by branches only, and modules that compute with arrays are not traced.
with HookManager({"ternbus", "tomllib"}, set(), enable_loader_override=False, trace_dataflow=False):
    for module in (
        "ternbus.broker.protocol.schema",
        "ternbus.broker.protocol.ternary",
        "ternbus.broker.sums.words",
        "ternbus.broker.sums.terms",
        "tomllib",
    ):
        importlib.import_module(module)
ARITHMETIC = [
    "ternbus.aggregator.merge.accumulator",
    "ternbus.aggregator.merge.downlink",
    "ternbus.aggregator.merge.mean",
    "ternbus.aggregator.merge.optimizer",
]
with atheris.instrument_imports(include=["ternbus"], exclude=ARITHMETIC):
    from fuzz.targets import TARGETS, ends_well

SAMPLE = "memory"


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def main() -> None:
    """Fuzz to the limit in libFuzzer's options; print the resident memory to stderr every ``SAMPLE_EVERY`` inputs."""
    name, every, *options = sys.argv[1:]
    target, sample_every, count = TARGETS[name], int(every), 0

    def test_one_input(data: bytes) -> None:
        nonlocal count
        ends_well(target, data)
        count += 1
        if count % sample_every == 0:
            print(SAMPLE, count, resident_kib(), file=sys.stderr, flush=True)

    warnings.simplefilter("error")
    atheris.Setup([name, *options], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
