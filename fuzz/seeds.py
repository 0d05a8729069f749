"""The initial corpus: inputs from ``tests/vectors.json``, generated files, and earlier findings.

``python -m fuzz.seeds`` writes the first two to ``fuzz/corpus``. Findings are copied there by hand as ``found-NAME``
after their correction. ``tests/test_fuzz.py`` tests the whole corpus, with or without a fuzzer.
"""

import json
import struct
from pathlib import Path
from typing import Any, Final

import msgpack

from fuzz import encrypted, peer, private
from fuzz.targets import KINDS, TARGETS
from ternbus.aggregator import settings
from ternbus.broker.protocol.frame import SIGNATURE_BYTES, parse
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Enroll, Grant, Metrics, Offer, Status
from ternbus.broker.protocol.model_messages import Snapshot
from ternbus.broker.protocol.statistics import StatisticsAnswer
from ternbus.broker.protocol.ternary import RAW, encode
from ternbus.broker.sums import bfv
from ternbus.broker.sums.words import BITS

ROOT: Final = Path(__file__).resolve().parent.parent
CORPUS: Final = Path(__file__).resolve().parent / "corpus"

Seeds = dict[str, bytes]


def seeds() -> dict[str, Seeds]:
    """The seeds by target and name."""
    vectors = json.loads((ROOT / "tests" / "vectors.json").read_text(encoding="utf-8"))
    whole = ("update", "head", "head_with_frame_bytes", "receipt", "enroll", "delta", "candidate")
    frames = {name: bytes.fromhex(vectors[name]["frame"]) for name in whole}
    frames |= {f"part-{i}": bytes.fromhex(frame) for i, frame in enumerate(vectors["message_in_3_parts"]["frames"])}
    schema = bytes.fromhex(vectors["schema"]["bytes"])
    vector = bytes.fromhex(vectors["vector"]["float32"])
    kinds = ("metrics", "requests", "deltas", "heads")
    in_meta = {name: bad for kind in kinds for name, bad in vectors[f"malformed_{kind}"].items()}
    malformed = vectors["malformed_frames"] | in_meta
    refused = {_slug("bad", name): bytes.fromhex(bad) for name, bad in malformed.items()}
    only_meta_shows = {_slug("bad", name) for name in ("base 2^62 + 1", *in_meta)}
    metrics = {name: bytes.fromhex(vectors["metrics"][name]) for name in ("frame", "plain_frame")}
    metrics["of_a_candidate"] = bytes.fromhex(vectors["candidate"]["metrics_frame"])
    return {
        "frame": frames | {name: bad for name, bad in refused.items() if name not in only_meta_shows},
        "header": _headers(frames)
        | {_slug("metrics", name): parse(frame).header for name, frame in metrics.items()}
        | {"head-statistics": parse(bytes.fromhex(vectors["statistics"]["head"])).header}
        | {"delta-plain": parse(bytes.fromhex(vectors["delta"]["plain_frame"])).header}
        | _arms(vectors["arms"], vectors["malformed_arms"])
        | {name: bad[8 : 8 + int.from_bytes(bad[4:8], "little")] for name, bad in refused.items()},
        "block": _blocks(vectors),
        "schema": {"vectors": schema, "one": msgpack.packb([["w", [3], "dense"]])},
        "snapshot": _snapshots(schema, vector),
        "invitation": {name: each.encode() for name, each in _invitations().items()},
        "aggregator-toml": _aggregator(),
        "scenario-toml": {
            "example": (ROOT / "lab" / "ternbus" / "lab" / "example.toml").read_bytes(),
            "full": SCENARIO.encode(),
        },
        "task-plan": {
            "empty": b"[]\n{}",
            "digits": b'["flavour"]\n{"local_epochs": 6, "batch_size": 16, "momentum": 0.9, "codec": "ternary"}',
            "schedule": b'[]\n{"schedule": "cosine", "schedule_versions": 9, "local_steps": null, "seal": true}',
            "bad-schedule": b'[]\n{"schedule": "cosine"}',
            "bad-name": b'[""]\n{}',
            "bad-key": b'["a"]\n{"a": 1}',
        },
        "broker-log": {"mosquitto": b"\xfe" + MOSQUITTO.encode(), "nats": b"\xff" + NATS.encode()},
        "update": _peer(frames),
        "revocations": {
            "vectors": bytes.fromhex(vectors["revocations"]["body"]),
            **{_slug("bad", name): bytes.fromhex(bad) for name, bad in vectors["malformed_revocations"].items()},
        },
        "statistics": _statistics(vectors),
        **_private(vectors["private"], vectors["malformed_private"]),
        **({"ciphertext": _ciphertext()} if "ciphertext" in TARGETS else {}),
    }


def _private(vectors: Any, malformed: Any) -> dict[str, Seeds]:
    """The seeds of private sums; what another target shows of a malformed input, its own may accept."""
    bad = {what: {_slug("bad", name): row for name, row in rows.items()} for what, rows in malformed.items()}
    contents = {
        what: {name: bytes.fromhex(row) for name, row in rows.items() if name != "bad-about"}
        for what, rows in bad.items()
    }
    updates = {row["device"]: bytes.fromhex(row["frame"]) for row in vectors["updates"]}
    steps = {name: bytes.fromhex(vectors["ask"][name]) for name in ("prepare", "open", "abandon")}
    answers = {name: bytes.fromhex(frame) for name, frame in vectors["answer"].items()}
    metas = [updates | contents["updates"], steps, answers | contents["answers"]]
    shapes = {
        row["bits"]: bytes([BITS.index(row["bits"]), 35, row["dense"], row["tensors"]]) for row in vectors["words"]
    }
    plains = [bytes.fromhex(row["box_plain"]) for row in vectors["updates"]]
    boxes = [(plain[-private.BOUND_BYTES - 32 : -32], plain) for plain in plains]
    unsigned = ("bad-another-key-s-signature", "bad-one-byte-short")
    return {
        "card": {"vectors": bytes.fromhex(vectors["card"]["content"])}
        | {name: each[:-SIGNATURE_BYTES] for name, each in contents["cards"].items() if name not in unsigned},
        "terms": {"vectors": bytes.fromhex(vectors["terms"]["content"]), **contents["terms"]},
        "ask": {"vectors": bytes.fromhex(vectors["ask"]["body"]), **contents["asks"]},
        "private-meta": {
            name: bytes([choice]) + parse(frame).meta_bytes
            for choice, named in enumerate(metas)
            for name, frame in named.items()
        },
        "plan-bytes": {
            "private": parse(bytes.fromhex(vectors["head"]["frame"])).meta_bytes,
            "an-integer-as-key": msgpack.packb({"plan": {"own": {1: [2.5, b"plan"]}}, "state": "open"}),
            "nan": msgpack.packb({"plan": {"learning_rate": float("nan")}}),
            "bad-no-map": msgpack.packb({"plan": 3}),
            "bad-no-plan": msgpack.packb({"state": "open"}),
        },
        "helper": _helper(steps, bytes.fromhex(vectors["ask"]["body"])),
        "words": {f"{row['bits']}-bits": shapes[row["bits"]] + bytes.fromhex(row["words"]) for row in vectors["words"]}
        | {name: shapes[6] + each for name, each in contents["words"].items()},
        "box": {row["device"]: bound + plain for row, (bound, plain) in zip(vectors["updates"], boxes, strict=True)}
        | {"bad-copied": boxes[0][0] + boxes[1][1], "bad-long": boxes[0][0] + boxes[0][1] + b"\0"},
    }


def _statistics(vectors: Any) -> Seeds:
    """Answers, in the format of the target: [request] content."""
    entry = vectors["statistics"]
    good = {"plain": b"\0" + bytes.fromhex(entry["content"]), "noisy": b"\1" + bytes.fromhex(entry["noisy_content"])}
    good["refusal"] = b"\2" + bytes.fromhex(entry["refusal"]["content"])
    bad = vectors["malformed_statistics"]
    return good | {_slug("bad", name): b"\0" + bytes.fromhex(content) for name, content in bad.items()}


def _ciphertext() -> Seeds:
    """Edits of valid bytes, in the format of the target."""
    return {
        "update": b"\0",
        "key": b"\1",
        "answer": b"\2",
        "bad-length-of-ciphertext": b"\0" + encrypted.EDIT.pack(1, 255),
        "bad-ciphertext": b"\0" + b"".join(encrypted.EDIT.pack(place, 170) for place in range(900, 920)),
        "bad-filling": b"\0" + encrypted.EDIT.pack(bfv.CIPHERTEXT_BYTES - 1, 1),
        "bad-key": b"\1" + b"".join(encrypted.EDIT.pack(place, 170) for place in range(20, 40)),
        "bad-slot": b"\2" + encrypted.EDIT.pack(3, 1),
    }


def _helper(steps: Seeds, body: bytes) -> Seeds:
    """Inputs in the format of the target: [kind, length of meta] meta, body."""
    metas = {name: parse(frame).meta_bytes.replace(b"\xa5count\x01", b"\xa5count\x00") for name, frame in steps.items()}
    status = msgpack.packb(Status(state="online", session=1).meta())
    return {
        **{name: _to_helper("ask", meta, b"" if name == "abandon" else body) for name, meta in metas.items()},
        "status": _to_helper("status", status, b""),
    }


def _to_helper(kind: str, meta: bytes, body: bytes) -> bytes:
    return bytes([private.HELPER_KINDS.index(kind)]) + struct.pack("<H", len(meta)) + meta + body


def _headers(frames: Seeds) -> Seeds:
    """The headers of the frames in vectors.json, and one of each other kind."""
    headers = {name: parse(frame).header for name, frame in frames.items()}
    about = msgpack.unpackb(headers["receipt"])
    for message in (
        Grant(device="pi-01", device_key=about["key"], seq=7, parts=((0, 2), (5, 9)), deadline_s=30.0),
        Metrics(version=3, samples=100, split="test", values={"accuracy": 0.5}),
        Offer(base=3, parts=9),
        Snapshot(version=3, digest=bytes(32), schema_bytes=80, content_bytes=200, encoding="zstd"),
        StatisticsAnswer(request=100),
        Status(state="training", session=2, base=3, software="ternbus", failing="missing data: /srv/data"),
    ):
        headers[message.KIND] = msgpack.packb({**about, "kind": message.KIND, "meta": message.meta()})
    assert {msgpack.unpackb(header)["kind"] for header in headers.values()} == set(KINDS)
    return headers


def _blocks(vectors: Any) -> Seeds:
    ternary, floats = (bytes.fromhex(vectors[name]["content"]) for name in ("ternary_block", "float32_block"))
    blocks = {"ternary": b"\0" + ternary, "float32": b"\1" + floats, "ternary-zstd": b"\2" + encode(ternary)}
    blocks["float32-zstd"] = b"\3" + encode(floats)
    blocks |= {_slug("bad", name): b"\0" + bytes.fromhex(bad) for name, bad in vectors["malformed_blocks"].items()}
    return blocks | {_slug("bad", name): b"\2" + bytes.fromhex(bad) for name, bad in vectors["malformed_zstd"].items()}


def _snapshots(schema: bytes, vector: bytes) -> Seeds:
    length = struct.pack("<H", len(schema))
    beyond = struct.pack("<f", -3e38) + vector[4:]
    raw = {"raw": vector, "beyond": beyond}
    found = {name: length + b"\0" + schema + each for name, each in raw.items()}
    return found | {"zstd": length + b"\1" + encode(schema + vector)}


def _invitations() -> dict[str, str]:
    invitation = Invitation(
        federation="lab", device="pi-01", broker="mqtt://127.0.0.1:1883", aggregator_key="0a" * 32, code="c" * 32
    )
    pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    secured = Invitation(
        federation="lab",
        device="pi-01",
        broker="mqtts://[::1]:8883",
        aggregator_key="0A" * 32,
        code="ü",
        ca=pem,
        certificate=pem,
        key=pem,
        role="helper",
    )
    return {"plain": invitation.dumps(), "tls": secured.dumps()}


def _arms(vectors: Any, malformed: Any) -> Seeds:
    """Headers of an update by an arm, and of heads with arms."""
    head = parse(bytes.fromhex(vectors["head"])).header
    about = msgpack.unpackb(head)
    bad = {
        _slug("bad-arms", name): msgpack.packb({**about, "meta": {**about["meta"], "plan": plan}})
        for name, plan in malformed.items()
    }
    return {"head-arms": head, "update-arm": parse(bytes.fromhex(vectors["update"])).header, **bad}


def _aggregator() -> Seeds:
    table = {"federation": "lab", "broker": "mqtt://127.0.0.1:1883"}
    plan = {"local_epochs": 0.5, "codec": "ternary", "seal": True, "seed": 7, "own": ["a", 1, 2.5, False], "ü": "\x7f"}
    chosen: dict[str, Any] = {**table, "plan": plan, "optimizer": {"name": "fedavgm"}, "downlink": {"codec": "float32"}}
    check = {"task_keys": ["own", "ü"], "allowed_keys": [], "default_plan": {"momentum": 0.5}}
    search = {"arms": [{"learning_rate": 0.1}, {"local_steps": 3}], "method": "fedex", "classes": ["pi-"]}
    named = {"default": table, "chosen": chosen, "checked": {**chosen, "plan_check": check}}
    named["search"] = {**table, "search": search}
    return {name: settings.dumps(settings.from_table(each)).encode() for name, each in named.items()}


def _peer(frames: Seeds) -> Seeds:
    """Inputs in the format of ``fuzz.peer``: [kind, part, flags, length of meta] meta, body."""
    update = parse(frames["update"])
    meta = {**update.meta, "base": 0}
    metas = {
        "status": Status(state="idle", session=1).meta(),
        "offer": Offer(base=0, parts=3).meta(),
        "metrics": Metrics(
            version=0, samples=9, split="local", values={"loss": 0.5}, better={"loss": "lower"}, classes={"a": 4}
        ).meta(),
        "statistics": StatisticsAnswer(request=100).meta(),
        "enroll": Enroll(public_key=peer.KEY.public).meta(),
    }
    judged = Metrics(version=1, samples=9, split="local", values={"loss": 0.5}, candidate=bytes(32)).meta()
    found = {kind: _input(kind, about, b"") for kind, about in metas.items()}
    found["candidate"] = _input("metrics", judged, b"")
    body = update.body
    found["update"] = _input("update", meta, body)
    found["update-zstd"] = _input("update", {**meta, "encoding": "zstd"}, encode(body))
    found["update-float32"] = _input("update", {**meta, "codec": "float32", "encoding": RAW}, bytes(60))
    found["update-sealed"] = _input("update", {**meta, "sealed": True}, body)
    found["part-0"] = _input("update", meta, bytes(1024), part=0x20)
    found["part-1"] = _input("update", meta, body, part=0x21, flags=1)
    return found


def _input(kind: str, meta: Any, body: bytes, *, part: int = 0x10, flags: int = 0) -> bytes:
    packed: bytes = msgpack.packb(meta)
    return bytes([peer.KINDS.index(kind), part, flags]) + struct.pack("<H", len(packed)) + packed + body


def _slug(prefix: str, name: str) -> str:
    return "-".join((prefix, *"".join(each if each.isalnum() else " " for each in name).split()))


SCENARIO: Final = """\
task = "digits-numpy"
devices = 4
partition = "iid"
sync = true
[speeds]
sigma = 0
median_s = 1
[plan]
local_steps = 3
[broker]
engine = "nats"
[end]
versions = 9
seconds = 10.5
accuracy = 0.9
metric = { name = "mae", at_most = 0.3 }
[aggregator.merge]
buffer_size = 2
[[fault]]
kill = "device:3"
after_version = 5
restart_after_s = 2.5
[[fault]]
kill = "broker"
after_version = 8
[simulate]
jitter = 0.1
up_mbit_s = 1
"""


MOSQUITTO: Final = """\
OpenSSL Error[0]: error:0A0000C7:SSL routines::peer did not return a certificate
Received SUBSCRIBE from pi-2
\tternbus/1/lab/down/pi-1/# (QoS 1)
pi-2 1 $share/g/ternbus/1/lab/down/+/#
Denied PUBLISH from pi-2 (d0, q1, r1, m3, 'ternbus/1/lab/up/pi-1/update', ... (1 bytes))
"""

NATS: Final = """\
[7] 2026/11/20 14:06:14.449466 [ERR] 127.0.0.1:55865 - mid:25 - TLS handshake error: tls: client offered only unsupported versions: [303]
[7] 2026/11/20 14:06:17.302451 [WRN] Auth callout service returned an error: wrong-client-id: the certificate of "pi-2" calls itself 'pi-1'
[7] 2026/11/20 14:06:19.436519 [ERR] 127.0.0.1:48429 - mid:40 - "pi-2" - Subscription Violation - Subject ">", SID >
[7] 2026/11/20 14:06:20.837250 [ERR] 127.0.0.1:48429 - mid:40 - "pi-2" - Publish Violation - Subject "ternbus.1.lab.up.pi-1.update"
"""  # noqa: E501 - unchanged log lines


def main() -> None:
    """Write the generated seeds; findings stay unchanged."""
    for target, made in seeds().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in made.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
