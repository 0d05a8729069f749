"""A device written from docs/protocol.md alone federates with the aggregator, on both brokers and over restarts."""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nacl.signing import SigningKey
from safetensors.numpy import load_file

from stranger import wire
from stranger.device import Device
from stranger.models import BIG, SMALL, assert_close, make_block, make_model
from stranger.servers import ENGINES, Aggregator, Broker, ternbus, until
from stranger.wire import RefusedError, Schema

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "vectors.json").read_text())
OURS = {"ternbus"}
PLAIN = {"merge.buffer_size": 1, "downlink.codec": "float32", "staleness.discount": "constant"}


# --- without any process --------------------------------------------------------------------------------------------


def test_the_stranger_imports_nothing_of_ternbus() -> None:
    files = [*(HERE / "stranger").glob("*.py"), HERE / "test_stranger.py", HERE / "test_hostile_messages.py"]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            assert not OURS & {name.split(".")[0] for name in names}, path


def _signing(who: str) -> SigningKey:
    return SigningKey(bytes.fromhex(VECTORS["keys"][who]["seed"]))


def _schema() -> Schema:
    return Schema.parse(bytes.fromhex(VECTORS["schema"]["bytes"]))


def _floats(text: str) -> wire.Floats:
    return np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)


@pytest.mark.parametrize("who", ["device", "aggregator"])
def test_known_keys(who: str) -> None:
    known = VECTORS["keys"][who]
    public = bytes(_signing(who).verify_key)
    assert public.hex() == known["public"]
    assert wire.key_id(public).hex() == known["key_id"]


@pytest.mark.parametrize(
    ("entry", "kind", "who"),
    [
        ("update", "update", "device"),
        ("enroll", "enroll", "device"),
        ("head", "head", "aggregator"),
        ("receipt", "receipt", "aggregator"),
        ("delta", "delta", "aggregator"),  # with a key that the stranger does not know
    ],
)
def test_known_frames(entry: str, kind: str, who: str) -> None:
    raw = bytes.fromhex(VECTORS[entry]["frame"])
    signing = _signing(who)
    sender = "pi-01" if who == "device" else "aggregator"
    frame = wire.check_frame(raw, federation="lab", kind=kind, sender=sender, public=bytes(signing.verify_key))
    again = wire.make_frames(
        signing, kind=kind, federation="lab", sender=sender, seq=frame.seq, meta=frame.meta, body=frame.body
    )
    assert again == [raw]
    with pytest.raises(RefusedError, match="step 6"):
        wire.check_frame(raw + b"\0", federation="lab", kind=kind, sender=sender, public=bytes(signing.verify_key))


def test_known_message_in_parts() -> None:
    known = VECTORS["message_in_3_parts"]
    signing = _signing("device")
    raws = [bytes.fromhex(text) for text in known["frames"]]
    frames = [wire.parse_frame(raw) for raw in raws]
    assembly = wire.Assembly()
    assert [assembly.add(frames[i]) for i in (2, 2, 0)] == [None] * 3
    body = assembly.add(frames[1])
    assert body is not None
    assert body.hex() == known["body"]
    overhead = len(raws[0]) - len(frames[0].body)
    meta, seq = frames[0].meta, frames[0].seq
    header = wire.pack_header(
        kind="update",
        federation="lab",
        sender="pi-01",
        key=frames[0].key,
        seq=seq,
        part=(65_534, 65_535),
        digest=bytes(32),
        meta=meta,
    )
    limit = 1024 + overhead + len(header) - len(frames[0].header)
    made = wire.make_frames(
        signing, kind="update", federation="lab", sender="pi-01", seq=seq, meta=meta, body=body, limit=limit
    )
    assert made == raws


def test_known_enrolment() -> None:
    known = VECTORS["enroll"]
    public = bytes.fromhex(VECTORS["keys"]["device"]["public"])
    assert wire.enroll_body(known["code"], "lab", "pi-01", public).hex() == known["body"]


def test_known_blocks() -> None:
    schema = _schema()
    vector = _floats(VECTORS["vector"]["float32"])
    assert wire.digest(vector.tobytes()).hex() == VECTORS["vector"]["digest"]
    assert wire.digest(schema.raw).hex() == VECTORS["schema"]["digest"]
    known = VECTORS["ternary_block"]
    content = bytes.fromhex(known["content"])
    assert schema.ternary_content(known["scales"], np.array(known["trits"], np.int8), known["dense"]) == content
    after = wire.apply(vector, schema.change("ternary", content)).tobytes()
    assert after.hex() == known["vector_after"]
    assert wire.digest(after).hex() == known["digest_after"]
    assert wire.decode(bytes.fromhex(known["zstd_example"]), "zstd", len(content)) == content
    assert wire.decode(wire.encode(content, "zstd"), "zstd", len(content)) == content
    tiny = VECTORS["tiny_numbers"]
    for start, codec, block in (
        (vector, "float32", VECTORS["float32_block"]),
        (_floats(tiny["vector"]), "ternary", tiny),
    ):
        change = schema.change(codec, bytes.fromhex(block["content"]))
        assert wire.apply(start, change).tobytes().hex() == block["vector_after"]


def test_known_box() -> None:
    known = VECTORS["sealed"]
    aggregator = _signing("aggregator")
    plain = bytes.fromhex(known["plain"])
    assert wire.unseal(bytes.fromhex(known["example"]), aggregator) == plain
    key = bytes.fromhex(VECTORS["keys"]["device"]["key_id"])
    box = wire.seal(plain[16:], key, 7, bytes(aggregator.verify_key))
    assert len(box) == len(plain) + 48
    assert wire.unseal(box, aggregator) == plain


@pytest.mark.parametrize("name", VECTORS["malformed_zstd"])
def test_malformed_zstd_is_refused(name: str) -> None:
    with pytest.raises(RefusedError):
        wire.decode(bytes.fromhex(VECTORS["malformed_zstd"][name]), "zstd", 19)


@pytest.mark.parametrize("name", VECTORS["malformed_blocks"])
def test_malformed_blocks_are_refused(name: str) -> None:
    with pytest.raises(RefusedError):
        _schema().change("ternary", bytes.fromhex(VECTORS["malformed_blocks"][name]))


# --- with a broker and an aggregator --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ENGINES)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(request.param, tmp_path_factory.mktemp("broker") / request.param) as running:
        yield running


class World:
    """A federation, its aggregator running, and devices that joined it."""

    def __init__(self, folder: Path, broker: Broker, federation: str, shapes: dict[str, Any], **more: object) -> None:
        self.folder = folder
        self.level = 5 if broker.engine == "mosquitto" else 4
        self.tensors = make_model(folder / "model.safetensors", shapes)
        self.aggregator = Aggregator(
            folder / "aggregator",
            federation=federation,
            broker=broker.url,
            model=folder / "model.safetensors",
            settings={**PLAIN, **{key.replace("__", "."): value for key, value in more.items()}},
        )
        self.federation = federation
        self.devices: list[Device] = []

    def join(self, *names: str, evaluate: bool = False, **options: Any) -> list[Device]:
        """Invite devices, or evaluators, and let them enrol and follow."""
        full = [f"{self.federation}-{name}" for name in names]
        invitations = self.aggregator.invite(evaluators=full) if evaluate else self.aggregator.invite(*full)
        joined = [Device.join(invitations[name], self.folder / name, **options) for name in full]
        for device in joined:
            device.connect()
            assert device.link.level == self.level
            assert device.enrol()["outcome"] == "enrolled"
            device.follow()
        self.devices += joined
        return joined

    def again(self, device: Device) -> Device:
        """The same device as a new process would be: from its folder."""
        fresh = Device(device.folder, frame_bytes=device.frame_bytes)
        self.devices.append(fresh)
        return fresh

    def close(self) -> None:
        """Take leave of all."""
        for device in self.devices:
            device.leave()


@pytest.fixture(scope="module")
def world(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(federation: str, shapes: dict[str, Any], **settings: object) -> World:
        made.append(World(tmp_path_factory.mktemp(federation), broker, federation, shapes, **settings))
        made[-1].aggregator.start()
        return made[-1]

    yield make
    for one in made:
        one.close()
        if one.aggregator.alive:
            assert one.aggregator.terminate() == 0


@pytest.fixture(scope="module")
def small(world: Callable[..., World]) -> World:
    return world("small", SMALL)


@pytest.fixture(scope="module")
def first(small: World) -> Device:
    """A device that enrolled and follows."""
    return small.join("first")[0]


def merged(device: Device, content: bytes, **options: Any) -> dict[str, Any]:
    """Send an update that becomes the next version: the old vector plus the block, but for roundings."""
    assert device.vector is not None
    assert device.schema is not None
    before, version = device.vector, device.version
    receipt = device.update(content, **options)
    assert (receipt["outcome"], receipt["reason"], receipt["retry_after_s"]) == ("accepted", "", 0)
    device.follow(version + 1)
    assert device.version == version + 1
    assert_close(device.vector, before, device.schema.change(options.get("codec", "ternary"), content))
    return receipt


def same_as_status(device: Device, aggregator: Aggregator) -> dict[str, Any]:
    """The follower and the aggregator hold the same bits; what the aggregator says."""
    status = aggregator.status()
    assert (status["version"], status["digest"]) == (device.version, device.digest.hex())
    known = {entry["version"]: entry["digest"] for entry in status["versions"]}
    for version, digest in device.history:
        assert known.get(version, digest.hex()) == digest.hex()
    return status


@pytest.mark.slow
def test_version_0_is_the_initial_model(small: World, first: Device) -> None:
    assert first.schema is not None
    assert first.vector is not None
    roles = {"one.weight": "ternary", "one.bias": "dense", "two.weight": "ternary"}
    assert {t.name: (t.shape, t.role) for t in first.schema.tensors} == {
        name: (SMALL[name], role) for name, role in roles.items()
    }
    for tensor in first.schema.tensors:
        expected = wire.flush(small.tensors[tensor.name].reshape(-1))
        assert first.vector[tensor.place].tobytes() == expected.tobytes()
    assert same_as_status(first, small.aggregator)["version"] == 0


@pytest.mark.slow
def test_updates_of_every_form_are_merged(small: World, first: Device, tmp_path: Path) -> None:
    assert first.schema is not None
    before = small.aggregator.status()
    forms = [(c, e, s) for c in ("ternary", "float32") for e in ("raw", "zstd") for s in (False, True)]
    for seed, (codec, encoding, sealed) in enumerate(forms):
        first.publish_status("training", first.version)
        content = make_block(first.schema, codec, seed)
        form: dict[str, Any] = {"codec": codec, "encoding": encoding, "sealed": sealed}
        merged(first, content, **form, samples=10 + seed, metrics={"loss": 0.5, "epochs": 2})
    assert not first.refused
    after = same_as_status(first, small.aggregator)
    assert after["version"] - before["version"] == len(forms)
    assert after["counts"]["merged"] - before["counts"]["merged"] == len(forms)
    assert after["counts"]["accepted"] - before["counts"]["accepted"] == len(forms)
    ternbus("aggregator", "export", small.aggregator.folder, tmp_path / "out.safetensors")
    exported = load_file(tmp_path / "out.safetensors")
    for tensor in first.schema.tensors:
        assert first.vector is not None
        assert exported[tensor.name].shape == tensor.shape
        assert exported[tensor.name].tobytes() == first.vector[tensor.place].tobytes()


@pytest.mark.slow
def test_an_update_sent_again_gets_the_same_answer(small: World, first: Device) -> None:
    assert first.schema is not None
    version = first.version
    content = make_block(first.schema, "ternary", 50)
    seq = first.prepare(content)
    frame = first.store.values["update"]["frames"][0]
    first.send(order=[0, 0, 0])
    first.wait(seq)

    def answers() -> list[dict[str, Any]]:
        return [heard for heard in first.heard if heard["seq"] == seq]

    first.pump(lambda: len(answers()) == 3)
    assert {a["outcome"] for a in answers()} == {"accepted"}
    first.follow(version + 1)
    first.link.publish(first.up("update"), frame)
    first.pump(lambda: len(answers()) == 4)
    assert answers()[3]["outcome"] == "accepted"
    assert first.update(content, base=version)["outcome"] == "duplicate"  # the same (device, base), a new seq
    assert first.receipts[-1].get("highest_seq", 0) <= first.receipts[-1]["seq"]
    assert same_as_status(first, small.aggregator)["version"] == version + 1


@pytest.mark.slow
def test_metrics_and_status_are_shown(small: World, first: Device) -> None:
    (judge,) = small.join("judge", evaluate=True)
    judge.publish_metrics({"loss": 0.25, "accuracy": 1}, samples=100)
    first.publish_metrics({"loss": 0.0, "accuracy": 0.5}, samples=100)  # of the test data, which is not for it
    first.publish_status("training", first.version)
    for device in (judge, first):
        device.link.flush()

    def shown() -> bool:
        status = small.aggregator.status()
        entry = next(v for v in status["versions"] if v["version"] == judge.version)
        refused = status["counts"]["invalid"].get("not-evaluator", 0)
        return bool(entry["evaluations"]) and status["devices"][first.name]["state"] == "training" and refused == 1

    until(shown, 60, "metrics in the status")
    entry = next(v for v in small.aggregator.status()["versions"] if v["version"] == judge.version)
    assert entry["evaluations"] == {judge.name: {"loss": 0.25, "accuracy": 1.0}}
    assert judge.schema is not None
    refused = judge.update(make_block(judge.schema, "ternary", 60), base=judge.version)
    assert (refused["outcome"], refused["reason"].partition(":")[0]) == ("invalid", "evaluator")
    first.link.drop()  # the last will says offline
    until(lambda: small.aggregator.status()["devices"][first.name]["state"] == "offline", 60, "the last will")
    first.connect()
    first.follow()


@pytest.mark.slow
def test_pause_holds_an_update_back(small: World, first: Device) -> None:
    assert first.schema is not None
    ternbus("aggregator", "pause", small.aggregator.folder)
    first.pump(lambda: first.head is not None and first.head["state"] == "paused")
    version = first.version
    seq = first.prepare(make_block(first.schema, "ternary", 60))
    first.send()
    assert not first.link.unacked
    ternbus("aggregator", "resume", small.aggregator.folder)
    assert first.wait(seq)["outcome"] == "accepted"
    first.follow(version + 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_the_aggregator_restarts(small: World, first: Device, how: str) -> None:
    assert first.schema is not None
    aggregator = small.aggregator
    merged(first, make_block(first.schema, "float32", 70), codec="float32")
    answered = first.frames("offer", {"base": first.version - 1, "parts": 1}, seq=first.receipts[-1]["seq"])[0]
    if how == "SIGTERM":
        assert aggregator.terminate() == 0
    else:
        aggregator.kill()
    first.pump(lambda: first.aggregator_status is not None and first.aggregator_status["state"] == "offline")
    content = make_block(first.schema, "ternary", 71)
    before, version = first.vector, first.version
    seq = first.prepare(content)
    first.send()
    assert not first.link.unacked  # nothing is sent while the aggregator is offline
    aggregator.start()
    assert first.wait(seq)["outcome"] == "accepted"
    first.follow(version + 1)
    assert before is not None
    assert first.vector is not None
    assert_close(first.vector, before, first.schema.change("ternary", content))
    same_as_status(first, aggregator)
    # what was answered before the restart is lower than what was answered after it
    heard = len(first.heard)
    first.link.publish(first.up("offer"), answered)
    first.pump(lambda: len(first.heard) > heard)
    assert (first.heard[-1]["outcome"], first.heard[-1]["highest_seq"]) == ("duplicate", seq)


@pytest.mark.slow
def test_parts_in_any_order_more_than_once_and_over_a_kill(world: Callable[..., World]) -> None:
    big = world("big", BIG)
    (device,) = big.join("parts", frame_bytes=16_384)
    assert device.schema is not None
    assert device.head is not None
    assert device.head["snapshot"][1] > 8  # asked for by name, in more than one SUBSCRIBE
    random = np.random.default_rng(80)
    for encoding, sealed in (("raw", False), ("zstd", False), ("raw", True)):
        before, version = device.vector, device.version
        content = make_block(device.schema, "ternary", 80 + version)
        seq = device.prepare(content, encoding=encoding, sealed=sealed)
        count = len(device.store.values["update"]["frames"])
        assert 3 < count <= device.head["direct_parts"]
        device.send(order=[*random.permutation(count)[1:], *random.permutation(count)])
        assert device.wait(seq)["outcome"] == "accepted"
        device.follow(version + 1)
        assert before is not None
        assert device.vector is not None
        assert_close(device.vector, before, device.schema.change("ternary", content))
    same_as_status(device, big.aggregator)
    # more parts than direct_parts: offer, grant, parts
    merged(device, make_block(device.schema, "float32", 90), codec="float32")
    assert device.grants
    # half of it, a kill, and the rest with all of it again when the aggregator is back
    version = device.version
    seq = device.prepare(make_block(device.schema, "ternary", 91))
    device.send(order=[1, 3])
    device.link.flush()
    big.aggregator.kill()
    device.pump(lambda: device.aggregator_status is not None and device.aggregator_status["state"] == "offline")
    big.aggregator.start()
    assert device.wait(seq)["outcome"] == "accepted"
    device.follow(version + 1)
    # one that joins late holds the same bits
    (late,) = big.join("late")
    assert late.snapshots_taken == 1
    late.follow(device.version)
    assert late.digest == device.digest
    merged(late, make_block(device.schema, "float32", 92), codec="float32")  # ten frames of 120 KiB
    device.follow(late.version)
    assert device.digest == late.digest
    assert same_as_status(late, big.aggregator)["counts"]["merged"] == 6
    assert not device.refused
    assert not late.refused


@pytest.mark.slow
def test_who_does_not_know_the_heads_frame_bytes_takes_larger_frames_and_sends_usual_ones(
    world: Callable[..., World],
) -> None:
    wide = world("wide", BIG, limits__frame_bytes=2**18)
    (device,) = wide.join("usual")
    assert device.schema is not None
    assert device.head is not None
    assert device.head["frame_bytes"] == 2**18
    merged(device, make_block(device.schema, "float32", 93), codec="float32")
    assert same_as_status(device, wide.aggregator)["counts"]["merged"] == 1
    assert not device.refused


@pytest.mark.slow
def test_what_is_accepted_survives_a_kill(world: Callable[..., World]) -> None:
    pairs = world("pairs", SMALL, merge__buffer_size=2)
    one, two = pairs.join("one", "two")
    assert one.schema is not None
    before = one.vector
    contents = [make_block(one.schema, "float32", seed) for seed in (100, 101)]
    assert one.update(contents[0], codec="float32", samples=1)["outcome"] == "accepted"
    pairs.aggregator.kill()
    pairs.aggregator.start()
    assert two.update(contents[1], codec="float32", samples=3)["outcome"] == "accepted"
    for device in (one, two):
        device.follow(1)
    status = pairs.aggregator.status()
    assert (status["version"], status["counts"]["merged"]) == (1, 2)  # in one merge: two devices were online
    assert one.digest == two.digest
    assert before is not None
    assert one.vector is not None
    changes = [one.schema.change("float32", content).astype(np.float64) for content in contents]
    total = (changes[0] + 3 * changes[1]) / 4
    np.testing.assert_allclose(one.vector, before + total, rtol=0, atol=1e-6)
    same_as_status(one, pairs.aggregator)


@pytest.mark.slow
def test_ternary_downlink_over_40_versions(world: Callable[..., World]) -> None:
    many = world("many", SMALL, downlink__codec="ternary", downlink__slots=4)
    worker, away = many.join("worker", "away")

    def work(versions: int) -> None:
        for _ in range(versions):
            assert worker.schema is not None
            codec = ("ternary", "float32")[worker.version % 2]
            version = worker.version  # the head may come before the receipt
            content = make_block(worker.schema, codec, 200 + version)
            assert worker.update(content, codec=codec)["outcome"] == "accepted"
            worker.follow(version + 1)

    work(5)
    away.follow(5)
    assert (away.snapshots_taken, away.digest) == (1, worker.digest)
    away.leave()
    work(4)
    away = many.again(away)  # as many versions away as there are slots
    away.connect()
    assert away.link.session_present
    away.follow(9)
    assert (away.snapshots_taken, away.digest) == (0, worker.digest)
    assert [version for version, _ in away.history] == [6, 7, 8, 9]
    away.link.drop()
    work(13)
    away.connect()  # further than the slots reach: by snapshot, whatever the queue of the session still brings
    assert away.link.session_present
    away.follow(22)
    assert away.digest == worker.digest
    work(20)
    away.follow(42)
    assert away.digest == worker.digest
    (late,) = many.join("late")
    assert (late.version, late.snapshots_taken, late.digest) == (42, 1, worker.digest)
    work(3)
    for follower in (late, away):
        follower.follow(45)
        assert follower.digest == worker.digest
        # a resumed session may still bring heads that were queued before the retained one
        assert all(reason.endswith("an old head") for reason in follower.refused)
    assert worker.snapshots_taken == 1
    assert [version for version, _ in worker.history] == list(range(46))
    known = dict(worker.history)
    assert all(known[version] == digest for follower in (late, away) for version, digest in follower.history)
    assert same_as_status(worker, many.aggregator)["counts"]["merged"] == 45
