"""A device after sections 4, 5 and 11 to 13 of docs/protocol.md, with one thread: the caller's."""

import contextlib
import random
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgpack
import numpy as np
from nacl.signing import SigningKey

from stranger import wire
from stranger.link import FILTERS_IN_PACKET, PATIENCE_S, Link
from stranger.store import Store
from stranger.wire import Floats, Frame, Meta, RefusedError, Schema

SOFTWARE = "stranger 1"
FILTERS_AT_ONCE = 40
MISSING_S = 30.0
FAILED_S = 60.0
RESEND_S = 60.0
RESEND_MOST_S = 3600.0
LATER_DELTAS = 64


class Device:
    """A device of a federation, driven by `pump` and the calls that use it."""

    def __init__(self, folder: Path, *, frame_bytes: int = wire.FRAME_LIMIT) -> None:
        """Start from what `join` or an earlier life left in the folder."""
        self.store = Store(folder)
        state = self.store.values
        self.folder = folder
        self.frame_bytes = frame_bytes
        self.name: str = state["device"]
        self.federation: str = state["federation"]
        self.root = f"ternbus/1/{self.federation}"
        self.aggregator: bytes = state["aggregator_key"]
        self.signing = SigningKey(state["seed"])
        self.key = wire.key_id(bytes(self.signing.verify_key))
        self.link = Link(state["broker"], self.name)
        self.head: Meta | None = None
        self.schema: Schema | None = None
        self.vector: Floats | None = None
        self.version = -1
        self.digest = b""
        self.history: list[tuple[int, bytes]] = []
        self.snapshots_taken = 0
        self.receipts: list[Meta] = []  # those that answered what was outstanding
        self.heard: list[Meta] = []  # all that the aggregator signed
        self.grants: list[Meta] = []
        self.refused: list[str] = []
        self.aggregator_status: Meta | None = None
        self.stopped = ""
        self.asked_in_all = 0
        self._aggregator_seen = (0, 0)
        self._assembly = wire.Assembly(LATER_DELTAS)
        self._deltas: dict[int, tuple[Meta, bytes]] = {}
        self._wanted: deque[str] = deque()
        self._asked: set[str] = set()
        self._asked_ever: set[str] = set()
        self._fetching: tuple[int, int] | None = None
        self._missing_at: float | None = None
        self._retry_at: float | None = None
        self._resend_at: float | None = None
        self._resend_after = RESEND_S
        self._sent = False
        self._load_model()

    @classmethod
    def join(cls, invitation: Path, folder: Path, **options: Any) -> Self:
        """Make a key and write it down, with the invitation and the counters."""
        told = tomllib.loads(invitation.read_text())
        folder.mkdir(parents=True)
        Store(folder).save(
            **{name: told[name] for name in ("federation", "device", "broker", "code")},
            aggregator_key=bytes.fromhex(told["aggregator_key"]),
            seed=bytes(SigningKey.generate()),
            session=0,
            seq=0,
            head=[0, 0],
            accepted_base=-1,
        )
        (folder / "device.msgpack").chmod(0o600)
        return cls(folder, **options)

    # --- connection -----------------------------------------------------------------------------------------------

    def frames(self, kind: str, meta: Mapping[str, Any], body: bytes = b"", seq: int | None = None) -> list[bytes]:
        """One message of this device as frames for this connection."""
        limit = self.frame_bytes
        if self.link.packet_limit is not None:
            limit = min(limit, self.link.packet_limit - 1024)
        return wire.make_frames(
            self.signing,
            kind=kind,
            federation=self.federation,
            sender=self.name,
            seq=self.store.next_seq() if seq is None else seq,
            meta=meta,
            body=body,
            limit=limit,
        )

    def up(self, kind: str) -> str:
        """Topic of one of this device's kinds."""
        return f"{self.root}/up/{self.name}/{kind}"

    def connect(self) -> None:
        """Steps 2 and 3: will, connection, subscriptions, status."""
        self.store.save(session=self.store.values["session"] + 1)
        self.link.connect((self.up("status"), self._status("offline")))
        self._wanted.clear()
        self._asked.clear()
        self._asked_ever.clear()
        self._fetching = None
        self._missing_at = None
        self._aggregator_seen = (0, 0)
        self.link.subscribe([f"{self.root}/all/status", f"{self.root}/all/head", f"{self.root}/down/{self.name}/#"])
        self.link.subscribe([f"{self.root}/all/delta/#"], retained=False)
        self.publish_status("idle")
        if self._outstanding("update") and self._sent:
            self._resend_at = time.monotonic()

    def _status(self, state: str, base: int = -1) -> bytes:
        meta = {"state": state, "session": self.store.values["session"], "base": base, "software": SOFTWARE}
        return self.frames("status", meta)[0]

    def publish_status(self, state: str, base: int = -1) -> None:
        """Tell what the device does."""
        self.link.publish(self.up("status"), self._status(state, base), retain=True)

    def leave(self) -> None:
        """Publish `offline` and disconnect."""
        if self.link.connected:
            self.publish_status("offline")
            with contextlib.suppress(TimeoutError):
                self.link.flush(5.0)
        self.link.disconnect()

    def pump(self, done: Callable[[], object], timeout: float = PATIENCE_S, what: str = "") -> None:
        """Serve the connection until something is so."""
        deadline = time.monotonic() + timeout
        while True:
            self._serve()
            if done():
                return
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.name}: {what or 'waiting'} at version {self.version}, head {self.head}, "
                    f"receipts {self.receipts[-3:]}, refused {self.refused[-3:]}, asked {sorted(self._asked)[:5]}"
                )

    def _serve(self) -> None:
        if not self.link.connected:
            self.connect()
        self.link.step()
        while self.link.inbox:
            topic, payload = self.link.inbox.popleft()
            if payload:
                self.receive(topic, payload)
        self._timers()

    def _timers(self) -> None:
        now = time.monotonic()
        if self._missing_at is not None and now >= self._missing_at:
            self._missing_at = None
            self._take_snapshot()
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._follow()
        if self._resend_at is None and self._sent and self._outstanding("update") and not self.link.unacked:
            self._resend_at = now + self._resend_after * random.uniform(0.8, 1.2)
            self._resend_after = min(2 * self._resend_after, RESEND_MOST_S)
        if self._resend_at is not None and now >= self._resend_at:
            self._resend_at = None
            if self._outstanding("enroll"):
                self._send_enroll()
            if self._outstanding("update"):
                self.send()

    # --- what arrives ---------------------------------------------------------------------------------------------

    def receive(self, topic: str, payload: bytes) -> None:
        """Check a frame in the order of section 8 and act on it; what fails is dropped and counted."""
        try:
            self._receive(topic, payload)
        except RefusedError as error:
            self.refused.append(f"{topic}: {error}")

    def _receive(self, topic: str, payload: bytes) -> None:
        if topic in self._asked:
            self._asked.discard(topic)
            self.link.unsubscribe(topic)
            self._ask(())
        if not topic.startswith(self.root + "/"):
            raise RefusedError(3, "topic of another federation")
        levels = topic[len(self.root) + 1 :].split("/")
        kind = levels[2] if levels[0] == "down" else levels[1]
        if kind not in wire.META:
            return
        frame = wire.check_frame(
            payload, federation=self.federation, kind=kind, sender="aggregator", public=self.aggregator
        )
        if kind == "head":
            self._on_head(frame)
        elif kind == "status":
            self._on_status(frame)
        elif kind == "receipt":
            self._on_receipt(frame.meta)
        elif kind == "grant":
            self._on_grant(frame.meta)
        elif kind == "delta":
            self._on_delta(frame, levels)
        elif kind == "snapshot":
            self._on_snapshot(frame, levels)

    def _on_head(self, frame: Frame) -> None:
        version, seq = self.store.values["head"]
        if frame.meta["version"] < version or frame.seq < seq:
            raise RefusedError(7, "an old head")
        was_open = self.head is not None and self.head["state"] == "open"
        self.head = frame.meta
        self.store.save(head=[frame.meta["version"], frame.seq])
        if frame.meta["state"] == "closed" and self._outstanding("update"):
            self.store.save(update=None)
        if frame.meta["state"] == "open" and not was_open and self._sent and self._outstanding("update"):
            self._resend_at = time.monotonic()
        self._follow()

    def _on_status(self, frame: Frame) -> None:
        session, seq = self._aggregator_seen
        offline = frame.meta["state"] == "offline"
        if frame.meta["session"] < session or (frame.meta["session"] == session and frame.seq < seq and not offline):
            return
        before = self.aggregator_status
        if before is not None and before["session"] == frame.meta["session"] and before["state"] == "offline":
            return
        self._aggregator_seen = (frame.meta["session"], frame.seq)
        self.aggregator_status = frame.meta
        turned = before is None or before["state"] == "offline" or before["session"] != frame.meta["session"]
        if turned and not offline and (self._outstanding("enroll") or (self._outstanding("update") and self._sent)):
            self._resend_at = time.monotonic()

    def _outstanding(self, what: str) -> Meta | None:
        found: Meta | None = self.store.values.get(what)
        return found

    # --- enrolment ------------------------------------------------------------------------------------------------

    def enrol(self, timeout: float = PATIENCE_S) -> Meta:
        """Step 4: make the key known, and wait for the answer."""
        if self._outstanding("enroll") is None:
            public = bytes(self.signing.verify_key)
            body = wire.enroll_body(self.store.values["code"], self.federation, self.name, public)
            seq = self.store.next_seq()
            frame = self.frames("enroll", {"public_key": public}, body, seq)[0]
            self.store.save(enroll={"seq": seq, "frame": frame})
        seen = len(self.receipts)
        self._send_enroll()
        self.pump(lambda: len(self.receipts) > seen, timeout, "enrol")
        if self.receipts[-1]["outcome"] == "enrolled":
            self.publish_status("idle")
        return self.receipts[-1]

    def _send_enroll(self) -> None:
        waiting = self._outstanding("enroll")
        if waiting is not None and not self._aggregator_offline():
            self.link.publish(self.up("enroll"), waiting["frame"])

    def _aggregator_offline(self) -> bool:
        return self.aggregator_status is not None and self.aggregator_status["state"] == "offline"

    # --- following ------------------------------------------------------------------------------------------------

    def follow(self, version: int | None = None, timeout: float = PATIENCE_S) -> None:
        """Wait until the vector is the head's, and the head at least this version."""
        self.pump(
            lambda: self.head is not None and self.version == self.head["version"] >= (version or 0),
            timeout,
            f"following to {version}",
        )

    def _ask(self, topics: Iterable[str]) -> None:
        for topic in topics:
            if topic not in self._asked_ever:
                self._asked_ever.add(topic)
                self._wanted.append(topic)
        while self._wanted and len(self._asked) < FILTERS_AT_ONCE:
            some: list[str] = []
            while self._wanted and len(some) < min(FILTERS_IN_PACKET, FILTERS_AT_ONCE - len(self._asked)):
                some.append(self._wanted.popleft())
            self._asked.update(some)
            self.asked_in_all += len(some)
            self.link.subscribe(some)

    def _stop_asking(self) -> None:
        for topic in self._asked:
            self.link.unsubscribe(topic)
        self._asked.clear()
        self._asked_ever.clear()
        self._wanted.clear()

    def _delta_topic(self, version: int, part: int) -> str:
        assert self.head is not None
        return f"{self.root}/all/delta/{version % self.head['slots']}/{part}"

    def _on_delta(self, frame: Frame, levels: Sequence[str]) -> None:
        version = frame.meta["version"]
        if self.head is not None and int(levels[2]) != version % self.head["slots"]:
            raise RefusedError(7, "a delta in another slot")
        if version <= self.version or version in self._deltas:
            return
        if self.head is not None and frame.parts > 1 and version <= self.head["version"]:
            self._ask(self._delta_topic(version, i) for i in range(frame.parts) if i != frame.part)
        body = self._assembly.add(frame)
        if body is None:
            return
        self._deltas[version] = (frame.meta, body)
        while len(self._deltas) > LATER_DELTAS:
            del self._deltas[min(self._deltas)]
        self._follow()

    def _follow(self) -> None:
        """Step 6: go from the vector that is there to the accepted head."""
        if self.head is None:
            return
        goal = self.head["version"]
        while self.vector is not None and self.version < goal and self.version + 1 in self._deltas:
            try:
                self._apply(*self._deltas.pop(self.version + 1))
            except RefusedError as error:
                self.refused.append(f"delta {self.version + 1}: {error}")
                self.vector = None
        if self.vector is not None and self.version == goal and self.digest != self.head["digest"]:
            self.refused.append("the head's digest")
            self.vector = None
        if self.vector is None or goal - self.version > self.head["slots"]:
            self._take_snapshot()
        elif self.version < goal:
            self._ask(self._delta_topic(v, 0) for v in range(self.version + 1, goal + 1) if v not in self._deltas)
            self._missing_at = self._missing_at or time.monotonic() + MISSING_S
        else:
            self._arrived()

    def _arrived(self) -> None:
        self._missing_at = self._retry_at = self._fetching = None
        self._stop_asking()
        self._deltas = {v: delta for v, delta in self._deltas.items() if v > self.version}
        self._save_model()

    def _apply(self, meta: Meta, body: bytes) -> None:
        assert self.schema is not None
        assert self.vector is not None
        content = wire.decode(body, meta["encoding"], self.schema.content_bytes(meta["codec"]))
        vector = wire.apply(self.vector, self.schema.change(meta["codec"], content))
        self._set(vector, meta["version"], meta["digest"])

    def _set(self, vector: Floats, version: int, digest: bytes) -> None:
        if wire.digest(vector.astype("<f4").tobytes()) != digest:
            raise RefusedError(7, "the digest differs")
        self.vector, self.version, self.digest = vector, version, digest
        self.history.append((version, digest))
        self._asked_ever = set(self._asked)
        if self._missing_at is not None:
            self._missing_at = time.monotonic() + MISSING_S

    def _take_snapshot(self) -> None:
        assert self.head is not None
        version, parts, _bytes, place = self.head["snapshot"]
        self.vector, self.version = None, -1
        if self._fetching == (version, place):
            return
        self._stop_asking()
        self._fetching = (version, place)
        self._retry_at = time.monotonic() + FAILED_S
        self._ask(f"{self.root}/all/snapshot/{place}/{part}" for part in range(parts))

    def _on_snapshot(self, frame: Frame, levels: Sequence[str]) -> None:
        if self.head is None or self._fetching is None or int(levels[3]) != frame.part:
            return
        body = self._assembly.add(frame)
        if body is None or frame.meta["version"] > self.head["version"]:
            return
        meta = frame.meta
        content = wire.decode(body, meta["encoding"], meta["bytes"])
        length = meta["schema_bytes"]
        if length > len(content) or wire.digest(content[:length]) != self.head["schema"]:
            raise RefusedError(7, "the schema is not the head's")
        schema = Schema.parse(content[:length])
        if len(content) != length + 4 * schema.elements:
            raise RefusedError(7, "length of the snapshot")
        vector = np.frombuffer(content[length:], "<f4").astype(np.float32)
        if not bool(np.all(np.isfinite(vector))):
            raise RefusedError(7, "a snapshot that is not finite")
        self.schema = schema
        self._set(vector, meta["version"], meta["digest"])
        self.snapshots_taken += 1
        self._fetching = None
        self._follow()

    def _save_model(self) -> None:
        assert self.schema is not None
        assert self.vector is not None
        packed = msgpack.packb([self.version, self.schema.raw, self.vector.astype("<f4").tobytes()])
        scratch = self.folder / "model.new"
        scratch.write_bytes(packed)
        scratch.replace(self.folder / "model.msgpack")

    def _load_model(self) -> None:
        path = self.folder / "model.msgpack"
        if path.exists():
            self.version, raw, vector = msgpack.unpackb(path.read_bytes())
            self.schema = Schema.parse(raw)
            self.vector = np.frombuffer(vector, "<f4").astype(np.float32)
            self.digest = wire.digest(vector)

    # --- updates --------------------------------------------------------------------------------------------------

    def prepare(
        self,
        content: bytes,
        *,
        codec: str = "ternary",
        encoding: str = "raw",
        sealed: bool = False,
        base: int | None = None,
        samples: int = 1,
        metrics: Mapping[str, float] | None = None,
    ) -> int:
        """Write an update down as the one that is outstanding; its seq."""
        if self._outstanding("update"):
            raise RuntimeError("there is an update outstanding")
        meta = {
            "base": self.version if base is None else base,
            "samples": samples,
            "codec": codec,
            "encoding": encoding,
            "sealed": sealed,
            "metrics": dict(metrics or {}),
        }
        return self._sign(meta, wire.encode(content, encoding), self.store.next_seq())

    def _sign(self, meta: Meta, encoded: bytes, seq: int) -> int:
        body = wire.seal(encoded, self.key, seq, self.aggregator) if meta["sealed"] else encoded
        frames = self.frames("update", meta, body, seq)
        self.store.save(update={"seq": seq, "meta": meta, "encoded": encoded, "frames": frames})
        self._sent = False
        self._resend_at = None
        self._resend_after = RESEND_S
        return seq

    def send(self, order: Sequence[int] | None = None) -> None:
        """Publish the outstanding update, or its offer where it has many parts; `order` names parts, also twice."""
        update = self._outstanding("update")
        if update is None:
            return
        self._sent = True
        self._resend_at = None
        if self._aggregator_offline() or self.head is None or self.head["state"] != "open":
            return
        frames = update["frames"]
        if len(frames) > self.head["direct_parts"]:
            meta = {"base": update["meta"]["base"], "parts": len(frames)}
            self.link.publish(self.up("offer"), self.frames("offer", meta, seq=update["seq"])[0])
            return
        for part in range(len(frames)) if order is None else order:
            self.link.publish(self.up("update"), frames[part])

    def wait(self, seq: int, timeout: float = PATIENCE_S) -> Meta:
        """Wait for the receipt that settles the outstanding update."""
        self.pump(lambda: self._answer(seq), timeout, f"receipt for seq {seq}")
        answer = self._answer(seq)
        assert answer is not None
        return answer

    def _answer(self, seq: int) -> Meta | None:
        found = [r for r in self.receipts if r["seq"] == seq and r["outcome"] != "busy"]
        return found[-1] if found else None

    def update(self, content: bytes, **options: Any) -> Meta:
        """Prepare, send, and wait for the receipt."""
        seq = self.prepare(content, **options)
        self.send()
        return self.wait(seq)

    def _on_grant(self, meta: Meta) -> None:
        self.grants.append(meta)
        update = self._outstanding("update")
        mine = (self.name, self.key, update["seq"]) if update else None
        if update is None or (meta["device"], meta["device_key"], meta["seq"]) != mine:
            return
        for first, last in meta["parts"]:
            for part in range(first, min(last, len(update["frames"]) - 1) + 1):
                self.link.publish(self.up("update"), update["frames"][part])
        self._resend_at = time.monotonic() + meta["deadline_s"]

    def _on_receipt(self, meta: Meta) -> None:
        self.heard.append(meta)
        update, enroll = self._outstanding("update"), self._outstanding("enroll")
        if (meta["device"], meta["device_key"]) != (self.name, self.key):
            return
        if enroll is not None and meta["seq"] == enroll["seq"] and meta["outcome"] in ("enrolled", "refused"):
            self.receipts.append(meta)
            self.store.save(enroll=None)
            if meta["outcome"] == "refused":
                self.stopped = meta["reason"] or "refused"
        elif update is not None and meta["seq"] == update["seq"]:
            self.receipts.append(meta)
            self._settle(meta, update)

    def _settle(self, meta: Meta, update: Meta) -> None:
        outcome = meta["outcome"]
        highest = meta.get("highest_seq", 0)
        if outcome == "busy":
            self._resend_at = time.monotonic() + meta["retry_after_s"]
        elif outcome == "duplicate" and highest > meta["seq"]:
            self._sign(update["meta"], update["encoded"], self.store.next_seq(above=highest))
            self.send()
        elif outcome == "accepted":
            self.store.save(update=None, accepted_base=update["meta"]["base"])
        elif outcome == "stale":
            self.store.save(update=None, residual=self._residual(update))
        elif outcome == "revoked":
            self.stopped = meta["reason"] or "revoked"
        else:
            self.store.save(update=None)
        if outcome not in ("busy", "duplicate"):
            self._resend_at = None

    def _residual(self, update: Meta) -> bytes:
        assert self.schema is not None
        codec = update["meta"]["codec"]
        content = wire.decode(update["encoded"], update["meta"]["encoding"], self.schema.content_bytes(codec))
        change = self.schema.change(codec, content)
        before = self.store.values.get("residual")
        if before:
            change = change + np.frombuffer(before, np.float32)
        return change.tobytes()

    @property
    def residual(self) -> Floats:
        """What stale updates have not carried yet."""
        assert self.schema is not None
        kept = self.store.values.get("residual")
        return np.frombuffer(kept, np.float32) if kept else np.zeros(self.schema.elements, np.float32)

    def publish_metrics(self, values: Mapping[str, float], samples: int, split: str = "test") -> None:
        """Publish an evaluation of the version that is held."""
        meta = {"version": self.version, "samples": samples, "split": split, "values": dict(values)}
        self.link.publish(self.up("metrics"), self.frames("metrics", meta)[0])
