"""The log of merges: an entry's bytes, and that whatever is done to a log is named, in a file and in a directory."""

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import msgpack
import nacl.signing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.small_world import LAB, Bench, Device, float32_block, make_directory, receipts, ternary_block
from ternbus.aggregator.shell import administration, log
from ternbus.broker.errors import CorruptError, ProtocolError
from ternbus.broker.protocol.frame import parse
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
    unpack,
    unpack_all,
)
from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.command import main

KEY = Identity(b"a" * 32)
VERSIONS = 6


def digest(text: object) -> bytes:
    return blake2b(str(text).encode(), digest_size=32).digest()


def contribution(device: str, seq: int, weight: float = 12.5) -> Contribution:
    return Contribution(device=device, key=KeyId(b"k" * 8), seq=seq, digest=digest((device, seq)), weight=weight)


def chain(versions: int = VERSIONS, *, identity: Identity = KEY, salt: str = "") -> list[Signed]:
    entries: list[Signed] = []
    for version in range(versions):
        previous = entries[-1].hash if entries else FIRST
        updates = tuple(contribution(device, version) for device in ("pi-1", "pi-2")) if version else ()
        entry = Entry(
            federation=LAB, version=version, digest=digest(f"{salt}{version}"), previous=previous, updates=updates
        )
        entries.append(entry.signed(identity))
    return entries


def faults(entries: list[Signed], head: tuple[int, bytes | None] | None = None, **about: Any) -> list[str]:
    audit = Audit(public=KEY.public, **about)
    for signed in entries:
        audit.take(signed)
    return audit.finish(head)


# --- an entry


def test_an_entry_is_what_the_page_says() -> None:
    """Read by msgpack, BLAKE2b and Ed25519 alone."""
    first, second, *_ = chain()
    content, signature = msgpack.unpackb(second.pack())
    nacl.signing.VerifyKey(KEY.public).verify(b"ternbus/1 log\0" + content, signature)
    assert list(msgpack.unpackb(content).items()) == [
        ("federation", "lab"),
        ("version", 1),
        ("digest", digest("1")),
        ("previous", blake2b(first.content, digest_size=32).digest()),
        ("updates", [[name, b"k" * 8, 1, digest((name, 1)), 12.5] for name in ("pi-1", "pi-2")]),
    ]
    assert msgpack.unpackb(first.content)["previous"] == bytes(32)


names = st.from_regex(r"[b-z0-9][a-z0-9_-]{0,20}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32)
contributions = st.builds(
    Contribution,
    device=names,
    key=st.binary(min_size=8, max_size=8),
    seq=st.integers(0, 2**64 - 1),
    digest=digests,
    weight=st.floats(allow_nan=False, allow_infinity=False),
)
entries = st.builds(
    Entry,
    federation=st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True),
    version=st.integers(0, 2**64 - 1),
    digest=digests,
    previous=digests,
    updates=st.lists(contributions, max_size=4).map(tuple),
)


@given(entries)
def test_an_entry_comes_back(entry: Entry) -> None:
    assert Entry.parse(entry.content()) == entry
    signed = entry.signed(KEY)
    assert unpack(signed.pack()) == signed


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists).map(repr))
def test_anything_else_is_refused(content: bytes | str) -> None:
    encoded = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ProtocolError):
        Entry.parse(encoded)
    with pytest.raises(ProtocolError):
        list(unpack_all(BytesIO(encoded + b"\x00")))


@pytest.mark.parametrize(
    "change",
    [
        {"version": -1},
        {"digest": b"short"},
        {"federation": "Lab"},
        {"updates": {}},
        {"updates": [["pi", bytes(8), 1, bytes(32)]]},
        {"updates": [["Pi", bytes(8), 1, bytes(32), 1.0]]},
        {"updates": [["pi", bytes(8), 1, bytes(32), float("nan")]]},
        {"updates": [["pi", bytes(8), 1, bytes(32), 1]]},  # a float has one encoding
        {"more": 1},
    ],
    ids=str,
)
def test_an_entry_has_one_encoding(change: dict[str, object]) -> None:
    fields = {"federation": LAB, "version": 1, "digest": bytes(32), "previous": bytes(32), "updates": []}
    assert Entry.parse(msgpack.packb(fields)).version == 1
    with pytest.raises(ProtocolError):
        Entry.parse(msgpack.packb({**fields, **change}))


def test_an_entry_of_the_shortest_updates_and_sets_is_read() -> None:
    about: dict[str, Any] = {"device": "a", "key": KeyId(bytes(8)), "seq": 0, "digest": bytes(32)}
    member = PrivateMember(**about)
    entry = Entry(
        federation="l",
        version=0,
        digest=bytes(32),
        previous=bytes(32),
        updates=(Contribution(**about, weight=0.0),) * 1000,
        sets=(MergedSet(digest=bytes(32), context=bytes(32), base=0, weight=0.0, members=(member,)),) * 1000,
        dropped=(DroppedUpdate(update=member, reason="a"),) * 1000,
    )
    assert Entry.parse(entry.content()) == entry
    alone = replace(entry, updates=(), dropped=())
    assert Entry.parse(alone.content()) == alone


@pytest.mark.parametrize("container", [b"\x80", b"\x90"], ids=["maps", "arrays"])
def test_an_entry_of_a_million_empty_maps_takes_little_memory(container: bytes) -> None:
    """It is decoded before its signature is checked, so that a fault can name the version."""
    content = b"\xdd" + (1_000_000).to_bytes(4, "big") + container * 1_000_000
    audit = Audit(public=KEY.public)
    tracemalloc.start()
    assert audit.take(Signed(content=content, signature=bytes(64))) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert audit.faults == ["entry 1 is damaged: the entry is not msgpack"]
    assert peak < 20 * len(content)  # the array's own elements, and a fortieth of the containers


def test_a_longer_encoding_of_the_same_is_refused() -> None:
    content = chain(1)[0].content
    assert Entry.parse(content).version == 0
    with pytest.raises(ProtocolError, match="canonical"):
        Entry.parse(content.replace(b"\xa7version\x00", b"\xa7version\xcc\x00"))


# --- a log


def test_a_log_as_it_was_written_has_no_faults() -> None:
    assert faults(chain()) == []
    assert faults(chain(), (VERSIONS - 1, digest(VERSIONS - 1)), federation=LAB) == []
    assert faults(chain(), (2, None)) == []


@pytest.mark.parametrize("place", range(VERSIONS))
def test_an_entry_that_was_taken_out_is_named(place: int) -> None:
    left = chain()
    del left[place]
    found = faults(left, (VERSIONS - 1, None))
    if place == 0:
        assert found == ["the log begins with version 1: earlier entries were removed"]
    elif place < VERSIONS - 1:
        assert found == [f"version {place} is missing"]
    else:
        (fault,) = found
        assert fault.startswith("the log ends with version 4, but version 5 was published: it was exported earlier")


def test_a_log_may_begin_later_where_its_aggregator_says_so() -> None:
    """As after the migration of a ledger that had no log."""
    entries = chain()
    late = Entry(federation="lab", version=2, digest=digest(2), previous=FIRST)
    assert late.is_late_beginning
    assert not Entry.parse(entries[0].content).is_late_beginning
    third = Entry(federation="lab", version=3, digest=digest(3), previous=late.signed(KEY).hash)
    assert faults([late.signed(KEY), third.signed(KEY)]) == []
    assert "version 2 was changed, or another key signed it" in faults([late.signed(Identity(b"o" * 32))])
    assert len(faults([*entries[:2], late.signed(KEY)])) == 1  # behind others it is another chain


def test_several_that_were_taken_out_are_named() -> None:
    whole = chain()
    assert faults([whole[0], *whole[3:]]) == ["versions 1 to 2 are missing"]


def test_a_missing_end_is_seen_only_by_who_knows_a_later_head() -> None:
    assert faults(chain()[:3]) == []
    assert len(faults(chain()[:3], (3, None))) == 1


@pytest.mark.parametrize("place", range(VERSIONS))
def test_an_entry_that_was_changed_is_named(place: int) -> None:
    """By somebody without the key, who keeps it readable."""
    changed = chain()
    fields = msgpack.unpackb(changed[place].content)
    fields["updates"] = [["pi-9", b"k" * 8, 1, bytes(32), 1000.0]]
    changed[place] = Signed(content=msgpack.packb(fields), signature=changed[place].signature)
    assert faults(changed) == [f"version {place} was changed, or another key signed it"]


@pytest.mark.parametrize("place", range(VERSIONS - 1))
def test_an_order_that_was_changed_is_named(place: int) -> None:
    moved = chain()
    moved[place], moved[place + 1] = moved[place + 1], moved[place]
    assert faults(moved) == [f"version {place} comes after version {place + 1}: the order was changed"]


def test_an_entry_that_stands_twice_is_named() -> None:
    twice = chain()
    twice.insert(4, twice[2])
    assert faults(twice) == ["version 2 is in the log twice, the second time as entry 5"]


def test_entries_of_another_log_by_the_same_key_are_named() -> None:
    """Somebody with the key, or a restored aggregator, made a second version 3."""
    mixed = [*chain()[:3], chain(salt="other")[3], *chain()[4:]]
    assert faults(mixed) == [
        "version 3 was made after a different version 2 than the one in the log",
        "version 4 was made after a different version 3 than the one in the log",
    ]
    assert faults(chain(salt="other"), (5, digest(5))) == [
        "version 5 was published with another digest than in the log"
    ]


def test_a_log_by_another_key_or_of_another_federation_is_named() -> None:
    foreign = faults(chain(2, identity=Identity(b"b" * 32)))
    assert foreign == [f"version {version} was changed, or another key signed it" for version in (0, 1)]
    assert faults(chain(1), federation="other") == ["version 0 belongs to the federation 'lab'"]
    assert faults([]) == ["the log has no entry"]


def test_only_a_restore_leaps_and_by_a_multiple_of_2_32_versions() -> None:
    first = chain(1)[0]

    def after(versions: int) -> Signed:
        return Entry(federation=LAB, version=versions, digest=first.hash, previous=first.hash).signed(KEY)

    assert faults([first, after(RESTORE_LEAP)]) == []
    assert faults([first, after(475_000 * RESTORE_LEAP)]) == []
    assert faults([first, after(3)]) == ["versions 1 to 2 are missing"]
    assert faults([first, after(RESTORE_LEAP + 1)]) == [f"versions 1 to {RESTORE_LEAP} are missing"]


def test_no_byte_of_a_file_can_be_changed_or_cut_off_unnoticed() -> None:
    packed = b"".join(signed.pack() for signed in chain(3))

    def checked(file: bytes) -> list[str]:
        audit = Audit(public=KEY.public, federation=LAB)
        try:
            for signed in unpack_all(BytesIO(file)):
                audit.take(signed)
        except ProtocolError as error:
            audit.faults.append(str(error))
        return audit.finish((2, digest(2)))

    assert checked(packed) == []
    for place in range(len(packed)):
        for bit in (0, 7):
            flipped = bytearray(packed)
            flipped[place] ^= 1 << bit
            assert checked(bytes(flipped)), (place, bit)
        assert checked(packed[:place]), place
    assert checked(packed + b"\xc0")


# --- an aggregator's


class World(Bench):
    """With two devices, that contribute to each version."""

    devices: list[Device]
    sent: list[bytes]  # the digests of what they sent

    def merge(self, versions: int) -> None:
        for _ in range(versions):
            base = self.version
            for index, device in enumerate(self.devices):
                block = (ternary_block, float32_block)[index](self.schema, base * 2 + index)
                frames = device.update(block, base, samples=10 + index, frame_bytes=1500)
                assert receipts(self.receive(device.topic("update"), *frames))[-1].outcome == "accepted"
                headers = b"".join(blake2b(parse(frame).header, digest_size=32).digest() for frame in frames)
                self.sent.append(blake2b(headers, digest_size=32).digest())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[World]:
    made = World(make_directory(tmp_path / "aggregator", merge__buffer_size=2, downlink__slots=4))
    made.start()
    made.sent = []
    made.devices = [made.join(name) for name in ("pi-1", "pi-2")]
    yield made
    made.close()


def verified(bench: World, source: Path | None = None) -> list[str]:
    return log.verify(source or bench.directory, bench.identity.public, None).faults


def test_the_log_names_every_update_of_every_version_with_its_weight(bench: World) -> None:
    bench.merge(3)
    found = [entry for entry, _ in log.entries(bench.directory)]
    assert [entry.version for entry in found] == [0, 1, 2, 3]
    assert [entry.digest for entry in found][-1] == bench.core.model.digest
    assert found[0].updates == ()
    for version, entry in enumerate(found[1:], start=1):
        assert [(each.device, each.seq, each.weight) for each in entry.updates] == [
            ("pi-1", version + 1, 10 / 21),
            ("pi-2", version + 1, 11 / 21),
        ]
        assert [each.digest for each in entry.updates] == bench.sent[2 * version - 2 : 2 * version]
    assert verified(bench) == []


def test_staleness_and_clipping_are_in_the_weight(tmp_path: Path) -> None:
    bench = Bench(make_directory(tmp_path / "agg", merge__buffer_size=1, merge__max_update_norm=0.5))
    bench.start()
    block = float32_block(bench.schema, 1)
    pi, late = bench.join("pi"), bench.join("late")
    bench.send(pi, block, 0, samples=7)
    bench.send(late, block, 0, samples=7)
    length = float((block.value().astype("f8") ** 2).sum() ** 0.5)
    first, second = (entry.updates[0].weight for entry, _ in list(log.entries(bench.directory))[1:])
    assert first == pytest.approx(0.5 / length)
    assert second == pytest.approx(2**-0.5 * 0.5 / length)
    bench.close()


def test_what_a_rule_left_out_is_named_with_weight_0(tmp_path: Path) -> None:
    bench = Bench(make_directory(tmp_path / "agg", merge__buffer_size=5, merge__rule="multi-krum"))
    bench.start()
    devices = [bench.join(name) for name in "abcde"]
    for device in devices:
        bench.send(device, (ternary_block if device.name == "c" else float32_block)(bench.schema, 1), 0)
    (merged,) = list(log.entries(bench.directory))[1:]
    assert {each.device: each.weight for each in merged[0].updates} == {**dict.fromkeys("abde", 0.25), "c": 0.0}
    bench.close()


def test_it_outlives_snapshots_restarts_and_a_restore(bench: World) -> None:
    for _ in range(4):
        bench.merge(5)
        bench.restart()
        bench.start()
    assert bench.head.snapshot.version > 16
    assert [entry.version for entry, _ in log.entries(bench.directory)] == list(range(21))
    assert verified(bench) == []
    bench.close()
    restored = administration.restored(bench.directory, "test", time.time())
    assert (restored % RESTORE_LEAP, restored > RESTORE_LEAP) == (20, True)
    bench.recover()
    bench.retained.clear()
    bench.start()
    bench.merge(1)
    assert verified(bench) == []
    assert [entry.version for entry, _ in log.entries(bench.directory)][-2:] == [restored, restored + 1]


def _change_entry(bench: World) -> None:
    (packed,) = bench.ledger.db.execute("SELECT entry FROM log WHERE version = 2").fetchone()
    signed = unpack(packed)
    entry = Entry.parse(signed.content)
    forged = replace(signed, content=replace(entry, updates=entry.updates[:1]).content())
    execute(bench, "UPDATE log SET entry = ? WHERE version = 2", forged.pack())


def execute(bench: World, query: str, *values: object) -> None:
    bench.ledger.db.execute(query, values)


def exchange_entries(bench: World) -> None:
    for old, new in [(2, -1), (3, 2), (-1, 3)]:
        execute(bench, "UPDATE log SET version = ? WHERE version = ?", new, old)


TAMPERED: dict[str, tuple[Callable[[World], None], str]] = {
    "an entry changed": (_change_entry, "version 2 was changed, or another key signed it"),
    "an entry garbled": (
        lambda bench: execute(bench, "UPDATE log SET entry = x'00' WHERE version = 2"),
        "version 2 is damaged",
    ),
    "an entry removed": (lambda bench: execute(bench, "DELETE FROM log WHERE version = 2"), "version 2 is missing"),
    "the end removed": (
        lambda bench: execute(bench, "DELETE FROM log WHERE version >= 3"),
        "the log ends with version 2, but version 4 was published",
    ),
    "entries exchanged": (
        exchange_entries,
        "version 3 stands in the place of version 2",
    ),
    "an update moved": (
        lambda bench: execute(bench, "UPDATE updates SET merged = 3 WHERE merged = 2 AND device = 'pi-2'"),
        "version 2 holds update 3 of pi-2 in the log, and not in the ledger",
    ),
    "an update forgotten": (
        lambda bench: execute(bench, "DELETE FROM updates WHERE merged = 2 AND device = 'pi-1'"),
        "version 2 holds update 3 of pi-1 in the log, and not in the ledger",
    ),
    "another version's digest": (
        lambda bench: execute(bench, "UPDATE versions SET digest = zeroblob(32) WHERE version = 2"),
        "version 2 has another digest in the ledger than in the log",
    ),
    "another head": (
        lambda bench: execute(bench, "UPDATE frames SET payload = x'00' WHERE topic LIKE '%head'"),
        "the head that was published last",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_with_the_ledger_is_named(bench: World, name: str) -> None:
    bench.merge(4)
    assert verified(bench) == []
    tamper, expected = TAMPERED[name]
    tamper(bench)
    found = verified(bench)
    assert any(fault.startswith(expected) for fault in found), found


def test_an_aggregator_does_not_go_on_behind_a_log_that_lost_its_end(bench: World) -> None:
    bench.merge(3)
    execute(bench, "DELETE FROM log WHERE version = 3")
    bench.close()
    with pytest.raises(CorruptError, match="the log of merges lacks version 3"):
        bench.recover()


def test_a_later_export_begins_with_the_earlier_one(bench: World, tmp_path: Path) -> None:
    bench.merge(2)
    log.export(bench.directory, tmp_path / "early")
    bench.merge(2)
    log.export(bench.directory, tmp_path / "late")
    early, late = (tmp_path / "early").read_bytes(), (tmp_path / "late").read_bytes()
    assert late.startswith(early)
    assert len(late) > len(early)


def test_an_update_costs_less_than_70_bytes(bench: World) -> None:
    bench.merge(50)
    audit = log.verify(bench.directory, bench.identity.public, None)
    each = sum(len(signed.pack()) for _, signed in log.entries(bench.directory)) / audit.updates
    fixed = len(next(log.entries(bench.directory))[1].pack())
    print(f"{each:.0f} bytes an update with 2 in a merge; an entry without updates has {fixed}")
    two = Entry(federation=LAB, version=2, digest=FIRST, previous=FIRST, updates=(contribution("pi-1", 70_000),) * 1000)
    assert len(two.content()) / 1000 < 70
    assert fixed < 250


# --- the commands


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["aggregator", "log", *map(str, arguments)])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


def test_another_person_checks_an_export_with_the_public_key_alone(
    bench: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.merge(3)
    file, key = tmp_path / "lab.log", bench.identity.public.hex()
    assert run(capsys, "export", bench.directory, file)[0] == 0
    head = f"3:{bench.core.model.digest.hex()}"
    code, printed = run(capsys, "verify", file, "--key", key, "--head", head)
    assert code == 0, printed
    assert "4 entries, 6 updates" in printed
    assert bench.core.model.digest.hex() in printed
    code, printed = run(capsys, "verify", file, "--key", key, "--head", 4, "--json")
    found = json.loads(printed)
    assert (code, found["ok"], found["version"], len(found["faults"])) == (1, False, 3, 1)
    code, printed = run(capsys, "verify", file, "--key", Identity.generate().public.hex())
    assert code == 1
    assert printed.count("another key signed it") == 4
    code, printed = run(capsys, "verify", bench.directory, "--json")
    assert (code, json.loads(printed)["ok"]) == (0, True)
    file.write_bytes(b"nonsense")
    assert run(capsys, "verify", file, "--key", key)[0] == 1
    file.write_bytes(b"")
    assert run(capsys, "verify", file, "--key", key, "--json")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((), "--key"), (("--key", "xy"), "64 hex"), (("--key", "00" * 32, "--head", "x"), "VERSION")],
)
def test_what_is_missing_to_check_it_is_said(
    bench: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    log.export(bench.directory, tmp_path / "lab.log")
    code, printed = run(capsys, "verify", tmp_path / "lab.log", *arguments)
    assert (code, printed.count("\n"), named in printed) == (2, 1, True), printed


def test_show_gives_a_device_its_entries(bench: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.merge(3)
    code, printed = run(capsys, "show", bench.directory, "--device", "pi-2", "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert code == 0
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert [(each["device"], each["weight"]) for row in rows for each in row["updates"]] == [("pi-2", 11 / 21)] * 3
    log.export(bench.directory, tmp_path / "lab.log")
    for source in (bench.directory, tmp_path / "lab.log"):
        code, printed = run(capsys, "show", source, "--version", 2)
        assert code == 0
        assert printed.startswith(f"version 2, digest {rows[1]['digest']}, 2 updates\n  pi-1 (")
        assert " 52.4 % " in printed
    assert run(capsys, "show", bench.directory, "--device", "nobody") == (1, "the log has no entry of nobody\n")
    (tmp_path / "lab.log").write_bytes(b"nonsense")
    assert run(capsys, "show", tmp_path / "lab.log")[0] == 2
