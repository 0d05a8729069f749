"""The fuzz targets: each parses arbitrary bytes as one kind of input.

A target may only raise ``ProtocolError`` or ``ConfigError``. Accepted input must also have certain properties: encoded
again it parses to an equal value, a vector is finite, a digest is correct.
"""

import json
import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from importlib.util import find_spec
from typing import Final

import numpy as np
import zstandard

from fuzz import encrypted, peer, private, statistics
from ternbus.aggregator import settings
from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.store.device_metrics import Report, sentences
from ternbus.aggregator.store.measurements import Measurements
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.arms import Arms
from ternbus.broker.protocol.frame import CONTAINERS_MAX, COUNTER_MAX, MAGIC, SIGNATURE_BYTES, Frame, build, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import OPEN, Enroll, Grant, Metrics, Offer, Receipt, Status, Update
from ternbus.broker.protocol.model_messages import Candidate, Delta, Head, Snapshot, SnapshotRef
from ternbus.broker.protocol.schema import Schema, is_bounded, to_tensors, vector_digest
from ternbus.broker.protocol.statistics import StatisticsAnswer
from ternbus.broker.protocol.task_plan import TaskPlan
from ternbus.broker.protocol.ternary import CODECS, RAW, VALUE_MAX, ZSTD, Block, content_bytes, decode, encode
from ternbus.broker.server import mosquitto, refusals
from ternbus.edge.core.follower import Follower
from ternbus.edge.plan.arm import with_arm
from ternbus.edge.plan.plan import Plan
from ternbus.lab.scenario import scenario

Target = Callable[[bytes], None]
Message = (
    Candidate
    | Delta
    | Enroll
    | Grant
    | Head
    | Metrics
    | Offer
    | Receipt
    | Snapshot
    | StatisticsAnswer
    | Status
    | Update
)

FEDERATION: Final = "lab"
DEVICE: Final = Identity(bytes(range(32)))  # the keys of tests/vectors.json
SERVER: Final = Identity(bytes(range(32, 64)))
KINDS: Final = {
    kind.KIND: kind
    for kind in (
        Candidate,
        Delta,
        Enroll,
        Grant,
        Head,
        Metrics,
        Offer,
        Receipt,
        Snapshot,
        StatisticsAnswer,
        Status,
        Update,
    )
}
SCHEMA: Final = peer.SCHEMA
START: Final = np.arange(SCHEMA.elements, dtype=np.float32)
SNAPSHOT_BYTES_MAX: Final = 2**20
ACCESS: Final = refusals.Access.parse(mosquitto.access_list(["lab"]))
EXPECTED: Final = (ProtocolError, ConfigError)


def frame(data: bytes) -> None:
    """A payload: envelope, header and signature."""
    found = parse(data)
    if found.parts == 1:
        assert data == b"".join(
            (MAGIC, len(found.header).to_bytes(4, "little"), found.header, found.signature, found.body)
        )
    found.check_authentic((SERVER if found.sender == AGGREGATOR else DEVICE).public)


def header(data: bytes) -> None:
    """A header, and the meta of its kind."""
    found = parse(MAGIC + len(data).to_bytes(4, "little") + data + bytes(SIGNATURE_BYTES))
    assert found.meta_bytes in data
    assert found.seq <= COUNTER_MAX
    assert containers(found.meta) < CONTAINERS_MAX
    check_topic(found)
    kind = KINDS.get(found.kind)
    if kind is not None:
        message: Message = kind.from_meta(found.meta)
        assert kind.from_meta(message.meta()) == message
        if isinstance(message, Metrics):
            check_metrics(message)
        if isinstance(message, Head):
            statistics.request(found.meta)
            check_arms(message.plan)


def check_arms(plan: Mapping[str, object]) -> None:
    """What a device makes of a plan with arms: none, or one that is drawn at all."""
    arms = Arms.from_plan(plan)
    if arms is None:
        return
    assert Arms.from_plan(arms.meta()) == arms
    for name in ("pi", "cam-2"):
        place, arm = arms.class_of(name), arms.drawn(name, DEVICE.public, COUNTER_MAX)
        assert (arm is None) == (place is None)
        assert place is None or arm is None or arms.weights[place][1][arm] > 0
        if arm is not None:
            with_arm(Plan(), arms.arms[arm], is_elastic=True)


def check_metrics(message: Metrics) -> None:
    """What a status makes of a device's metrics: JSON, and text that no peer can break a terminal with."""
    found = Measurements()
    values, better = message.values, message.better
    for device in ("one", "two"):
        found.add_local(Report(device=device, version=message.version, samples=1, values=values, better=better))
    found.add_test("judge", message.version, values)
    found.state("judge", better)
    common, version = found.common(), found.version(message.version)
    json.dumps([common, version, found.devices.device("one", found.better)], allow_nan=False)
    assert set(found.better) >= set(values)
    assert found.metric in {*values, None}
    assert "".join(f"{name}{text}" for name, text in sentences(common["local"])).isprintable()


def containers(value: object) -> int:
    """How many maps and arrays there are in it, itself included."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + sum(map(containers, children))


def check_topic(found: Frame) -> None:
    """Check that a frame is refused on a topic of another federation."""
    for topic in (topics.head("other"), topics.up("other", "pi", "update")):
        try:
            topics.check(found, topics.parse(topic))
        except ProtocolError:
            continue
        assert found.federation == "other"


def block(data: bytes) -> None:
    """A block for the schema of ``tests/vectors.json``; the first byte chooses codec and encoding."""
    choice = data[0] if data else 0
    codec, encoding = CODECS[choice & 1], (RAW, ZSTD)[choice >> 1 & 1]
    read = Block.read(SCHEMA, codec, encoding, data[1:])
    assert len(read.content) == content_bytes(SCHEMA, codec)
    assert Block.read(SCHEMA, codec, ZSTD, encode(read.content)) == read
    change = read.value()
    assert np.isfinite(change).all()
    assert np.abs(change).max() <= VALUE_MAX
    assert np.isfinite(read.apply(START)).all()


def schema(data: bytes) -> None:
    """An encoded schema."""
    read = Schema.parse(data)
    assert Schema.write(read.tensors).tensors == read.tensors
    assert [segment.tensor for segment in read.segments] == list(read.tensors)
    assert read.segments[-1].stop == read.elements
    for codec in CODECS:
        assert content_bytes(read, codec) > 0


def snapshot(data: bytes) -> None:
    """A correctly signed snapshot for the follower. Bytes: schema_bytes (2), encoding, body."""
    length, encoding, body = int.from_bytes(data[:2], "little"), (RAW, ZSTD)[len(data) > 2 and data[2] & 1], data[3:]
    size, content = _stated(encoding, body)
    follower = Follower(federation=FEDERATION)
    follower.reconnected(0.0)
    follower.head_accepted(
        Head(
            version=0,
            digest=blake2b(content[length:], digest_size=32).digest(),
            schema=blake2b(content[:length], digest_size=32).digest(),
            snapshot=SnapshotRef(version=0, parts=1, content_bytes=size, place=0),
            slots=4,
            max_staleness=0,
            direct_parts=4,
            state=OPEN,
            plan={},
        ),
        0.0,
    )
    announced = Snapshot(
        version=0,
        digest=blake2b(content[length:], digest_size=32).digest(),
        schema_bytes=length,
        content_bytes=size,
        encoding=encoding,
    )
    payload = build(
        SERVER, federation=FEDERATION, sender=AGGREGATOR, kind=Snapshot.KIND, seq=1, meta=announced.meta(), body=body
    )
    follower.part_arrived(topics.snapshot(FEDERATION, 0, 0), parse(payload), 0.0)
    if follower.vector is not None and follower.schema is not None:
        assert is_bounded(follower.vector)
        assert vector_digest(follower.vector) == announced.digest
        assert len(to_tensors(follower.schema, follower.vector)) == len(follower.schema.tensors)


def _stated(encoding: str, body: bytes) -> tuple[int, bytes]:
    """(length, content) as an aggregator would state them; the content is empty if it cannot be decoded."""
    if encoding == RAW:
        return len(body), body
    try:
        size = min(zstandard.get_frame_parameters(body).content_size, SNAPSHOT_BYTES_MAX)
        return size, decode(body, encoding, size)
    except (ProtocolError, zstandard.ZstdError):
        return 0, b""


def invitation(data: bytes) -> None:
    """The text of an invitation."""
    read = Invitation.loads(text_of(data))
    assert len(read.aggregator_public) == 32
    assert Invitation.loads(read.dumps()) == read


def aggregator_toml(data: bytes) -> None:
    """The text of aggregator.toml."""
    read = settings.parse(text_of(data))
    assert settings.parse(settings.dumps(read)) == read


def scenario_toml(data: bytes) -> None:
    """The text of a scenario."""
    read = scenario.loads(text_of(data), "the scenario")
    assert len(read.speeds.draw(1, read.seed)) == 1
    read.settings({})


def task_plan(data: bytes) -> None:
    """Of a model file's metadata, what says of its task's plan: a line with the keys, then the default plan."""
    keys, _, default = text_of(data).partition("\n")
    read = TaskPlan.from_metadata({"plan_keys": keys, "default_plan": default}, "the file")
    again = TaskPlan.from_metadata(read.metadata(), "the file")
    assert again.keys == read.keys
    assert again.default == {name: value for name, value in read.default.items() if value is not None}
    table = {"federation": FEDERATION, "broker": "mqtt://localhost"}
    made = settings.from_table(settings.with_overrides(table, PlanCheck.settings(read)))
    assert settings.parse(settings.dumps(made)) == made


def broker_log(data: bytes) -> None:
    """A broker's log, read in pieces; the first byte chooses the broker and the length of a piece."""
    choice = data[0] if data else 0
    dialect = list(refusals.DIALECTS.values())[choice & 1]
    lines, counts, size = refusals.Lines(), refusals.Counts(since=""), 1 + (choice >> 1)
    for start in range(1, len(data), size):
        for line in lines.feed(data[start : start + size]):
            assert len(line) <= refusals.LINE_BYTES
            if refusal := dialect.refusal(line.decode("utf-8", "replace"), ACCESS):
                counts.add(refusal, "")
    for row in counts.rows.values():
        assert row.reason in refusals.REASONS
        assert row.client == refusals.NO_NAME or re.fullmatch(refusals.NAME, row.client)
        assert len(row.detail) <= refusals.DETAIL_CHARS
        assert refusals.printable(row.detail) == row.detail
    assert json.loads(counts.dumps())["since"] == ""


def revoked(data: bytes) -> None:
    """The body of a page of revoked keys, which only the aggregator itself reads."""
    found = revocations.read(data)
    assert frozenset().union(*map(revocations.read, revocations.pages(found))) == found


def text_of(data: bytes) -> str:
    """The input as text; a real file that is not UTF-8 is refused before it is parsed."""
    return data.decode("utf-8", "replace")


TARGETS: Final[Mapping[str, Target]] = {
    "frame": frame,
    "header": header,
    "block": block,
    "schema": schema,
    "snapshot": snapshot,
    "invitation": invitation,
    "aggregator-toml": aggregator_toml,
    "scenario-toml": scenario_toml,
    "task-plan": task_plan,
    "broker-log": broker_log,
    "update": peer.update,
    "revocations": revoked,
    "statistics": statistics.answer,
    "card": private.card,
    "terms": private.terms,
    "ask": private.ask,
    "private-meta": private.private_meta,
    "plan-bytes": private.plan,
    "words": private.words,
    "box": private.box,
    "helper": private.helper,
    **({"ciphertext": encrypted.ciphertext} if find_spec("tenseal") else {}),
}


def ends_well(target: Target, data: bytes) -> bool:
    """Run a target; return whether the input was accepted. Unexpected exceptions are raised."""
    try:
        target(data)
    except EXPECTED:
        return False
    return True
