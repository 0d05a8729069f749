"""The bytes of the plan in a head, as the context of a private update has them."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.scripted_aggregator import ScriptedAggregator
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import parse
from ternbus.broker.sums.plan_bytes import plan_bytes


@given(
    st.dictionaries(
        st.text(max_size=9), st.integers() | st.binary(max_size=9) | st.booleans() | st.floats(), max_size=20
    ).map(
        lambda plan: {
            key: 2**40 if isinstance(value, int) and abs(value) > 2**60 else value for key, value in plan.items()
        }
    )
)
def test_the_bytes_of_a_plan_are_those_of_its_value_in_the_head(plan: dict[str, Any]) -> None:
    aggregator = ScriptedAggregator(plan=plan)
    frame = parse(aggregator.head()[1])
    found = plan_bytes(frame.meta_bytes)
    assert found == msgpack.packb(plan)
    assert frame.meta_bytes.count(found) >= 1


def test_another_form_of_the_same_plan_has_other_bytes() -> None:
    short, long = msgpack.packb({"plan": {"a": 1}}), b"\x81\xa4plan\x81\xa1a\xcd\x00\x01"
    assert msgpack.unpackb(short) == msgpack.unpackb(long)
    assert plan_bytes(short) == b"\x81\xa1a\x01"
    assert plan_bytes(long) == b"\x81\xa1a\xcd\x00\x01"


def test_a_plan_within_another_value_is_not_the_heads() -> None:
    meta = msgpack.packb({"other": {"plan": {"a": 1}}, "plan": {"b": 2}, "last": [{"plan": 3}]})
    assert plan_bytes(meta) == msgpack.packb({"b": 2})


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"\xc0",
        b"\x81",
        msgpack.packb([1]),
        msgpack.packb({}),
        msgpack.packb({"plan": 1}),
        msgpack.packb({"plan": [1]}),
        msgpack.packb({"Plan": {}}),
        b"\x82\xa4plan\x80\xa4plan\x80",
        msgpack.packb({"plan": {}}) + b"\x00",
        msgpack.packb({"plan": {}})[:-1],
        b"\x81" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xdd\xff\xff\xff\xff",
        b"\x81\xa4plan\xd4\x01\x00",
        b"\x82\xc7\x00\x01\x01\xa4plan\x80",
    ],
)
def test_what_has_not_one_plan_is_refused(meta: bytes) -> None:
    with pytest.raises(ProtocolError, match="bad-meta"):
        plan_bytes(meta)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_plan_or_an_error_of_the_protocol(meta: bytes) -> None:
    try:
        assert plan_bytes(meta) in meta
    except ProtocolError as error:
        assert error.reason == "bad-meta"
