"""TOML from others is read within bounds, with a byte order mark and CRLF too; what is written is read again."""

import codecs
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ternbus.aggregator import settings as aggregator
from ternbus.aggregator.shell.administration import load_settings
from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import load_toml, write_secret
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.server import directory as broker
from ternbus.edge.shell import directory as edge
from ternbus.lab.scenario import scenario

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
    with pytest.raises(ConfigError, match=r"^edge\.toml is too deeply nested for a Ternbus file: more than 16 levels$"):
        toml.loads(text, "edge.toml")


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_an_integer_beyond_64_bits_is_refused(number: str) -> None:
    with pytest.raises(ConfigError, match=r"^edge\.toml is not valid TOML: .{10,200}$"):
        toml.loads(f"x = [{number}]", "edge.toml")


def test_what_is_no_toml_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^edge\.toml is not valid TOML: .*line 2"):
        toml.loads("a = 1\nb = \n", "edge.toml")


@pytest.mark.parametrize("twice", ["[a]\nb = 1\n[a]\nb = 2\n", "a = 1\na = 2\n", "[a]\nb = 1\n[a.b]\n"])
def test_what_is_there_twice_is_said_to_be_changed_where_it_is(twice: str) -> None:
    with pytest.raises(ConfigError, match="this section or key is there already: change it where it is"):
        toml.loads(twice, "aggregator.toml")


def test_what_is_too_long_is_not_even_parsed() -> None:
    with pytest.raises(ConfigError, match="too large"):
        toml.loads("#" * (toml.BYTES_MAX + 1), "edge.toml")


def test_what_is_within_the_bounds_is_read() -> None:
    deepest = (
        "x = " + "[" * (toml.DEPTH_MAX - 2) + "9223372036854775807, -9223372036854775808" + "]" * (toml.DEPTH_MAX - 2)
    )
    assert toml.loads(deepest, "edge.toml")["x"]
    assert toml.loads("a = 1\n[b]\nc = [true, 2.5]", "edge.toml") == {"a": 1, "b": {"c": [True, 2.5]}}


# --- written

SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
KEYS = st.text(max_size=6)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
TRICKY = "\x00\t\n\r\x1f\"'\\#=[]\x7f\x85\u2028\ufeff\uffff\U0001f600\U0010ffff"


@given(st.dictionaries(KEYS, VALUES, max_size=5))
@example({TRICKY: {TRICKY: [TRICKY, {TRICKY: {"": TRICKY}}]}, "": "", "a.b": {"a.b": 1}})
@example(
    {"inf": [math.inf, -math.inf, -0.0, 5e-324, 1e22], "least": -(2**63), "rows": [{"a": 1}, {"b": [{}]}], "t": {}}
)
def test_whatever_is_written_is_read_again(table: dict[str, Any]) -> None:
    text = toml.dumps(table)
    assert toml.loads(text, "x") == table
    assert toml.loads(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(), "x") == table


def test_what_is_no_number_is_written_too() -> None:
    assert math.isnan(toml.loads(toml.dumps({"x": math.nan}), "x")["x"])


@given(table=st.dictionaries(KEYS, SCALARS | st.dictionaries(KEYS, SCALARS, max_size=3), max_size=4), data=st.data())
def test_comments_change_nothing_that_is_read(table: dict[str, Any], data: st.DataObject) -> None:
    places: list[toml.Place] = [(), *((key,) for key in table)]
    comments = data.draw(st.dictionaries(st.sampled_from(places), st.sampled_from(['of "this" = 1', "[x] # y"])))
    text = toml.dumps(table, comments)
    assert toml.loads(text, "x") == table
    assert all(comment in text for comment in comments.values())


def test_a_comment_stands_at_the_head_of_its_table_or_behind_its_value() -> None:
    text = toml.dumps(
        {"t": {"b": 1}, "a": 2},
        {(): "the file\nin two lines", ("a",): "the value", ("t",): "the table", ("t", "b"): "it"},
    )
    assert text == "# the file\n# in two lines\na = 2  # the value\n\n[t]\n# the table\nb = 1  # it\n"


@pytest.mark.parametrize(
    "table", [{"data": "/home/pi/caf\udce9"}, {"caf\udce9": 1}, {"t": {"x": ["\ud83d\ude00"]}}], ids=ascii
)
def test_a_name_that_is_no_utf_8_is_refused_in_words(table: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"^'.*\\ud.*' is not UTF-8 and cannot be written to a TOML file; rename the file$"
    ):
        toml.dumps(table)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_an_integer_that_would_not_be_read_is_not_written(number: int) -> None:
    with pytest.raises(ConfigError, match="more than 64 bits"):
        toml.dumps({"x": [number]})


def test_what_is_no_toml_value_is_a_bug_of_ours() -> None:
    with pytest.raises(TypeError):
        toml.dumps({"x": None})


# --- files

EMOJI = '/home/😀/Größe "x"\\\x7f'
KEY = "0" * 64


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match=r"^cannot read .*x\.toml: No such file or directory$"):
        load_toml(path)
    with pytest.raises(ConfigError, match=r"it is a folder, not a file; give the path of a file$"):
        load_toml(tmp_path)
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"x\.toml is not valid TOML: byte 5 is not UTF-8; save the file as UTF-8$"):
        load_toml(path)
    path.write_bytes(b"a = ")
    with pytest.raises(ConfigError, match=r"x\.toml is not valid TOML: "):
        load_toml(path)
    path.write_bytes(b"#" * (toml.BYTES_MAX + 1))
    with pytest.raises(ConfigError, match=r"x\.toml is too large for a Ternbus file"):
        load_toml(path)


def _aggregator(path: Path) -> object:
    folder = path.parent
    (folder / "ledger.sqlite").touch()
    path.replace(folder / "aggregator.toml")
    return load_settings(folder)


def _broker(path: Path) -> object:
    path.replace(path.with_name("broker.toml"))
    return broker.BrokerDirectory(path.parent).settings()


def _device(path: Path) -> object:
    path.replace(path.with_name("edge.toml"))
    return edge.DeviceDirectory(path.parent).settings()


INVITATION = Invitation(federation="lab", device="pi", broker="mqtt://h", aggregator_key=KEY, code="c", ca=EMOJI)
DEVICE = edge.Settings(federation="lab", device="pi", broker="mqtt://h", aggregator_key=KEY, task="t", data=EMOJI)
BROKER = broker.Settings(names=("h.example", "10.0.0.1"), listen="0.0.0.0", port=8883)
AGGREGATOR = aggregator.from_table(
    {"federation": "lab", "broker": "mqtt://h", "plan": {"to": EMOJI, "learning_rate": 1}}
)
Kind = tuple[object, str, Callable[[Path], object]]
FILES: dict[str, Kind] = {
    "aggregator.toml": (AGGREGATOR, aggregator.dumps(AGGREGATOR), _aggregator),
    "broker.toml": (BROKER, BROKER.dumps(), _broker),
    "edge.toml": (DEVICE, DEVICE.dumps(), _device),
    "invitation": (INVITATION, INVITATION.dumps(), lambda path: Invitation.from_table(load_toml(path))),
    "scenario": (scenario.Scenario(data=Path(EMOJI)), toml.dumps({"data": EMOJI}), scenario.load),
}


@pytest.mark.parametrize("kind", FILES.values(), ids=FILES)
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_every_file_of_ours_is_read_as_an_editor_may_leave_it(kind: Kind, bom: bytes, end: str, tmp_path: Path) -> None:
    path, (value, text, read) = tmp_path / "file", kind
    write_secret(path, bom + text.replace("\n", end).encode())
    assert read(path) == value


def test_files_of_the_version_before_are_read(tmp_path: Path) -> None:
    """Its strings were JSON's, everything beyond ASCII escaped, and the plan's keys stood in quotes."""
    path = tmp_path / "edge.toml"
    before = r"""# A Ternbus device. What it keeps is in outbox.db, its key in device.key.
federation = "lab"
device = "pi"
broker = "mqtt://h"
aggregator_key = "0000000000000000000000000000000000000000000000000000000000000000"
task = "t"
data = "/home/Gr\u00f6\u00dfe \"x\"\\\u0001"
partition = "all"
"""
    write_secret(path, before.encode())
    assert _device(path) == replace(DEVICE, data='/home/Größe "x"\\\x01')
    old = aggregator.dumps(AGGREGATOR).replace("\nlearning_rate = 1\n", '\n"learning_rate" = 1\n')
    assert '"learning_rate"' in old
    assert aggregator.parse(old) == AGGREGATOR
