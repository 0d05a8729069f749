"""Functions that a task's author gave: where one is defined, and a call that it does not take, in words."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ternbus.broker.errors import ConfigError


def place_of(function: Callable[..., object]) -> str:
    """File and line of a function's definition, as a prefix of an error; empty for a function without source."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return f"{Path(code.co_filename).name}, line {code.co_firstlineno}: " if code is not None else ""


def called(form: str, function: Callable[..., Any], *given: object) -> Any:
    """What the function returns. Raises `ConfigError`, with its ``form``, if it does not take these arguments."""
    try:
        return function(*given)
    except TypeError as error:
        trace = error.__traceback__
        if trace is not None and trace.tb_next is None:  # none of its own lines was reached
            raise ConfigError(f"{place_of(function)}this is called as {form}: {error}") from error
        raise
