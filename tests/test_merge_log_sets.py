"""Entries of the log of merges with sets of private updates, and with those that no version contains."""

from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.broker.protocol.merge_log import (
    FIRST,
    Audit,
    Contribution,
    DroppedUpdate,
    Entry,
    MergedSet,
    PrivateMember,
    Signed,
)
from ternbus.edge.core.state import AnsweredUpdate, State
from ternbus.edge.shell import log_check
from ternbus.edge.shell.directory import Settings

AGGREGATOR = Identity(b"a" * 32)
KEY = KeyId(b"k" * 8)
SETTINGS = Settings(
    federation="lab",
    device="pi",
    broker="mqtt://127.0.0.1:1",
    aggregator_key=AGGREGATOR.public.hex(),
    task="digits-numpy",
)


def digest(text: object) -> bytes:
    return blake2b(str(text).encode(), digest_size=32).digest()


def member(seq: int, device: str = "pi") -> PrivateMember:
    return PrivateMember(device=device, key=KEY, seq=seq, digest=digest((device, seq)))


def made(*members: PrivateMember, weight: float = 0.5) -> MergedSet:
    return MergedSet(digest=digest("set"), context=digest("context"), base=0, weight=weight, members=members)


def gone(seq: int, reason: str = "below-min: 2 on version 0") -> DroppedUpdate:
    return DroppedUpdate(update=member(seq), reason=reason)


def entry(version: int = 1, previous: bytes = FIRST, **changes: Any) -> Entry:
    return Entry(federation="lab", version=version, digest=digest(version), previous=previous, **changes)


def log_of(*merges: dict[str, Any]) -> list[Signed]:
    """Version 0, and a version for each of these."""
    found = [entry(0).signed(AGGREGATOR)]
    for version, changes in enumerate(merges, 1):
        found.append(entry(version, found[-1].hash, **changes).signed(AGGREGATOR))
    return found


def test_an_entry_with_sets_is_what_the_page_says() -> None:
    written = msgpack.unpackb(entry(sets=(made(member(3), member(4, "pj")),), dropped=(gone(2),)).content())
    assert list(written)[4:] == ["updates", "sets", "dropped"]
    members = [["pi", b"k" * 8, 3, digest(("pi", 3))], ["pj", b"k" * 8, 4, digest(("pj", 4))]]
    assert written["updates"] == []
    assert written["sets"] == [[digest("set"), digest("context"), 0, 0.5, members]]
    assert written["dropped"] == [["pi", b"k" * 8, 2, digest(("pi", 2)), "below-min: 2 on version 0"]]


def test_an_entry_without_sets_and_without_what_was_dropped_is_as_it_was() -> None:
    assert list(msgpack.unpackb(entry().content())) == ["federation", "version", "digest", "previous", "updates"]
    with pytest.raises(ProtocolError, match="canonical"):
        Entry.parse(msgpack.packb({**msgpack.unpackb(entry().content()), "sets": [], "dropped": []}))


digests = st.binary(min_size=32, max_size=32)
members = st.builds(
    PrivateMember,
    device=st.from_regex(r"[b-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
    key=st.binary(min_size=8, max_size=8),
    seq=st.integers(0, 2**64 - 1),
    digest=digests,
)
sets = st.builds(
    MergedSet,
    digest=digests,
    context=digests,
    base=st.integers(0, 2**64 - 1),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    members=st.lists(members, min_size=1, max_size=3).map(tuple),
)
reasons = st.text(st.characters(categories=["L", "N", "P"]), max_size=40)
drops = st.builds(DroppedUpdate, update=members, reason=reasons)


@given(st.lists(sets, max_size=3).map(tuple), st.lists(drops, max_size=3).map(tuple))
def test_an_entry_comes_back(merged: tuple[MergedSet, ...], dropped: tuple[DroppedUpdate, ...]) -> None:
    whole = entry(sets=merged, dropped=dropped)
    assert Entry.parse(whole.content()) == whole
    assert len(list(whole.named)) == sum(len(each.members) for each in merged)
    assert whole.weight == pytest.approx(sum(each.weight for each in merged))


ROW = ["pi", b"k" * 8, 3, bytes(32)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sets": {}},
        {"dropped": "x"},
        {"sets": [[]]},
        {"sets": ["set"]},
        {"sets": [[bytes(32), bytes(32), 0, 1.0, []]]},
        {"sets": [[bytes(32), bytes(32), 0, 1.0, ROW]]},
        {"sets": [[bytes(31), bytes(32), 0, 1.0, [ROW]]]},
        {"sets": [[bytes(32), bytes(32), -1, 1.0, [ROW]]]},
        {"sets": [[bytes(32), bytes(32), 0, float("nan"), [ROW]]]},
        {"sets": [[bytes(32), bytes(32), 0, 1.0, [ROW[:3]]]]},
        {"sets": [[bytes(32), bytes(32), 0, 1.0, [["A", *ROW[1:]]]]]},
        {"dropped": [ROW]},
        {"dropped": ["row"]},
        {"dropped": [[*ROW, "x" * 201]]},
        {"dropped": [[*ROW, "a\nb"]]},
        {"dropped": [[*ROW, 1]]},
    ],
)
def test_malformed_sets_are_refused(changes: dict[str, Any]) -> None:
    fields = msgpack.unpackb(entry(sets=(made(member(3)),), dropped=(gone(2),)).content())
    with pytest.raises(ProtocolError):
        Entry.parse(msgpack.packb({**fields, **changes}))


@pytest.mark.parametrize(
    "merges",
    [
        [{"sets": (made(member(3)), made(member(3)))}],
        [{"sets": (made(member(3)),)}, {"sets": (made(member(3)),)}],
        [{"sets": (made(member(3)),)}, {"dropped": (gone(3),)}],
        [{"dropped": (gone(3), gone(3))}],
    ],
)
def test_an_update_that_is_in_two_versions_or_dropped_too_is_a_fault(merges: list[dict[str, Any]]) -> None:
    audit = Audit(public=AGGREGATOR.public)
    for signed in log_of(*merges):
        audit.take(signed)
    assert audit.finish() == [f"version {len(merges)} has update 3 of pi once more"]


# --- held against what a device knows


def check(folder: Path, merges: list[dict[str, Any]], *answers: AnsweredUpdate) -> log_check.LogCheck:
    path = folder / "lab.log"
    path.write_bytes(b"".join(signed.pack() for signed in log_of(*merges)))
    state = State(key=KEY, head_version=len(merges), head_digest=digest(len(merges)))
    return log_check.check(path, SETTINGS, state, answers)


def answer(seq: int, base: int = 0) -> AnsweredUpdate:
    return AnsweredUpdate(
        seq=seq, base=base, outcome="accepted", version=base, key=KEY, digest=digest(("pi", seq))
    )  # fmt: skip


def test_a_device_finds_its_update_in_a_set_or_among_those_that_were_dropped(tmp_path: Path) -> None:
    merges: list[dict[str, Any]] = [
        {"sets": (made(member(3), member(9, "pj"), weight=0.75), made(member(8, "pj"), weight=0.25))},
        {"dropped": (gone(5), gone(6, "revoked"))},
    ]
    found = check(tmp_path, merges, answer(3), answer(5), answer(6), answer(7))
    assert found.faults == []
    assert [(each.seq, each.version, each.weight, each.share) for each in found.merged] == [(3, 1, 0.375, 0.375)]
    assert [(each.seq, each.version, each.reason) for each in found.dropped] == [
        (5, 2, "below-min: 2 on version 0"),
        (6, 2, "revoked"),
    ]
    assert found.waiting == [7]  # private updates may wait through several merges
    report = found.report("pi")
    assert "2 more were dropped, as the log says: 1 below-min, 1 revoked\n" in report
    assert ": below-min: 2 on version 0\n" in report
    assert len(found.facts()["dropped"]) == 2  # type: ignore[arg-type]


def test_a_device_finds_what_it_did_not_send_and_what_was_changed(tmp_path: Path) -> None:
    other = PrivateMember(device="pi", key=KEY, seq=5, digest=digest("other"))
    changed = DroppedUpdate(update=other, reason="revoked")
    found = check(tmp_path, [{"sets": (made(member(4)),)}, {"dropped": (changed,)}], answer(5))
    assert found.faults == [
        "update 5 on version 0 is in version 2, but its digest differs from what was sent",
        "version 1 has update 4, which this device did not send",
    ]


def test_an_update_that_is_merged_and_dropped_is_a_fault(tmp_path: Path) -> None:
    found = check(tmp_path, [{"sets": (made(member(3)),)}, {"dropped": (gone(3),)}], answer(3))
    assert "update 3 on version 0 was merged more than once: in versions 1 and 2" in found.faults


def test_plain_updates_stand_beside_sets_in_the_share(tmp_path: Path) -> None:
    plain = Contribution(device="pj", key=KEY, seq=1, digest=digest("x"), weight=0.5)
    found = check(tmp_path, [{"updates": (plain,), "sets": (made(member(3)),)}], answer(3))
    assert [each.share for each in found.merged] == [0.5]
