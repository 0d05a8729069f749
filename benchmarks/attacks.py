"""What attacks cost honest devices: their updates a second and the wait for a receipt, with and without each attack.

    python -m benchmarks.attacks [--json] [--seconds 5] [--engines mosquitto nats]

Honest devices send updates at a fixed rate, far below what the aggregator carries. Beside them one attacker sends what
it may: a stranger frames with headers of 15,900 empty maps, 300 a second; a stranger bodies of 60 KB at QoS 0, as fast
as the broker takes them; a member updates of a few KB that decode to 68 MB and are then refused, 100 a second, and
the same ones on a version that is not yet, which their header refuses, 90 a second. Broker, aggregator, senders and
attacker share the machine.
"""

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np

from benchmarks import mqtt
from benchmarks.ingest import FEDERATION, percentile, prepare, prepared_body, shapes
from benchmarks.program import one_thread, options, print_result, resident_mb
from benchmarks.sender import Line, Load, Target, await_retained, device, identity, run_load
from ternbus.aggregator.store import status as statuses
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import MAGIC, build
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import FLOAT32, ZSTD, encode
from ternbus.broker.server.running import Engine, choose, start

SMALL, LARGE = 100_000, 17_000_000  # parameters
FRAME_BYTES: Final = 1 << 20  # near what a broker of ours takes
MAPS: Final = 15_900
BODY_BYTES: Final = 60_000
PUBACK: Final = 4
STRANGER: Final = "eve"
PATIENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Attack:
    """Payloads without end, on one device's topic; ``per_s`` 0 is as fast as the broker takes them."""

    name: str
    parameters: int
    honest_per_s: float
    per_s: float = 0.0
    qos: int = 1
    base: int = 0  # of a member's updates


ATTACKS: Final[Mapping[str, Attack]] = {
    attack.name: attack
    for attack in (
        Attack("none", SMALL, 50.0),
        Attack("headers", SMALL, 50.0, per_s=300.0),
        Attack("qos-0", SMALL, 50.0, qos=0),
        Attack("none, large model", LARGE, 2.0),
        Attack("bombs", LARGE, 2.0, per_s=100.0),
        Attack("bombs, base ahead", LARGE, 2.0, per_s=90.0, base=1_000_000),
    )
}


def costly(body_bytes: int) -> bytes:
    """A frame that nobody signed, whose header is slow to read."""
    about = {"kind": "update", "federation": FEDERATION, "sender": STRANGER, "key": bytes(8), "seq": 1, "part": [0, 1]}
    header = msgpack.packb({**about, "digest": bytes(32), "meta": {"later": [{}] * MAPS}})
    return b"".join((MAGIC, len(header).to_bytes(4, "little"), header, bytes(64 + body_bytes)))


def bombs(number: int, parameters: int, base: int) -> Iterator[bytes]:
    """Updates of member ``number``, each under a number of its own: all zeros, and at the end no number at all."""
    change = np.zeros(Schema.of(shapes(parameters)).elements, dtype=np.float32)
    change[-1] = np.nan
    body = encode(change.tobytes(), ZSTD)
    meta = Update(base=base, samples=1, codec=FLOAT32, encoding=ZSTD, sealed=False).meta()
    about: dict[str, Any] = {"federation": FEDERATION, "sender": device(number), "kind": Update.KIND}
    seq = 0
    while True:
        seq += 1
        yield build(identity(number), seq=seq, meta=meta, body=body, **about)


def payloads(attack: Attack, member: int) -> tuple[str, Iterator[bytes]]:
    """(whose topic, what is sent there)"""
    if attack.name.startswith("bombs"):
        return device(member), bombs(member, attack.parameters, attack.base)
    frame = costly(BODY_BYTES if attack.qos == 0 else 0)
    return STRANGER, iter(lambda: frame, None)


def assail(about: Target, attack: Attack, member: int, ready: Any, over: Any) -> None:
    """The attacker's process: sends until it is over."""
    name, frames = payloads(attack, member)
    line = Line(about, "attacker")
    line.socket.setblocking(True)
    topic = mqtt.text(topics.up(about.federation, name, Update.KIND))
    first = next(frames)
    ready.set()
    begun, sent, unanswered = time.monotonic(), 0, 0
    while not over.is_set():
        mid = (sent % 60_000 + 1).to_bytes(2, "big") if attack.qos else b""
        line.socket.sendall(mqtt.packet(0x30 | attack.qos << 1, topic + mid + first))
        sent, unanswered, first = sent + 1, unanswered + attack.qos, next(frames)
        while unanswered > 200:
            unanswered -= sum(kind >> 4 == PUBACK for kind, _ in line.packets())
        if attack.per_s:
            time.sleep(max(0.0, begun + sent / attack.per_s - time.monotonic()))  # the pace of the attack
    line.socket.close()


def under(attack: Attack, about: Target, member: int, work: Callable[[], Any]) -> Any:
    """Do some work while the attack goes on."""
    if attack.name.startswith("none"):
        return work()
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    process = context.Process(target=assail, args=(about, attack, member, ready, over))
    process.start()
    try:
        ready.wait()
        return work()
    finally:
        over.set()
        process.join(10)
        process.kill()  # it may wait for a broker that takes no more


def measure(attack: Attack, engine: Engine, seconds: float, folder: Path) -> dict[str, Any]:
    """Honest receipts a second, the wait for one, and what the aggregator came to hold."""
    updates = max(10, int(attack.honest_per_s * seconds))
    load = Load(
        parameters=attack.parameters,
        updates=updates,
        window=updates,
        frame_bytes=FRAME_BYTES,
        per_s=attack.honest_per_s,
        patience_s=PATIENCE_S,
    )
    directory = folder / "aggregator"
    with start(choose(engine), host="127.0.0.1", port=0, directory=folder / "broker") as broker:
        about = Target(broker.endpoint.host, broker.endpoint.port, FEDERATION, *prepared_body(attack.parameters))
        prepare(directory, broker.url, replace(load, updates=updates + 1))  # the last of them is the attacker
        command = [sys.executable, "-m", "ternbus", "aggregator", "run", str(directory)]
        process = subprocess.Popen(command, stderr=(folder / "aggregator.log").open("ab"))
        try:
            await_retained(about, topics.status(FEDERATION))
            answered = under(attack, about, updates, lambda: run_load(about, load))
            peak = resident_mb(process.pid)
        finally:
            process.kill()  # what it has not come to, it would not come to for long
            process.wait()
    times = sorted(each for one in answered for each in one.times)
    outcomes: dict[str, int] = {}
    for one in answered:
        for outcome, count in one.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    return {
        "attack": attack.name,
        "engine": str(engine.value),
        **asdict(load),
        "answered": len(times),
        "outcomes": outcomes,
        "per_s": (len(times) - 1) / (times[-1][1] - times[0][0]) if len(times) > 1 else 0.0,
        "p50_ms": percentile(answered, 0.5) if times else None,
        "p99_ms": percentile(answered, 0.99) if times else None,
        "peak_mb": peak,
        "refused": statuses.read(directory)["counts"]["invalid"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    headings = f"{'attack':<18} {'engine':<10} {'sent':>6} {'answered':>9} {'receipts/s':>11}"
    lines = [f"{headings} {'p50, ms':>9} {'p99, ms':>9} {'peak MB':>8}"]
    for row in rows:
        waits = "".join(f" {'-' if row[key] is None else format(row[key], '.0f'):>9}" for key in ("p50_ms", "p99_ms"))
        lines.append(
            f"{row['attack']:<18} {row['engine']:<10} {row['updates']:>6} {row['answered']:>9} {row['per_s']:>11.1f}"
            f"{waits} {row['peak_mb']:>8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure each attack on each engine, and print."""
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--engines", type=Engine, nargs="+", default=[Engine.MOSQUITTO, Engine.NATS])
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    arguments = parser.parse_args()
    one_thread()
    rows = []
    for engine in arguments.engines:
        for name in arguments.attacks:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(ATTACKS[name], engine, arguments.seconds, Path(folder)))
    print_result(rows, as_json=arguments.json, show=lambda: print(table(rows)))


if __name__ == "__main__":
    main()
