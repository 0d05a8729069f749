"""A process that makes and frees large arrays again and again takes each page from the system once."""

import ctypes
import os
import subprocess
import sys

import pytest

PIECE, ROUNDS = 2**22, 40
PAGES = 4 * PIECE // os.sysconf("SC_PAGE_SIZE")  # of a round
WORK = f"""
import ctypes, resource, sys
import numpy as np
from ternbus.broker.kept_memory import keep_freed
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault in place of 512
if sys.argv[1] == "keep":
    keep_freed(2**26)
def work():
    for _ in range({ROUNDS}):
        arrays = [np.ones({PIECE}, np.uint8) for _ in range(4)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt"
)


def faults(how: str, **environment: str) -> int:
    """How many pages a process took from the system in its second series of rounds."""
    variables = {
        name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"
    } | environment
    command = [sys.executable, "-c", WORK, how]
    return int(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)


def test_what_is_freed_is_kept() -> None:
    assert faults("keep") < PAGES  # hardly any
    assert faults("leave") > 4 * PAGES


def test_what_the_environment_says_of_memory_is_left_alone() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > 4 * PAGES
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072") > 4 * PAGES


def test_what_the_environment_says_of_other_things_does_not_matter() -> None:
    assert faults("keep", GLIBC_TUNABLES="glibc.rtld.optional_static_tls=2048") < PAGES
