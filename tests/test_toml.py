"""TOML from others: read without bounds it would end in a traceback, in the parser or in the first error message."""

import pytest

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError

NESTED = {
    "arrays": "x = " + "[" * 1000 + "]" * 1000,
    "inline tables": "x = " + "{a = " * 1000 + "1" + "}" * 1000,
    "dotted keys": ".".join("a" * 1500) + " = 1",
    "a table's name": "[" + ".".join("a" * 1500) + "]",
}
NUMBERS = {
    "thousands of digits": "9" * 4400,
    "hexadecimal": "0x" + "f" * 4000,
    "2**63": str(2**63),
    "less": str(-(2**63) - 1),
}


@pytest.mark.parametrize("text", NESTED.values(), ids=NESTED)
def test_what_is_nested_too_deep_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^edge\.toml is not one of ours: nested deeper than 16$"):
        toml.read(text, "edge.toml")


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_an_integer_beyond_64_bits_is_refused(number: str) -> None:
    with pytest.raises(ConfigError, match=r"^edge\.toml is not TOML: .{10,200}$"):
        toml.read(f"x = [{number}]", "edge.toml")


def test_what_is_no_toml_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^edge\.toml is not TOML: .*line 2"):
        toml.read("a = 1\nb = \n", "edge.toml")


def test_what_is_too_long_is_not_even_parsed() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        toml.read("#" * (toml.CHARACTERS_MAX + 1), "edge.toml")


def test_what_is_within_the_bounds_is_read() -> None:
    deepest = (
        "x = " + "[" * (toml.DEPTH_MAX - 2) + "9223372036854775807, -9223372036854775808" + "]" * (toml.DEPTH_MAX - 2)
    )
    assert toml.read(deepest, "edge.toml")["x"]
    assert toml.read("a = 1\n[b]\nc = [true, 2.5]", "edge.toml") == {"a": 1, "b": {"c": [True, 2.5]}}
