"""Message kinds as values: written in the protocol's order, read back equal, and refused where they are wrong."""

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import (
    AGGREGATOR_STATES,
    DEVICE_STATES,
    OUTCOMES,
    SPLITS,
    STATES,
    Enroll,
    Grant,
    Metrics,
    Offer,
    Receipt,
    Status,
    Update,
)
from ternbus.broker.protocol.model_messages import Delta, Head, Snapshot, SnapshotRef
from ternbus.broker.protocol.parts import parts_max

U64 = st.integers(0, 2**64 - 1)
PRINTABLE = "aß€\N{GRINNING FACE} "
COUNTER = st.integers(0, 2**62)
number = st.floats(allow_nan=False, allow_infinity=False)
key = st.binary(min_size=8, max_size=8).map(KeyId)
digest = st.binary(min_size=32, max_size=32)
entries = st.dictionaries(st.text(max_size=8), number, max_size=32)
device = st.from_regex(r"[b-z0-9][a-z0-9_-]{0,63}", fullmatch=True)
ranges = st.tuples(st.integers(0, 65_534), st.integers(0, 65_534)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def head(draw: st.DrawFn) -> Head:
    version, content_bytes = draw(COUNTER), draw(U64)
    return Head(
        version=version,
        digest=draw(digest),
        schema=draw(digest),
        snapshot=SnapshotRef(
            version=draw(st.integers(0, version)),
            parts=draw(st.integers(1, parts_max(content_bytes))),
            content_bytes=content_bytes,
            place=draw(st.integers(0, 1)),
        ),
        slots=draw(st.integers(1, 65_535)),
        max_staleness=draw(U64),
        direct_parts=draw(U64),
        state=draw(st.sampled_from(STATES)),
        plan=draw(st.dictionaries(st.text(max_size=8), number | st.text(max_size=5) | st.booleans(), max_size=5)),
    )


KINDS: dict[Any, st.SearchStrategy[Any]] = {
    Head: head(),
    Snapshot: st.builds(
        Snapshot, version=COUNTER, digest=digest, schema_bytes=U64, content_bytes=U64, encoding=st.text(max_size=5)
    ),
    Delta: st.builds(
        Delta,
        version=st.integers(1, 2**62),
        digest=digest,
        codec=st.text(max_size=5),
        encoding=st.text(max_size=5),
        xxh3=st.binary(min_size=16, max_size=16),
    ),
    Update: st.builds(
        Update,
        base=COUNTER,
        samples=st.integers(1, 2**32 - 1),
        codec=st.text(max_size=5),
        encoding=st.text(max_size=5),
        sealed=st.booleans(),
        metrics=entries,
    ),
    Offer: st.builds(Offer, base=COUNTER, parts=st.integers(1, 65_535)),
    Grant: st.builds(
        Grant,
        device=device,
        device_key=key,
        seq=COUNTER,
        parts=st.lists(ranges, max_size=9).map(tuple),
        deadline_s=st.floats(0, 1e9),
    ),
    Receipt: st.builds(
        Receipt,
        device=device,
        device_key=key,
        seq=COUNTER,
        outcome=st.sampled_from(OUTCOMES),
        version=COUNTER,
        reason=st.text(PRINTABLE, max_size=20),
        retry_after_s=st.floats(0, 1e9),
        highest_seq=COUNTER,
    ),
    Status: st.builds(
        Status,
        state=st.sampled_from([*DEVICE_STATES, *AGGREGATOR_STATES]),
        session=COUNTER,
        base=st.integers(-1, 2**62),
        software=st.text(PRINTABLE, max_size=20),
        failing=st.text(PRINTABLE, min_size=1, max_size=50),
    ),
    Metrics: st.builds(
        Metrics, version=COUNTER, samples=st.integers(0, 2**32 - 1), split=st.sampled_from(SPLITS), values=entries
    ),
    Enroll: st.builds(Enroll, public_key=digest),
}
ORDER = {
    Head: "version digest schema snapshot slots max_staleness direct_parts state plan",
    Snapshot: "version digest schema_bytes bytes encoding",
    Delta: "version digest codec encoding xxh3",
    Update: "base samples codec encoding sealed metrics",
    Offer: "base parts",
    Grant: "device device_key seq parts deadline_s",
    Receipt: "device device_key seq outcome version reason retry_after_s highest_seq",
    Status: "state session base software failing",
    Metrics: "version samples split values",
    Enroll: "public_key",
}
OPTIONAL = {Delta: {"xxh3"}, Receipt: {"reason", "retry_after_s", "highest_seq"}, Status: {"failing"}}
ALL = sorted(KINDS, key=lambda kind: kind.__name__)

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(plain, inner), max_leaves=9)


def over_the_wire(meta: dict[str, Any]) -> dict[str, Any]:
    unpacked: dict[str, Any] = msgpack.unpackb(msgpack.packb(meta), strict_map_key=False)
    return unpacked


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=25)
def test_a_value_is_read_back_the_same(kind: Any, data: st.DataObject) -> None:
    value = data.draw(KINDS[kind])
    meta = value.meta()
    assert list(meta) == ORDER[kind].split()
    again = kind.from_meta(over_the_wire(meta))
    assert again == value
    assert kind.from_meta(over_the_wire(meta | {"later": [1]})) == value


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=40)
def test_any_value_in_meta_is_read_or_refused(kind: Any, data: st.DataObject) -> None:
    meta = data.draw(KINDS[kind]).meta()
    meta[data.draw(st.sampled_from(sorted(meta)))] = data.draw(anything)
    try:
        value = kind.from_meta(over_the_wire(meta))
    except ProtocolError as error:
        assert error.reason == "bad-meta"
        assert len(str(error)) < 300
    else:
        assert kind.from_meta(value.meta()) == value


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=10)
def test_a_key_that_is_missing_is_named(kind: Any, data: st.DataObject) -> None:
    meta = data.draw(KINDS[kind]).meta()
    missing = data.draw(st.sampled_from(sorted(set(meta) - OPTIONAL.get(kind, set()))))
    del meta[missing]
    with pytest.raises(ProtocolError, match=missing):
        kind.from_meta(meta)


@given(anything)
@settings(max_examples=50)
def test_any_map_is_read_or_refused(value: object) -> None:
    meta = value if isinstance(value, dict) else {"base": value}
    for kind in ALL:
        try:
            kind.from_meta(meta)
        except ProtocolError as error:
            assert error.reason == "bad-meta"


def good(kind: Any, **changes: object) -> dict[str, Any]:
    values: dict[Any, dict[str, Any]] = {
        Head: {
            "version": 5,
            "digest": bytes(32),
            "schema": bytes(32),
            "snapshot": [4, 1, 100, 0],
            "slots": 32,
            "max_staleness": 8,
            "direct_parts": 8,
            "state": "open",
            "plan": {},
        },
        Grant: {"device": "pi", "device_key": bytes(8), "seq": 1, "parts": [[0, 3]], "deadline_s": 60},
        Receipt: {"device": "pi", "device_key": bytes(8), "seq": 1, "outcome": "accepted", "version": 3},
        Status: {"state": "idle", "session": 1, "base": -1, "software": "x"},
        Metrics: {"version": 1, "samples": 10, "split": "test", "values": {"accuracy": 1}},
        Delta: {"version": 1, "digest": bytes(32), "codec": "ternary", "encoding": "raw"},
    }
    return values[kind] | changes


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Head, {"snapshot": [6, 1, 100, 0]}),  # newer than the head
        (Head, {"snapshot": [4, 0, 100, 0]}),
        (Head, {"snapshot": [4, 65_536, 100, 0]}),
        (Head, {"snapshot": [4, 1, 100, 2]}),
        (Head, {"snapshot": [4, 1, 100]}),
        (Head, {"snapshot": [4, True, 100, 0]}),
        (Head, {"snapshot": {"version": 4}}),
        (Head, {"slots": 0}),
        (Head, {"state": "Open"}),
        (Head, {"plan": {1: 2}}),
        (Head, {"version": 5.0}),
        (Head, {"digest": "0" * 32}),
        (Grant, {"parts": [[3, 0]]}),
        (Grant, {"parts": [[0, 65_535]]}),
        (Grant, {"parts": [[0, 0]] * 501}),
        (Grant, {"parts": [0, 1]}),
        (Grant, {"deadline_s": -1}),
        (Grant, {"deadline_s": float("inf")}),
        (Grant, {"device": "aggregator"}),
        (Receipt, {"outcome": "fine"}),
        (Receipt, {"retry_after_s": True}),
        (Receipt, {"highest_seq": -1}),
        (Status, {"state": "asleep"}),
        (Status, {"base": -2}),
        (Status, {"session": True}),
        (Status, {"failing": 1}),
        (Status, {"failing": "€" * 67}),  # of 3 bytes each
        (Metrics, {"split": "train"}),
        (Metrics, {"values": {"accuracy": float("nan")}}),
        (Metrics, {"values": {"accuracy": True}}),
        (Metrics, {"values": {str(index): 0 for index in range(33)}}),
        (Metrics, {"samples": 2**32}),
        (Delta, {"version": 0}),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(kind: Any, wrong: dict[str, object]) -> None:
    kind.from_meta(good(kind))
    with pytest.raises(ProtocolError, match="bad-meta"):
        kind.from_meta(good(kind, **wrong))


COUNTERS = [
    (Head, "version"), (Snapshot, "version"), (Delta, "version"), (Update, "base"), (Offer, "base"), (Grant, "seq"),
    (Receipt, "seq"), (Receipt, "version"), (Receipt, "highest_seq"), (Status, "session"), (Status, "base"),
    (Metrics, "version"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), COUNTERS, ids=str)
@given(data=st.data())
@settings(max_examples=3)
def test_nothing_counts_beyond_2_to_the_62(kind: Any, name: str, data: st.DataObject) -> None:
    """Who believed a number near 2**64 could never go on above it."""
    meta = data.draw(KINDS[kind]).meta()
    assert getattr(kind.from_meta(meta | {name: 2**62}), name) == 2**62
    with pytest.raises(ProtocolError, match=f"bad-meta.*{name}"):
        kind.from_meta(meta | {name: 2**62 + 1})


def test_a_snapshot_that_a_head_names_counts_no_further() -> None:
    named = [2**62 + 1, 1, 100, 0]
    with pytest.raises(ProtocolError, match="bad-meta"):
        Head.from_meta(good(Head, version=2**62, snapshot=named))


@pytest.mark.parametrize(("content_bytes", "most"), [(0, 2), (1024, 3), (10**6, 982), (2**40, 65_535)])
def test_a_head_names_no_snapshot_of_more_parts_than_its_bytes_need(content_bytes: int, most: int) -> None:
    """Each part but the last has 1,024 bytes, and a device asks for each by name."""
    assert Head.from_meta(good(Head, version=5, snapshot=[5, most, content_bytes, 0])).snapshot.parts == most
    with pytest.raises(ProtocolError, match="bad-meta"):
        Head.from_meta(good(Head, version=5, snapshot=[5, most + 1, content_bytes, 0]))


def test_why_a_device_fails_cannot_draw_on_a_terminal() -> None:
    assert Status.from_meta(good(Status, failing="a\x1b[2J\nb")).failing == "a?[2J?b"
    assert Status.from_meta(good(Status)).failing == ""


@pytest.mark.parametrize(("kind", "name", "most"), [(Receipt, "reason", 1000), (Status, "software", 100)])
def test_texts_of_a_peer_do_nothing_to_a_terminal(kind: Any, name: str, most: int) -> None:
    """Nor do they look like another line of a log; too long a one is cut, since a receipt must not be lost for it."""
    wrong = "a\x1b]0;b\x07\x1b[2J\n12:00:00  stopped\u202e\udc80"
    assert getattr(kind.from_meta(good(kind, **{name: wrong})), name) == "a?]0;b??[2J?12:00:00  stopped??"
    assert getattr(kind.from_meta(good(kind, **{name: "€" * 16_000})), name) == "€" * most


def test_an_int_stands_for_a_float() -> None:
    assert Metrics.from_meta(good(Metrics)).values == {"accuracy": 1.0}
    assert Grant.from_meta(good(Grant)).deadline_s == 60.0


def test_a_receipt_may_leave_out_what_it_does_not_need() -> None:
    receipt = Receipt.from_meta(good(Receipt))
    assert (receipt.reason, receipt.retry_after_s, receipt.highest_seq) == ("", 0.0, 0)


def test_values_cannot_be_changed_through_their_maps() -> None:
    metrics = Metrics.from_meta(good(Metrics))
    with pytest.raises(TypeError):
        metrics.values["accuracy"] = 2.0  # type: ignore[index]  # refused by mypy too
