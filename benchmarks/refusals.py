"""The cost of counting refusals with mosquitto: small messages with and without a log of each packet.

    python -m benchmarks.refusals [--json] [--messages 20000] [--runs 5]

One client with a certificate publishes with QoS 1, another receives and acknowledges: four packets and four log lines
for each message. "counted" is the configuration of `ternbus broker up` with TLS: mosquitto logs each packet to
`ternbus.broker.server.refusals`. "plain" logs errors, warnings and notices to a file. The two alternate; the figures
are medians.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

from benchmarks.mqtt import packet, text
from benchmarks.program import cpu_s, options, print_result
from ternbus.broker.link.tls import Tls
from ternbus.broker.server import mosquitto, refusals
from ternbus.broker.server.directory import BrokerDirectory
from ternbus.broker.server.running import ACCESS, Engine, choose, reserve

TOPIC: Final = "ternbus/1/lab/up/pi-1/update"
BYTES: Final = 100
WINDOW: Final = 20  # unacknowledged messages
CONNECTED: Final = b"\x20\x02\x00\x00"
WITHIN_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU time of mosquitto and of the counting process for each message, and messages per second."""

    broker_us: float
    counter_us: float
    per_s: float


def client_files(home: BrokerDirectory, folder: Path, name: str) -> Tls:
    issued = home.issue(name, "lab")
    files = {"ca": issued.authority, "certificate": issued.certificate, "key": issued.key}
    for file, content in files.items():
        (folder / f"{name}.{file}").write_text(content)
        (folder / f"{name}.{file}").chmod(0o600)
    return Tls(**{file: folder / f"{name}.{file}" for file in files})


def connect(tls: Tls, name: str, port: int) -> socket.socket:
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            plain = socket.create_connection(("127.0.0.1", port), timeout=WITHIN_S)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)  # mosquitto is starting
    line = tls.context().wrap_socket(plain, server_hostname="127.0.0.1")
    line.sendall(packet(0x10, text("MQTT") + b"\x04\x02\x00\x3c" + text(name)))
    if (answer := exactly(line, 4)) != CONNECTED:
        raise OSError(f"mosquitto does not accept {name}: it answered {answer!r}")
    return line


def exactly(line: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (more := line.recv(count - len(found))):
        found += more
    return found


def exchange(sender: socket.socket, receiver: socket.socket, count: int) -> None:
    """Send ``count`` messages, a window at a time, each acknowledged by mosquitto and by the receiver."""
    receiver.sendall(packet(0x82, b"\x00\x01" + text("ternbus/1/lab/up/#") + b"\x01"))
    exactly(receiver, 5)
    published = [
        packet(0x32, text(TOPIC) + number.to_bytes(2, "big") + bytes(BYTES)) for number in range(1, WINDOW + 1)
    ]
    window, size = b"".join(published), len(published[0])
    for _ in range(count // WINDOW):
        sender.sendall(window)
        arrived = exactly(receiver, len(window))
        numbers = [arrived[end - BYTES - 2 :][:2] for end in range(size, len(window) + 1, size)]
        receiver.sendall(b"".join(b"\x40\x02" + number for number in numbers))
        exactly(sender, 4 * WINDOW)


def measure(home: BrokerDirectory, folder: Path, clients: dict[str, Tls], *, counted: bool, count: int) -> Cost:
    """Measure one run with a new broker."""
    port = reserve("127.0.0.1", 0)
    configuration = mosquitto.configuration(
        host="127.0.0.1",
        port=port,
        data=folder,
        access=home.folder / ACCESS,
        tls=home.files,
        user="root" if os.geteuid() == 0 else None,
        counted=counted,
    )
    (folder / "mosquitto.conf").write_text(configuration.replace("persistence true", "persistence false"))
    with ExitStack() as stack:
        output: IO[bytes] = stack.enter_context((folder / "log").open("wb"))
        counter = None
        if counted:
            counting: list[str | Path] = [sys.executable, "-I", "-S", refusals.__file__, str(home.folder), "mosquitto"]
            counter = stack.enter_context(subprocess.Popen(counting, stdin=subprocess.PIPE))
            output = counter.stdin or output
        command: list[str | Path] = [choose(Engine.MOSQUITTO).executable, "-c", folder / "mosquitto.conf"]
        process = stack.enter_context(subprocess.Popen(command, stdout=output, stderr=output))
        output.close()
        stack.callback(process.terminate)
        lines = [stack.enter_context(connect(tls, name, port)) for name, tls in clients.items()]
        pids = [process.pid, counter.pid if counter is not None else os.getpid()]
        before, began = [cpu_s(pid) for pid in pids], time.monotonic()
        exchange(lines[0], lines[1], count)
        took_s = time.monotonic() - began
        spent = [1e6 * (cpu_s(pid) - earlier) / count for pid, earlier in zip(pids, before, strict=True)]
    return Cost(broker_us=spent[0], counter_us=spent[1] if counter is not None else 0.0, per_s=count / took_s)


def median(costs: list[Cost]) -> Cost:
    fields = {name: statistics.median(asdict(cost)[name] for cost in costs) for name in Cost.__dataclass_fields__}
    return Cost(**fields)


def show(rows: Mapping[str, Cost]) -> None:
    """Print a table."""
    print(f"mosquitto {choose(Engine.MOSQUITTO).version}, per message: µs of the broker, µs of the counter; messages/s")
    for label, cost in rows.items():
        print(f"{label:<10} {cost.broker_us:>8.1f} {cost.counter_us:>8.1f} {cost.per_s:>10.0f}")


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = options(__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="messages in each run")
    parser.add_argument("--runs", type=int, default=5, help="number of runs of each kind")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = BrokerDirectory.create(folder / "bus", names=["127.0.0.1"], port=0)
        clients = {each: client_files(home, folder, each) for each in ("pi-1", "aggregator-lab")}
        found: dict[bool, list[Cost]] = {False: [], True: []}
        for _ in range(given.runs):
            for counted, costs in found.items():
                costs.append(measure(home, folder, clients, counted=counted, count=given.messages))
    rows = {"plain": median(found[False]), "counted": median(found[True])}
    print_result({name: asdict(cost) for name, cost in rows.items()}, as_json=given.json, show=lambda: show(rows))


if __name__ == "__main__":
    main()
