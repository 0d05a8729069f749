"""Hostile messages change no model, get no wrong receipt and take no memory; and they are counted."""

import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from nacl.signing import SigningKey

from stranger import wire
from stranger.device import Device
from stranger.link import Link
from stranger.models import SMALL, make_block, make_model
from stranger.servers import ENGINES, Aggregator, Broker, until
from stranger.wire import Schema

pytestmark = pytest.mark.slow

FEDERATION = "hostile"
BROKER_QUEUE = 4_000  # limits.broker_queue_messages, as aggregator.toml has it
GROWTH_KIB = 15 * 1024
Frames = dict[str, bytes]


class Siege:
    """A federation with an honest device and an enrolled, hostile one."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        make_model(folder / "model.safetensors", SMALL)
        self.folder = folder
        self.url = broker.url
        self.engine = broker.engine
        self.aggregator = Aggregator(
            folder / "aggregator",
            federation=FEDERATION,
            broker=broker.url,
            model=folder / "model.safetensors",
            settings={
                "merge.buffer_size": 1,
                "downlink.codec": "float32",
                "staleness.discount": "constant",
                "staleness.max": 2,
            },
        )
        self.aggregator.start()
        self.invitations = self.aggregator.invite("victim", "rogue", "guest")
        self.victim, self.rogue = (Device.join(self.invitations[n], folder / n) for n in ("victim", "rogue"))
        self.fence_seq: dict[str, int] = {}
        self.links: list[Link] = []
        for device in (self.victim, self.rogue):
            device.connect()
            assert device.enrol()["outcome"] == "enrolled"
        for device in (self.rogue, self.victim, self.victim, self.victim, self.victim):
            self.honest(device)
            self.fence_seq.setdefault(device.name, device.receipts[-1]["seq"])
        self.before = self.aggregator.status()

    @property
    def schema(self) -> Schema:
        assert self.victim.schema is not None
        return self.victim.schema

    def honest(self, device: Device) -> None:
        """Make the next version."""
        device.follow()
        assert device.schema is not None
        version = device.version
        assert device.update(make_block(device.schema, "ternary", version))["outcome"] == "accepted"
        device.follow(version + 1)

    def link(self, name: str) -> Link:
        """A connection of somebody who says to be `name`."""
        link = Link(self.url, name, client_id=f"mallory-{len(self.links)}")
        link.connect()
        self.links.append(link)
        return link

    def frame(
        self, *, signing: SigningKey | None = None, body: bytes | None = None, meta: Mapping[str, Any] | None = None,
        kind: str = "update", seq: int | None = None, **header: Any,
    ) -> bytes:  # fmt: skip
        """A frame of the rogue, right but for what is asked for."""
        signing = signing or self.rogue.signing
        body = make_block(self.schema, "ternary", 7) if body is None else body
        values: dict[str, Any] = {
            "kind": kind,
            "federation": FEDERATION,
            "sender": "rogue",
            "key": wire.key_id(bytes(signing.verify_key)),
            "seq": self.rogue.store.next_seq() if seq is None else seq,
            "part": (0, 1),
            "digest": wire.digest(body),
            "meta": self.meta() if meta is None else meta,
            **header,
        }
        return wire.pack_frame(signing, wire.pack_header(**values), body)

    def meta(self, **changes: Any) -> dict[str, Any]:
        """An update's meta on the head, right but for what is asked for."""
        right = {"base": self.victim.version, "samples": 1, "codec": "ternary", "encoding": "raw", "sealed": False}
        return {**right, "metrics": {}, **changes}

    def fence(self, device: Device) -> None:
        """Wait until the aggregator has seen all that was sent before: it answers an old seq on the same topic."""
        seq = self.fence_seq[device.name]
        heard = len(device.heard)

        def answered() -> bool:
            return any(r["seq"] == seq for r in device.heard[heard:])

        for _ in range(30):
            device.link.publish(device.up("offer"), device.frames("offer", {"base": 0, "parts": 1}, seq=seq)[0])
            try:
                device.pump(answered, 2.0)
            except TimeoutError:
                continue  # it may be one of too many frames in this second
            return
        raise TimeoutError("the aggregator answers no more")

    def send(self, frames: Mapping[str, bytes], *, kind: str = "update") -> list[dict[str, Any]]:
        """Send as the rogue; the receipts that came back."""
        heard = len(self.rogue.heard)
        for payload in frames.values():
            self.rogue.link.publish(self.rogue.up(kind), payload)
        self.rogue.link.flush()
        self.fence(self.rogue)
        return [r for r in self.rogue.heard[heard:] if r["seq"] != self.fence_seq["rogue"]]

    def unchanged(self, *, invalid: int = 0) -> dict[str, Any]:
        """The aggregator lives and the model is as it was, and so much more has been refused."""
        assert self.aggregator.alive
        status = self.aggregator.status()
        for name in ("version", "digest", "buffer"):
            assert status[name] == self.before[name]
        for name in ("accepted", "merged"):
            assert status["counts"][name] == self.before["counts"][name]
        refused = sum(status["counts"]["invalid"].values()) - sum(self.before["counts"]["invalid"].values())
        assert refused >= invalid, (self.before["counts"], status["counts"])
        difference = {
            reason: count - self.before["counts"]["invalid"].get(reason, 0)
            for reason, count in status["counts"]["invalid"].items()
        }
        print({reason: count for reason, count in difference.items() if count})
        self.before = status
        return status

    def close(self) -> None:
        """Take leave."""
        for link in self.links:
            link.disconnect()
        for device in (self.victim, self.rogue):
            device.leave()


@pytest.fixture(scope="module", params=ENGINES)
def siege(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    folder = tmp_path_factory.mktemp("siege")
    with Broker(request.param, folder / "broker") as broker:
        made = Siege(folder, broker)
        yield made
        made.close()
        if made.aggregator.alive:
            assert made.aggregator.terminate() == 0


def raw_header(siege: Siege, header: bytes, body: bytes = b"") -> bytes:
    """A well-signed frame with any bytes as its header."""
    return wire.pack_frame(siege.rogue.signing, header, body)


def right_header(siege: Siege) -> bytes:
    return wire.parse_frame(siege.frame()).header


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def not_frames(siege: Siege) -> Frames:
    """What fails before the signature is looked at."""
    good = siege.frame()
    header = right_header(siege)
    key = siege.rogue.key
    long = siege.meta(metrics={}, filling="x" * 20_000)
    return {
        "short": b"TBF1",
        "a byte short of the least": good[:71],
        "magic": b"TBF2" + good[4:],
        "H over the end": good[:4] + struct.pack("<I", 16_000) + good[8:],
        "H of 4 GB": good[:4] + b"\xff\xff\xff\xff" + good[8:],
        "garbage": bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)),
        "a header of 20 KB": siege.frame(meta=long),
        "part 7 of 3": siege.frame(part=(7, 3)),
        "part 3 of 3": siege.frame(part=(3, 3)),
        "part 0 of 0": siege.frame(part=(0, 0)),
        "part -1 of 3": siege.frame(part=(-1, 3)),
        "part 0 of 65536": siege.frame(part=(0, 65_536)),
        "part of three": siege.frame(part=(0, 1, 2)),
        "part 0.0": siege.frame(part=(0.0, 1)),
        "seq 0": siege.frame(seq=0),
        "seq -1": siege.frame(seq=-1),
        "seq true": siege.frame(seq=True),
        "seq 1.0": siege.frame(seq=1.0),  # type: ignore[arg-type]  # no integer, as the case says
        "key of 7 bytes": siege.frame(key=key[:7]),
        "key as str": siege.frame(key="8 bytes."),
        "digest of 31 bytes": siege.frame(digest=bytes(31)),
        "kind as bin": siege.frame(kind=b"update"),  # type: ignore[arg-type]  # no str, as the case says
        "federation nil": siege.frame(federation=None),
        "meta an array": raw_header(siege, msgpack.packb({**msgpack.unpackb(header), "meta": []})),
        "no seq": raw_header(siege, msgpack.packb({k: v for k, v in msgpack.unpackb(header).items() if k != "seq"})),
        "an array": raw_header(siege, msgpack.packb([1, 2, 3])),
        "an int": raw_header(siege, b"\x01"),
        "empty header": raw_header(siege, b""),
        "bytes after the map": raw_header(siege, header + b"\xc0"),
        "truncated header": raw_header(siege, header[:-1]),
        "a key twice": raw_header(siege, b"\x89" + header[1:] + msgpack.packb("seq") + b"\x01"),
        "a key twice in meta": raw_header(siege, header.replace(b"\x86\xa4base", b"\x87\xa4base\x01\xa4base", 1)),
        "an int as key": raw_header(siege, b"\x89" + header[1:] + b"\x01\x01"),
        "an array as key": raw_header(siege, b"\x89" + header[1:] + b"\x90\x01"),
        "nine levels": siege.frame(meta=siege.meta(deep=nested(7))),
        "thousands of levels": siege.frame(meta=siege.meta(deep=None)).replace(b"\xc0", b"\x91" * 5000 + b"\xc0", 1),
        "thousands of levels, signed": raw_header(siege, b"\x89" + header[1:] + b"\xa1x" + b"\x91" * 5000 + b"\x01"),
        "not UTF-8": raw_header(siege, header.replace(b"\xa5rogue", b"\xa5\xff\xfe\xfd\xfc\xfb", 1)),
        "a map of 4 G entries": raw_header(siege, b"\xdf\xff\xff\xff\xff" + header[1:]),
        "an array of 4 G entries": raw_header(siege, b"\x89" + header[1:] + b"\xa1x\xdd\xff\xff\xff\xff"),
        "a str of 4 GB": raw_header(siege, b"\x89" + header[1:] + b"\xa1x\xdb\xff\xff\xff\xff"),
        "other federation": siege.frame(federation="lab"),
        "other sender": siege.frame(sender="victim"),
        "sender aggregator": siege.frame(sender="aggregator"),
        "other kind": siege.frame(kind="offer", body=b"", meta={"base": 0, "parts": 1}),
        "unknown key": siege.frame(signing=SigningKey.generate()),
        "key id of another device": siege.frame(key=siege.victim.key),
        "forged signature": siege.frame(signing=SigningKey.generate(), key=key),
        "a bit of the signature": _flip(siege.frame()),
        "another body": siege.frame()[:-1] + b"\x00",
        "a longer body": siege.frame() + b"\x00",
        "no body": siege.frame(digest=wire.digest(b"x"), body=b""),
    }


def _flip(frame: bytes) -> bytes:
    """A bit of the signature turned."""
    (length,) = struct.unpack_from("<I", frame, 4)
    at = 8 + length + 10
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


def test_what_is_no_frame_of_the_sender_is_dropped_and_counted(siege: Siege) -> None:
    """A key that is not known may be told so; nobody who has another key believes it."""
    frames = not_frames(siege)
    answers = siege.send(frames)
    assert {answer["outcome"] for answer in answers} <= {"unknown"}
    assert siege.rogue.key not in [answer["device_key"] for answer in answers]
    siege.unchanged(invalid=len(frames))


def test_nobody_speaks_for_another(siege: Siege) -> None:
    thief = siege.link("victim")
    ghost = siege.link("ghost")
    victim = siege.victim.up("update")
    heard = len(siege.victim.heard)
    key = siege.victim.key
    stolen = {
        "signed by the rogue": siege.frame(sender="victim", key=key),
        "with the rogue's key id": siege.frame(sender="victim"),
        "the rogue's own": siege.frame(),
    }
    for payload in stolen.values():
        thief.publish(victim, payload)
    own = SigningKey.generate()
    for payload in (siege.frame(sender="ghost", signing=own), siege.frame(sender="ghost")):
        ghost.publish(f"ternbus/1/{FEDERATION}/up/ghost/update", payload)
    thief.publish(victim, b"")  # clears a retained topic; it is no frame, and is not counted
    thief.flush()
    ghost.flush()
    siege.fence(siege.rogue)
    siege.fence(siege.victim)
    fence = siege.fence_seq["victim"]
    others = [r for r in siege.victim.heard[heard:] if r["seq"] != fence]
    assert all(r["outcome"] == "unknown" and r["device_key"] != key for r in others)
    siege.unchanged(invalid=len(stolen) + 2)


def rle_bomb(stated: int, *, blocks: int = 25_000, window: int = 0x68) -> bytes:
    """A zstd frame of 100 KB that makes 3 GB, whatever it says."""
    block = struct.pack("<I", 131_072 << 3 | 1 << 1)[:3] + b"\0"
    last = struct.pack("<I", 131_072 << 3 | 1 << 1 | 1)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd\x80" + bytes([window]) + struct.pack("<I", stated) + block * (blocks - 1) + last


def bad_content(siege: Siege) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Whole updates, well signed, of which the content or meta is wrong."""
    schema = siege.schema
    good = make_block(schema, "ternary", 8)
    length = len(good)
    scales = len(schema.ternary) * 4
    trits = scales
    dense = length - 4 * sum(t.size for t in schema.dense)
    floats = make_block(schema, "float32", 8)

    def put(at: int, data: bytes, block: bytes = good) -> bytes:
        return block[:at] + data + block[at + len(data) :]

    def f4(value: float) -> bytes:
        return struct.pack("<f", value)

    packed = wire.encode(good, "zstd")
    no_size = b"\x28\xb5\x2f\xfd\x00\x68" + struct.pack("<I", length << 3 | 1)[:3] + good
    wide = b"\x28\xb5\x2f\xfd\x80\x70" + struct.pack("<I", length) + struct.pack("<I", length << 3 | 1)[:3] + good
    zstd, ternary, float32 = {"encoding": "zstd"}, dict[str, Any](), {"codec": "float32"}
    sealed = {"sealed": True}
    aggregator = siege.rogue.aggregator
    return {
        "a byte short": (ternary, good[:-1]),
        "a byte long": (ternary, good + b"\0"),
        "empty": (ternary, b""),
        "twice as long": (ternary, good * 2),
        "ternary as float32": (float32, good),
        "float32 as ternary": (ternary, floats),
        "scale NaN": (ternary, put(0, f4(float("nan")))),
        "scale negative": (ternary, put(4, f4(-0.5))),
        "scale infinite": (ternary, put(0, f4(float("inf")))),
        "scale too large": (ternary, put(0, f4(70_000.0))),
        "trit byte 243": (ternary, put(trits, b"\xf3")),
        "trit byte 255": (ternary, put(trits + 5, b"\xff")),
        "fill": (ternary, put(dense - 1, b"\xf2")),
        "dense NaN": (ternary, put(dense, f4(float("nan")))),
        "dense -1e6": (ternary, put(length - 4, f4(-1e6))),
        "float32 NaN": (float32, put(400, f4(float("nan")), floats)),
        "float32 infinite": (float32, put(0, f4(float("-inf")), floats)),
        "zstd that is none": (zstd, good),
        "zstd truncated": (zstd, packed[:-5]),
        "zstd and a byte": (zstd, packed + b"\0"),
        "two zstd frames": (zstd, packed * 2),
        "a skippable frame before": (zstd, b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + packed),
        "zstd without content size": (zstd, no_size),
        "zstd with a window of 16 MiB": (zstd, wide),
        "a bomb that states 3 GB": (zstd, rle_bomb(25_000 * 131_072)),
        "a bomb that states the right size": (zstd, rle_bomb(length)),
        "a bomb with a window of 2 TB": (zstd, rle_bomb(length, window=0xF8)),
        "empty zstd": (zstd, b""),
        "a box that is none": (sealed, good * 2),
        "an empty box": (sealed, b""),
        "base in the future": ({"base": siege.victim.version + 1}, good),
        "base far in the future": ({"base": 2**64 - 1}, good),
        "base -1": ({"base": -1}, good),
        "base a float": ({"base": 0.0}, good),
        "samples 0": ({"samples": 0}, good),
        "samples 2^32": ({"samples": 2**32}, good),
        "samples true": ({"samples": True}, good),
        "unknown codec": ({"codec": "float16"}, good),
        "unknown encoding": ({"encoding": "gzip"}, good),
        "sealed 1": ({"sealed": 1}, good),
        "sealed in words": (sealed, wire.seal(good[:-1], siege.rogue.key, 1, aggregator)),
        "33 metrics": ({"metrics": {str(i): 0.0 for i in range(33)}}, good),
        "metrics NaN": ({"metrics": {"loss": float("nan")}}, good),
        "metrics str": ({"metrics": {"loss": "low"}}, good),
        "metrics an array": ({"metrics": []}, good),
        "codec nil": ({"codec": None}, good),
    }


def test_bad_content_is_invalid_and_says_why(siege: Siege) -> None:
    cases = bad_content(siege)
    seqs = {name: siege.rogue.store.next_seq() for name in cases}
    before = siege.aggregator.resident_kib()
    frames = {
        name: siege.frame(seq=seqs[name], meta=siege.meta(**changes), body=body)
        for name, (changes, body) in cases.items()
    }
    for name, other in (("seq", {"seq": 1}), ("key", {"key": siege.victim.key})):
        seqs[name] = siege.rogue.store.next_seq()
        inside: dict[str, Any] = {"seq": seqs[name], "key": siege.rogue.key, **other}
        box = wire.seal(make_block(siege.schema, "ternary", 9), inside["key"], inside["seq"], siege.rogue.aggregator)
        frames[name] = siege.frame(seq=seqs[name], meta=siege.meta(sealed=True), body=box)
    seqs["no base"] = siege.rogue.store.next_seq()
    without = {key: value for key, value in siege.meta().items() if key != "base"}
    frames["no base"] = siege.frame(seq=seqs["no base"], meta=without)
    answers = {r["seq"]: r for r in siege.send(frames)}
    got = {name: answers.get(seq, {}).get("outcome") for name, seq in seqs.items()}
    assert got == dict.fromkeys(seqs, "invalid")
    assert all(answers[seq]["reason"] for seq in seqs.values())
    siege.unchanged(invalid=len(frames))
    assert siege.aggregator.resident_kib() - before < GROWTH_KIB


def test_seq_base_and_staleness_are_answered_in_order(siege: Siege) -> None:
    rogue, head = siege.rogue, siege.victim.version
    assert rogue.head is not None
    assert head - 1 > rogue.head["max_staleness"]
    highest = max(r["seq"] for r in rogue.heard)
    seqs = {name: rogue.store.next_seq(above=highest) for name in ("same base", "stale", "stale and bad", "future")}
    frames = {
        "same base": siege.frame(seq=seqs["same base"], meta=siege.meta(base=0)),  # accepted long ago: not stale
        "stale": siege.frame(seq=seqs["stale"], meta=siege.meta(base=1)),
        "stale and bad": siege.frame(seq=seqs["stale and bad"], meta=siege.meta(base=2), body=b"x"),
        "future": siege.frame(seq=seqs["future"], meta=siege.meta(base=head + 7), body=b"x"),
        "replayed": siege.frame(seq=siege.fence_seq["rogue"] + 1),
        "the same again": siege.frame(seq=seqs["future"], meta=siege.meta(base=3)),
    }
    receipts = siege.send(frames)
    answers = {name: [r for r in receipts if r["seq"] == seq] for name, seq in seqs.items()}
    assert [r["outcome"] for r in answers["same base"]] == ["duplicate"]
    assert answers["same base"][0].get("highest_seq", 0) <= seqs["same base"]
    assert [r["outcome"] for r in answers["stale"]] == ["stale"]
    assert [r["outcome"] for r in answers["stale and bad"]] == ["stale"]
    assert [r["outcome"] for r in answers["future"]] == ["invalid", "invalid"]
    assert answers["future"][0]["reason"] == answers["future"][1]["reason"] != ""
    (replayed,) = [r for r in receipts if r["seq"] == siege.fence_seq["rogue"] + 1]
    assert (replayed["outcome"], replayed["highest_seq"]) == ("duplicate", seqs["future"])
    counts = siege.before["counts"]
    after = siege.unchanged()["counts"]
    assert after["stale"] - counts["stale"] == 2
    assert after["duplicate"] - counts["duplicate"] >= 2


def test_a_code_admits_one_key_once(siege: Siege) -> None:
    guest = siege.link("guest")
    guest.subscribe([f"ternbus/1/{FEDERATION}/down/guest/#"])
    told = Device.join(siege.invitations["guest"], siege.folder / "guest")  # never connects; it only knows the code
    code, signing = told.store.values["code"], told.signing
    heard: list[bytes] = []  # keys that were answered since the last question

    def answer(who: SigningKey, code: str, seq: int, device: str = "guest") -> dict[str, Any]:
        public = bytes(who.verify_key)
        body = wire.enroll_body(code, FEDERATION, device, public)
        guest.publish(
            "ternbus/1/hostile/up/guest/enroll",
            siege.frame(kind="enroll", sender="guest", signing=who, seq=seq, meta={"public_key": public}, body=body),
        )
        found: list[dict[str, Any]] = []
        heard.clear()

        def came() -> bool:
            guest.step()
            while guest.inbox:
                meta = wire.parse_frame(guest.inbox.popleft()[1]).meta
                heard.append(meta["device_key"])
                if meta["device_key"] == wire.key_id(public):
                    found.append(meta)
            return bool(found)

        until(came, 60, "an answer to enroll")
        return found[0]

    assert answer(SigningKey.generate(), "guessed", 1)["outcome"] == "refused"
    assert answer(signing, code, 1, device="victim")["outcome"] == "refused"
    assert answer(signing, code, 2)["outcome"] == "enrolled"
    assert answer(signing, code, 2)["outcome"] == "enrolled"  # the identical frame, the same answer
    assert answer(SigningKey.generate(), code, 1)["outcome"] == "refused"  # spent
    again = Device.join(siege.aggregator.invite("guest")["guest"], siege.folder / "guest-again")
    assert answer(again.signing, again.store.values["code"], 1)["outcome"] == "enrolled"  # replaces the key
    guest.publish(f"ternbus/1/{FEDERATION}/up/guest/update", siege.frame(sender="guest", signing=signing, seq=3))
    assert answer(again.signing, again.store.values["code"], 1)["outcome"] == "enrolled"  # after that update
    assert heard == [wire.key_id(bytes(again.signing.verify_key))]
    assert answer(signing, again.store.values["code"], 4)["outcome"] == "refused"  # a replaced key never returns
    siege.unchanged(invalid=5)


def unfinished(siege: Siege, count: int, size: int, start: int) -> None:
    """Send the first parts of messages that never end."""
    body = np.random.default_rng(start).bytes(size)
    whole = wire.digest(body)
    for i in range(count):
        parts = (2, 3, 8, 60_000, 65_535)[i % 5]
        kind = ("update", "update", "update", "status", "metrics")[i // 5 % 5]
        meta = siege.meta() if kind == "update" else {}
        frame = siege.frame(kind=kind, body=body, digest=whole, part=(i % parts, parts), meta=meta)
        siege.rogue.link.publish(siege.rogue.up(kind), frame)
        if i % 50 == 49:
            siege.rogue.link.flush()
    siege.rogue.link.flush()


def test_what_the_document_allows_is_accepted(siege: Siege) -> None:
    schema = siege.schema
    block = make_block(schema, "ternary", 7)
    length = struct.pack("<I", len(block))
    stored = struct.pack("<I", len(block) << 3 | 1)[:3] + block
    window = b"\x28\xb5\x2f\xfd\x80\x68" + length + stored  # of 8 MiB
    zeros = np.zeros(sum(t.size for t in schema.ternary), np.int8)
    few = np.full(sum(t.size for t in schema.dense), -0.0, np.float32)
    tiny = schema.ternary_content([1e-40, -1e-40], zeros, few)
    largest = schema.ternary_content([65_504.0, 0.0], zeros, few - 65_504)

    def header(**changes: Any) -> Any:
        return msgpack.unpackb(wire.parse_frame(siege.frame(meta=siege.meta(**changes))).header)

    def repacked(found: Any) -> bytes:
        return bytes(msgpack.packb(found))

    cases: dict[str, Callable[[], bytes]] = {
        "unknown keys": lambda: raw_header(siege, repacked({**header(more=[{"a": [1]}]), "more": None}), block),
        "eight levels": lambda: siege.frame(meta=siege.meta(deep=nested(6))),
        "an int where a float is asked for": lambda: siege.frame(meta=siege.meta(metrics={"loss": 1})),
        "another order": lambda: raw_header(siege, repacked(dict(reversed(header().items()))), block),
        "long forms": lambda: raw_header(
            siege,
            repacked(header(metrics={"loss": 0.5}))
            .replace(msgpack.packb(0.5), msgpack.packb(0.5, use_single_float=True))
            .replace(b"\xa7samples\x01", b"\xa7samples\xd3" + bytes(7) + b"\x01"),
            block,
        ),
        "a window of 8 MiB": lambda: siege.frame(meta=siege.meta(encoding="zstd"), body=window),
        "tiny numbers": lambda: siege.frame(body=tiny),
        "the largest numbers": lambda: siege.frame(body=largest),
    }
    for name, make in cases.items():
        payload = make()
        receipts = {r["seq"]: r["outcome"] for r in siege.send({name: payload})}
        assert receipts.get(wire.parse_frame(payload).seq) == "accepted", name
        siege.victim.follow(siege.victim.version + 1)
    siege.before = siege.aggregator.status()
    assert siege.before["digest"] == siege.victim.digest.hex()


@pytest.mark.parametrize(
    ("parts", "part", "body"),
    [(0, (0, 1), b""), (2, (0, 1), b"a body"), (2, (1, 2), b"")],
    ids=["no parts", "a body", "in two parts"],
)
def test_a_bad_offer_is_invalid(siege: Siege, parts: int, part: tuple[int, int], body: bytes) -> None:
    meta = {"base": siege.victim.version, "parts": parts}
    receipts = siege.send({"offer": siege.frame(kind="offer", meta=meta, part=part, body=body)}, kind="offer")
    assert [r["outcome"] for r in receipts] == ["invalid"]


def test_a_grant_is_less_than_half_of_what_the_broker_queues(siege: Siege) -> None:
    offered = siege.rogue.store.next_seq()
    meta = {"base": siege.victim.version, "parts": 65_535}
    receipts = siege.send({"offer": siege.frame(kind="offer", seq=offered, meta=meta, body=b"")}, kind="offer")
    if not receipts:  # `invalid` and `busy` would be fine too
        (grant,) = [g for g in siege.rogue.grants if g["seq"] == offered]
        assert sum(last - first + 1 for first, last in grant["parts"]) < BROKER_QUEUE // 2


def test_thousands_of_messages_never_finished_take_no_memory(siege: Siege) -> None:
    unfinished(siege, 1_200, 60_000, 0)  # warms up with as much as follows: all that may be kept is kept after it
    siege.fence(siege.rogue)
    before = siege.aggregator.resident_kib()
    unfinished(siege, 1_200, 60_000, 1)  # 72 MB
    siege.fence(siege.rogue)
    unfinished(siege, 1_800, 1_100, 2)
    siege.fence(siege.rogue)
    after = siege.aggregator.resident_kib()
    print(f"resident: {before} KiB before, {after} KiB after")
    assert after - before < GROWTH_KIB
    siege.unchanged(invalid=3_900)


def test_thousands_of_strangers_take_no_memory(siege: Siege) -> None:
    link = siege.link("rogue")
    own = SigningKey.generate()

    def crowd(count: int, start: int) -> None:
        for i in range(start, start + count):
            # an access list, where there is one, lets the rogue write under its own name alone
            name = f"crowd-{i}" if siege.engine == "nats" else "rogue"
            public = bytes(own.verify_key) if i % 2 else bytes(SigningKey.generate().verify_key)
            for kind, meta in (("enroll", {"public_key": public}), ("update", siege.meta())):
                frame = siege.frame(kind=kind, sender=name, signing=own, meta=meta, body=bytes(32))
                link.publish(f"ternbus/1/{FEDERATION}/up/{name}/{kind}", frame)
            if i % 50 == 49:
                link.flush()
        link.flush()
        siege.fence(siege.victim)

    crowd(300, 0)
    before = siege.aggregator.resident_kib()
    crowd(1_500, 300)
    after = siege.aggregator.resident_kib()
    print(f"resident: {before} KiB before, {after} KiB after")
    assert after - before < GROWTH_KIB
    siege.unchanged(invalid=1_500)


def test_after_all_that_an_honest_update_is_merged(siege: Siege) -> None:
    for device in (siege.victim, siege.rogue):
        version = device.version
        siege.fence(device)
        siege.honest(device)
        assert device.version > version
    siege.victim.follow(siege.rogue.version)
    assert siege.victim.digest == siege.rogue.digest
    status = siege.aggregator.status()
    assert (status["version"], status["digest"]) == (siege.victim.version, siege.victim.digest.hex())
    assert not siege.victim.refused
