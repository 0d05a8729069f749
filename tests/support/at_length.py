"""The tests of state machines: a few cases of each in every run, many in `make test-extended`."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine


def in_every_run(machine: type[RuleBasedStateMachine], **about: Any) -> Any:
    """The test of a machine with these settings of Hypothesis, for a name `Test…` in a test's module."""
    return _test(machine, "", **about)


def at_length(machine: type[RuleBasedStateMachine], **about: Any) -> Any:
    """The same with more cases, marked `extended`."""
    return pytest.mark.extended(_test(machine, "AtLength", **about))


def _test(machine: type[RuleBasedStateMachine], suffix: str, **about: Any) -> Any:
    return type(f"Test{machine.__name__}{suffix}", (machine.TestCase,), {"settings": settings(**about)})
