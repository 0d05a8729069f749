"""What an update and a version cost, by how updates are sent: plain ternary, float32, masked, and encrypted (bfv).

    python -m benchmarks.merge_costs [--json] [--parameters 1200000 99000] [--versions 20] [--engine auto]

A real aggregator with a real broker and disk makes each version of 7 updates, as many as a sum of 4 bits holds; a real
helper opens the sums. The devices are this process: it makes the updates of a version with the device's own code before
it sends the first, and waits for the next version. A version takes the time from the first byte sent to its head. Its
bytes are those of the updates, of what aggregator and helper ask and answer, and of what is published, once. Models
that are too large for encryption have no row of it.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from benchmarks import homes, mqtt
from benchmarks.ingest import FEDERATION
from benchmarks.private_sums import Federation, frames_of, plain_frames
from benchmarks.program import cpu_ms, cpu_s, one_thread, options, print_result
from benchmarks.sender import PUBLISH, Line, Target, device
from ternbus.aggregator.store import status as statuses
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.ternary import FLOAT32, RAW, ZSTD
from ternbus.broker.server.running import Engine, choose, start
from ternbus.broker.sums import bfv
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import BFV, MASK, Terms, context, digest_of
from ternbus.broker.sums.words import BITS
from ternbus.edge.learn import private_sum
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.sum_content import SumJob
from ternbus.edge.plan.plan import Plan

DEVICES: Final = 7  # in a version: as many as a sum of 4 bits holds
WITHIN_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to send updates; ``private`` are the aggregator's settings of private sums, None for plain updates."""

    name: str
    private: Mapping[str, object] | None = None
    codec: str = ""  # of plain updates; "" is ternary
    sums: str = MASK  # the kind of private sums

    @property
    def settings(self) -> dict[str, object]:
        own = {} if self.private is None else {"private.min": DEVICES, **self.private}
        return {"merge.buffer_size": DEVICES, "merge.max_wait_s": WITHIN_S, **own}


KINDS: Final = (  # a row each
    Kind(name="plain ternary"),
    Kind(name="plain float32", codec=FLOAT32),
    *(Kind(name=f"private, {bits} bits", private={"private.bits": bits}) for bits in BITS),
    Kind(name="private, 6 bits, bfv", private={"private.bits": 6}, sums=BFV),
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What devices need of a version: its head, and its terms if it has some."""

    head: Frame
    terms: bytes = b""

    @cached_property
    def message(self) -> Head:
        return Head.from_meta(self.head.meta)

    @property
    def job(self) -> SumJob:
        made = context(
            version=self.message.version, model=self.message.digest, plan=digest_of(plan_bytes(self.head.meta_bytes)),
            terms=digest_of(self.terms),
        )  # fmt: skip
        return SumJob(terms=Terms.parse(self.terms), context=made)


@dataclass(slots=True)
class Watch:
    """A connection that sends updates, and receives all that aggregator and helper publish for a version."""

    line: Line
    published: Published | None = None
    size_bytes: int = 0  # of the frames since the newest version, of updates too
    _terms: dict[bytes, bytes] = field(default_factory=dict)

    def subscribe(self) -> None:
        for below in ("all", "help"):
            self.line.subscribe(f"{topics.root(FEDERATION)}/{below}/#")

    def send(self, number: int, frames: list[bytes]) -> None:
        head = mqtt.text(topics.up(FEDERATION, device(number), Update.KIND)) + b"\x00\x01"
        for frame in frames:
            self.size_bytes += len(frame)
            self.line.socket.sendall(mqtt.packet(0x32, head + frame))

    def await_version(self, version: int, *, private: bool) -> Published:
        """Of this version or a newer one, with its terms if it is private."""
        until = time.monotonic() + WITHIN_S
        while (found := self._found(private)) is None or found.message.version < version:
            if time.monotonic() > until:
                raise TimeoutError(f"no version {version}")
            self._receive()
        return found

    def _found(self, private: bool) -> Published | None:
        if self.published is None or not private:
            return self.published
        terms = self._terms.get(bytes(self.published.message.plan.get("terms", b"")))
        return None if terms is None else Published(head=self.published.head, terms=terms)

    def _receive(self) -> None:
        answers = []
        for kind, body in self.line.packets():
            if kind >> 4 != PUBLISH:
                continue
            end = 2 + int.from_bytes(body[:2], "big")
            topic, qos = body[2:end].decode(), kind >> 1 & 3
            content = body[end + (2 if qos else 0) :]
            answers += [b"\x40\x02" + body[end : end + 2]] if qos else []
            self.size_bytes += len(content)
            if topic == topics.head(FEDERATION):
                self.published = Published(head=parse(content))
            elif topic == topics.terms(FEDERATION, 0):
                terms = parse(content).body
                self._terms[digest_of(terms)] = terms
        self.line.socket.sendall(b"".join(answers))


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of a measurement, which all send one change."""

    kind: Kind
    about: Federation
    aggregator: bytes  # its public key

    def frames(self, number: int, version: Published) -> list[bytes]:
        """One device's update of this version; its sequence number follows from the version."""
        base = version.message.version
        if self.kind.private is None:
            how = (RAW, FLOAT32) if self.kind.codec else (ZSTD, "")
            return plain_frames(self.about, *how, number=number, base=base)
        job = version.job
        content = private_sum.encode(
            self.about.schema, job.terms, Plan(), self.about.change, samples=1, random_source=RandomSource()
        )
        return frames_of(number, job, content, self.aggregator, seq=base + 1, base=base)


def measure(kind: Kind, parameters: int, versions: int, engine: Engine, folder: Path) -> dict[str, Any]:
    """The row of a kind: bytes and CPU of an update; bytes, CPU and time of a version."""
    private = kind.private is not None
    with start(choose(engine), host="127.0.0.1", port=0, directory=folder / "broker") as broker:
        made = homes.make(
            folder, broker.url, parameters=parameters, devices=DEVICES, settings=kind.settings, private=private,
            sums=kind.sums,
        )  # fmt: skip
        with made.running() as processes:
            address = Target(broker.endpoint.host, broker.endpoint.port, FEDERATION, "", b"")
            watch = Watch(line=Line(address, "devices"))
            watch.subscribe()
            devices = Devices(kind=kind, about=Federation(parameters), aggregator=made.aggregator_public)
            published = watch.await_version(0, private=private)
            own = cpu_ms(lambda: devices.frames(0, published))
            update_bytes = sum(map(len, devices.frames(0, published)))
            taken, sizes = [], []
            for number in range(versions + 1):
                if number == 1:  # the first is not counted
                    before = [cpu_s(process.pid) for process in processes]
                updates = [devices.frames(each, published) for each in range(DEVICES)]
                watch.size_bytes, began = 0, time.monotonic()
                for each, frames in enumerate(updates):
                    watch.send(each, frames)
                published = watch.await_version(published.message.version + 1, private=private)
                taken.append(time.monotonic() - began)
                sizes.append(watch.size_bytes)
            spent = [cpu_s(process.pid) - cpu for process, cpu in zip(processes, before, strict=True)]
    counts = statuses.read(made.aggregator)["counts"]
    assert counts["merged"] == (versions + 1) * DEVICES, counts
    return {
        "update": kind.name,
        "bytes": update_bytes,
        "device_ms": own,
        "merge_bytes": round(statistics.median(sizes[1:])),
        "aggregator_ms": 1000 * spent[0] / versions,
        "helper_ms": 1000 * spent[1] / versions if private else None,
        "versions_per_s": 1 / statistics.median(taken[1:]),
        "devices_max": published.job.terms.devices_max if private else None,
    }


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, Engine)
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_200_000, 99_000], help="sizes of the model")
    parser.add_argument("--versions", type=int, default=20, help="versions of each kind")
    given = parser.parse_args()
    one_thread()
    tables = []
    for parameters in given.parameters:
        about, rows = Federation(parameters), []
        for kind in KINDS:
            if kind.sums == BFV and about.schema.elements > bfv.ELEMENTS_MAX:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(kind, parameters, given.versions, given.engine, Path(folder)))
        tables.append({"parameters": about.schema.elements, "rows": rows})
    found = {"devices": DEVICES, "versions": given.versions, "tables": tables}
    print_result(found, as_json=given.json, show=lambda: show(tables))


def show(tables: Sequence[Mapping[str, Any]]) -> None:
    for table in tables:
        print(f"{table['parameters']:,} parameters", *table["rows"], sep="\n")


if __name__ == "__main__":
    main()
