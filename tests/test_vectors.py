"""Every entry of vectors.json is reproduced, both ways, and each malformed one is refused with a reason."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import frame as frames
from ternbus.broker.protocol import revocations
from ternbus.broker.protocol.arms import Arms
from ternbus.broker.protocol.identity import Identity, enroll_proof, seal
from ternbus.broker.protocol.messages import Enroll, Metrics, Receipt, Update
from ternbus.broker.protocol.model_messages import Candidate, Delta, Head
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.protocol.schema import Schema, Tensor, vector_digest, vector_of, vector_xxh3
from ternbus.broker.protocol.statistics import Measured, StatisticsAnswer, StatisticsRequest
from ternbus.broker.protocol.ternary import Block, content_bytes, decode, encode, pack, unpack

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text())
DEVICE = Identity(bytes.fromhex(VECTORS["keys"]["device"]["seed"]))
AGGREGATOR = Identity(bytes.fromhex(VECTORS["keys"]["aggregator"]["seed"]))
SCHEMA = Schema.parse(bytes.fromhex(VECTORS["schema"]["bytes"]))
VECTOR = vector_of(bytes.fromhex(VECTORS["vector"]["float32"]), SCHEMA)
CONTENT = bytes.fromhex(VECTORS["ternary_block"]["content"])
NUMBERS = ("count", "first", "second", "histogram", "labels")


def unhex(name: str, key: str) -> bytes:
    return bytes.fromhex(VECTORS[name][key])


@pytest.mark.parametrize(("name", "identity"), [("device", DEVICE), ("aggregator", AGGREGATOR)])
def test_keys_follow_from_their_seeds(name: str, identity: Identity) -> None:
    assert identity.public.hex() == VECTORS["keys"][name]["public"]
    assert identity.key_id.hex() == VECTORS["keys"][name]["key_id"]


def test_the_schema_reads_and_writes_the_same_bytes() -> None:
    entries = [(name, tuple(shape), role) for name, shape, role in VECTORS["schema"]["entries"]]
    assert SCHEMA.tensors == tuple(Tensor(*entry) for entry in entries)
    assert SCHEMA.digest.hex() == VECTORS["schema"]["digest"]
    assert Schema.write(SCHEMA.tensors) == SCHEMA


def test_the_vector_and_its_digest() -> None:
    assert VECTOR.tobytes() == unhex("vector", "float32")
    assert vector_digest(VECTOR).hex() == VECTORS["vector"]["digest"]


def test_a_ternary_block_is_written_and_read() -> None:
    entry = VECTORS["ternary_block"]
    trits = np.array(entry["trits"], dtype=np.int8)
    block = Block.of_trits(SCHEMA, entry["scales"], trits, np.array(entry["dense"], dtype=np.float32))
    assert block.content == CONTENT
    assert unpack(pack(trits), len(trits)).tolist() == entry["trits"]
    read = Block.read(SCHEMA, "ternary", "raw", CONTENT)
    assert read == block
    after = read.apply(VECTOR)
    assert after.tobytes() == unhex("ternary_block", "vector_after")
    assert vector_digest(after).hex() == entry["digest_after"]


def test_zstd_both_ways() -> None:
    assert decode(unhex("ternary_block", "zstd_example"), "zstd", len(CONTENT)) == CONTENT
    assert decode(encode(CONTENT, "zstd"), "zstd", len(CONTENT)) == CONTENT


def test_a_float32_block_is_written_and_read() -> None:
    content = unhex("float32_block", "content")
    block = Block.read(SCHEMA, "float32", "raw", content)
    assert block.apply(VECTOR).tobytes() == unhex("float32_block", "vector_after")
    assert Block.of_float32(SCHEMA, block.value()).content == content


def test_tiny_numbers_count_as_zero() -> None:
    vector = vector_of(unhex("tiny_numbers", "vector"), SCHEMA)
    block = Block.read(SCHEMA, "ternary", "raw", unhex("tiny_numbers", "content"))
    assert block.apply(vector).tobytes() == unhex("tiny_numbers", "vector_after")


def test_an_update_frame_byte_for_byte() -> None:
    entry = VECTORS["update"]
    header = entry["header"]
    update = Update.from_meta(header["meta"])
    built = frames.build(
        DEVICE, federation="lab", sender="pi-01", kind="update", seq=7, meta=update.meta(), body=CONTENT
    )
    assert built.hex() == entry["frame"]
    frame = frames.parse(built)
    frame.check_authentic(DEVICE.public)
    assert (frame.kind, frame.federation, frame.sender, frame.seq) == ("update", "lab", "pi-01", 7)
    assert (frame.part, frame.parts) == (0, 1)
    assert (frame.key.hex(), frame.digest.hex()) == (header["key"], header["digest"])
    assert frame.meta == header["meta"]
    assert frame.body == CONTENT


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 2, 0)])
def test_three_parts_join_in_any_order(order: tuple[int, ...]) -> None:
    sent = [bytes.fromhex(part) for part in VECTORS["message_in_3_parts"]["frames"]]
    collector = Collector(messages_max=4, bytes_max=10_000)
    wholes = []
    for part in order:
        frame = frames.parse(sent[part])
        frame.check_authentic(DEVICE.public)
        wholes.append(collector.add(frame))
    assert all(whole is None for whole in wholes[:-1])
    assert wholes[-1] is not None
    assert wholes[-1].body == unhex("message_in_3_parts", "body")
    assert len(collector) == 0


def test_three_parts_are_built_byte_for_byte() -> None:
    sent = [bytes.fromhex(part) for part in VECTORS["message_in_3_parts"]["frames"]]
    for raw in sent:
        frame = frames.parse(raw)
        rebuilt = frames.build(
            DEVICE,
            federation=frame.federation,
            sender=frame.sender,
            kind=frame.kind,
            seq=frame.seq,
            meta=frame.meta,
            body=frame.body,
            part=frame.part,
            parts=frame.parts,
        )
        assert rebuilt == raw


@pytest.mark.parametrize(("entry", "frame_bytes"), [("head", 0), ("head_with_frame_bytes", 2**18)])
def test_a_head_byte_for_byte(entry: str, frame_bytes: int) -> None:
    meta = dict(VECTORS[entry]["meta"])
    meta["digest"], meta["schema"] = bytes.fromhex(meta["digest"]), bytes.fromhex(meta["schema"])
    frame = frames.parse(unhex(entry, "frame"))
    frame.check_authentic(AGGREGATOR.public)
    head = Head.from_meta(frame.meta)
    assert head == Head.from_meta(meta)
    assert head.frame_bytes == frame_bytes
    built = frames.build(
        AGGREGATOR, federation="lab", sender="aggregator", kind="head", seq=frame.seq, meta=head.meta()
    )
    assert built == unhex(entry, "frame")


@pytest.mark.parametrize("what", VECTORS["malformed_heads"])
def test_malformed_heads_are_refused(what: str) -> None:
    frame = frames.parse(unhex("malformed_heads", what))
    frame.check_authentic(AGGREGATOR.public)
    with pytest.raises(ProtocolError, match="frame_bytes"):
        Head.from_meta(frame.meta)


def test_a_receipt_byte_for_byte() -> None:
    frame = frames.parse(unhex("receipt", "frame"))
    frame.check_authentic(AGGREGATOR.public)
    receipt = Receipt.from_meta(frame.meta)
    assert (receipt.device, receipt.device_key, receipt.seq) == ("pi-01", DEVICE.key_id, 7)
    assert (receipt.outcome, receipt.version) == ("accepted", 42)
    built = frames.build(
        AGGREGATOR, federation="lab", sender="aggregator", kind="receipt", seq=frame.seq, meta=receipt.meta()
    )
    assert built == unhex("receipt", "frame")


def test_an_enroll_byte_for_byte() -> None:
    proof = enroll_proof(VECTORS["enroll"]["code"], "lab", "pi-01", DEVICE.public)
    assert proof.hex() == VECTORS["enroll"]["body"]
    meta = Enroll(public_key=DEVICE.public).meta()
    built = frames.build(DEVICE, federation="lab", sender="pi-01", kind="enroll", seq=1, meta=meta, body=proof)
    assert built.hex() == VECTORS["enroll"]["frame"]
    frame = frames.parse(built)
    assert Enroll.from_meta(frame.meta).public_key == DEVICE.public


@pytest.mark.parametrize(("name", "seq"), [("", 8), ("plain_", 9)])
def test_metrics_byte_for_byte_with_directions_and_as_a_stranger_writes_them(name: str, seq: int) -> None:
    meta = VECTORS["metrics"][f"{name}meta"]
    metrics = Metrics.from_meta(meta)
    assert metrics.meta() == meta
    built = frames.build(
        DEVICE, federation="lab", sender="pi-01", kind="metrics", seq=seq, meta=metrics.meta(), body=b""
    )
    assert built == unhex("metrics", f"{name}frame")
    frame = frames.parse(built)
    frame.check_authentic(DEVICE.public)
    assert Metrics.from_meta(frame.meta) == metrics
    assert ("better" in meta, "classes" in meta) == (not name, not name)


@pytest.mark.parametrize(("name", "seq"), [("", 97), ("plain_", 98)])
def test_a_delta_byte_for_byte_with_a_checksum_and_without(name: str, seq: int) -> None:
    frame = frames.parse(unhex("delta", f"{name}frame"))
    frame.check_authentic(AGGREGATOR.public)
    delta = Delta.from_meta(frame.meta)
    as_hex = {key: value.hex() if isinstance(value, bytes) else value for key, value in delta.meta().items()}
    assert as_hex == VECTORS["delta"][f"{name}meta"]
    about: dict[str, Any] = {"federation": "lab", "sender": "aggregator", "kind": "delta", "seq": seq}
    assert frames.build(AGGREGATOR, meta=delta.meta(), body=CONTENT, **about) == unhex("delta", f"{name}frame")
    vector = Block.read(SCHEMA, delta.codec, delta.encoding, frame.body).apply(VECTOR)
    assert vector_digest(vector) == delta.digest
    assert delta.xxh3 == (b"" if name else vector_xxh3(vector))


@pytest.mark.parametrize("row", VECTORS["checksums"], ids=lambda row: str(row["elements"]))
def test_checksums_of_short_and_long_vectors(row: dict[str, Any]) -> None:
    vector = (np.arange(row["elements"]) % 251 - 125).astype(np.float32)
    assert vector_xxh3(vector).hex() == row["xxh3"]


@pytest.mark.parametrize("what", VECTORS["malformed_deltas"])
def test_malformed_deltas_are_refused(what: str) -> None:
    frame = frames.parse(unhex("malformed_deltas", what))
    frame.check_authentic(AGGREGATOR.public)
    with pytest.raises(ProtocolError) as error:
        Delta.from_meta(frame.meta)
    assert error.value.reason == "bad-meta"


def test_a_candidate_and_the_metrics_that_name_it() -> None:
    meta, frame = VECTORS["candidate"]["meta"], frames.parse(unhex("candidate", "frame"))
    frame.check_authentic(AGGREGATOR.public)
    candidate = Candidate.from_meta(frame.meta)
    assert {**candidate.meta(), "digest": candidate.digest.hex()} == meta
    about: dict[str, Any] = {
        "federation": "lab",
        "sender": "aggregator",
        "kind": "candidate",
        "seq": 100,
        "body": frame.body,
    }
    assert frames.build(AGGREGATOR, meta=candidate.meta(), **about) == unhex("candidate", "frame")
    vector = Block.read(SCHEMA, candidate.codec, candidate.encoding, frame.body).apply(VECTOR)
    assert vector_digest(vector) == candidate.digest
    told = frames.parse(unhex("candidate", "metrics_frame"))
    told.check_authentic(DEVICE.public)
    metrics = Metrics.from_meta(told.meta)
    assert (metrics.version, metrics.candidate) == (candidate.version, candidate.digest)
    assert {**metrics.meta(), "candidate": metrics.candidate.hex()} == VECTORS["candidate"]["metrics_meta"]
    about = {"federation": "lab", "sender": "pi-01", "kind": "metrics", "seq": 10, "body": b""}
    assert frames.build(DEVICE, meta=metrics.meta(), **about) == unhex("candidate", "metrics_frame")


@pytest.mark.parametrize("what", VECTORS["malformed_metrics"])
def test_malformed_metrics_are_refused(what: str) -> None:
    frame = frames.parse(unhex("malformed_metrics", what))
    frame.check_authentic(DEVICE.public)
    with pytest.raises(ProtocolError) as error:
        Metrics.from_meta(frame.meta)
    assert error.value.reason == "bad-meta"


def test_a_sealed_box_opens() -> None:
    plain = unhex("sealed", "plain")
    assert plain == bytes(DEVICE.key_id) + (7).to_bytes(8, "little") + CONTENT
    assert AGGREGATOR.unseal(unhex("sealed", "example")) == plain
    assert AGGREGATOR.unseal(seal(AGGREGATOR.public, plain)) == plain


@pytest.mark.parametrize("what", VECTORS["malformed_zstd"])
def test_malformed_zstd_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError) as error:
        decode(unhex("malformed_zstd", what), "zstd", len(CONTENT))
    assert error.value.reason == "bad-zstd"


REASONS = {
    "trit byte above 242": "bad-trits",
    "one byte short": "bad-length",
    "one byte long": "bad-length",
    "scale is NaN": "bad-scale",
    "scale is negative": "bad-scale",
    "scale is infinite": "bad-scale",
    "scale above 65504": "bad-scale",
    "dense element of -1e6": "bad-element",
    "fill digit not zero": "bad-trits",
    "dense element is NaN": "bad-element",
}


@pytest.mark.parametrize("what", VECTORS["malformed_blocks"])
def test_malformed_blocks_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError) as error:
        Block.read(SCHEMA, "ternary", "raw", unhex("malformed_blocks", what))
    assert error.value.reason == REASONS[what]


@pytest.mark.parametrize("what", VECTORS["malformed_vectors"])
def test_malformed_vectors_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError) as error:
        vector_of(unhex("malformed_vectors", what), SCHEMA)
    assert error.value.reason == "bad-vector"


@pytest.mark.parametrize("what", VECTORS["malformed_frames"])
def test_malformed_frames_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError) as error:
        Update.from_meta(frames.parse(unhex("malformed_frames", what)).meta)
    assert error.value.reason == ("bad-meta" if what == "base 2^62 + 1" else "bad-header")


def test_a_page_of_revocations_has_the_bytes_of_the_vectors() -> None:
    keys = {(each["device"], bytes.fromhex(each["public_key"])) for each in VECTORS["revocations"]["keys"]}
    assert list(revocations.pages(keys)) == [unhex("revocations", "body")]
    assert revocations.read(unhex("revocations", "body")) == keys


@pytest.mark.parametrize("what", VECTORS["malformed_revocations"])
def test_malformed_pages_of_revocations_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError) as error:
        revocations.read(unhex("malformed_revocations", what))
    assert error.value.reason == "bad-revocations"


def _statistics(name: str, request: StatisticsRequest) -> Measured:
    found = VECTORS["statistics"][f"{name}values"]
    fields: dict[str, Any] = {
        each: np.array(value) if each in NUMBERS else tuple(value) if isinstance(value, list) else value
        for each, value in found.items()
    }
    made = Measured(**fields)
    assert made.pack() == unhex("statistics", f"{name}content")
    read = Measured.read(unhex("statistics", f"{name}content"), request)
    assert {each: getattr(read, each).tolist() for each in NUMBERS} == {each: found[each] for each in NUMBERS}
    return read


@pytest.mark.parametrize("name", ["", "noisy_"])
def test_requests_for_statistics_and_answers_byte_for_byte(name: str) -> None:
    meta = VECTORS["statistics"][f"{name}request"]
    request = StatisticsRequest.from_meta(meta)
    assert request.meta() == meta
    assert _statistics(name, request).features


def test_a_head_asks_for_statistics_and_a_device_answers_in_a_sealed_box() -> None:
    entry, head = VECTORS["statistics"], frames.parse(unhex("head", "frame"))
    asked = {**head.meta, "statistics": entry["request"]}
    built = frames.build(AGGREGATOR, federation="lab", sender="aggregator", kind="head", seq=100, meta=asked)
    assert built.hex() == entry["head"]
    assert Head.from_meta(frames.parse(built).meta) == Head.from_meta(head.meta)
    answer = frames.parse(unhex("statistics", "example"))
    answer.check_authentic(DEVICE.public)
    assert StatisticsAnswer.from_meta(answer.meta) == StatisticsAnswer(request=100)
    plain = AGGREGATOR.unseal(answer.body)
    assert plain == unhex("statistics", "plain")
    assert plain == bytes(DEVICE.key_id) + (10).to_bytes(8, "little") + unhex("statistics", "content")
    refusal = Measured.read(bytes.fromhex(entry["refusal"]["content"]), StatisticsRequest.from_meta(entry["request"]))
    assert refusal.refusal == entry["refusal"]["text"]


@pytest.mark.parametrize("what", VECTORS["malformed_statistics"])
def test_malformed_statistics_are_refused(what: str) -> None:
    request = StatisticsRequest.from_meta(VECTORS["statistics"]["request"])
    with pytest.raises(ProtocolError) as error:
        Measured.read(unhex("malformed_statistics", what), request)
    assert error.value.reason in {"bad-answer", "bad-meta"}


@pytest.mark.parametrize("what", VECTORS["malformed_requests"])
def test_malformed_requests_for_statistics_are_refused_and_their_heads_are_not(what: str) -> None:
    head = frames.parse(unhex("malformed_requests", what))
    head.check_authentic(AGGREGATOR.public)
    assert Head.from_meta(head.meta).version == 42
    with pytest.raises(ProtocolError):
        StatisticsRequest.from_meta(head.meta["statistics"])


def test_a_device_s_key_and_the_base_choose_its_arm() -> None:
    entry = VECTORS["arms"]
    arms = Arms.from_plan(entry["plan"])
    assert arms is not None
    assert arms.meta() == {name: entry["plan"][name] for name in ("arms", "arm_weights")}
    for row in entry["drawn"]:
        h = int.from_bytes(
            blake2b(
                b"ternbus/1 arm\0" + bytes.fromhex(entry["public"]) + row["base"].to_bytes(8, "little"), digest_size=32
            ).digest()[:8],
            "little",
        )
        assert str(h) == row["number"]
        assert arms.drawn(row["device"], DEVICE.public, row["base"]) == row["arm"]
    assert {row["arm"] for row in entry["drawn"]} == {0, 1, 2}


def test_a_head_with_arms_and_an_update_by_one_byte_for_byte() -> None:
    entry = VECTORS["arms"]
    head = frames.parse(unhex("arms", "head"))
    head.check_authentic(AGGREGATOR.public)
    assert Head.from_meta(head.meta).plan == entry["plan"]
    update = Update.from_meta(entry["update_meta"])
    built = frames.build(
        DEVICE, federation="lab", sender="pi-01", kind="update", seq=8, meta=update.meta(), body=CONTENT
    )
    assert built == unhex("arms", "update")
    assert Update.from_meta(frames.parse(built).meta) == update
    arms = Arms.from_plan(entry["plan"])
    assert arms is not None
    assert update.arm == arms.drawn("pi-01", DEVICE.public, update.base)


@pytest.mark.parametrize("what", VECTORS["malformed_arms"])
def test_malformed_arms_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError, match="bad-plan"):
        Arms.from_plan(VECTORS["malformed_arms"][what])


def test_every_entry_is_used() -> None:
    """A vector added to the file must be added here."""
    others = "enroll sealed malformed_zstd malformed_blocks malformed_vectors malformed_frames revocations"
    others += " malformed_revocations metrics malformed_metrics candidate delta checksums malformed_deltas"
    others += " head_with_frame_bytes malformed_heads"
    others += " statistics malformed_statistics malformed_requests arms malformed_arms"
    others += " private malformed_private"  # test_private_vectors.py
    used = "about keys schema vector ternary_block float32_block tiny_numbers update message_in_3_parts head receipt"
    assert set(VECTORS) == {*used.split(), *others.split()}
    assert content_bytes(SCHEMA, "ternary") == len(CONTENT)
