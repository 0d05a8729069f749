"""Encrypted private sums (`bfv`) beside masked ones: bytes, and CPU of device, aggregator and helper.

    python -m benchmarks.encrypted_sums [--json] [--parameters 650 12800 1200000] [--devices 16]

One sum of the same updates, 6 bits a value, by either kind. Bytes are those of the bodies; headers, boxes and
signatures are the same for both. CPU is the median of one thread. Models above `bfv.ELEMENTS_MAX` are measured too,
though no federation of this kind takes them.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np

from benchmarks.ingest import shapes
from benchmarks.private_sums import BITS_HERE, DEVICES, Federation
from benchmarks.program import one_thread, options, print_result
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import bfv, masks
from ternbus.broker.sums.words import Layout, Words

PARAMETERS: Final = (650, 12_800, 1_200_000)
RUNS: Final = 5
CONTEXT, DEVICE, HELPER, SEED = (bytes([each]) * 32 for each in range(4))


def cpu_ms(do: Callable[[], Any]) -> tuple[float, Any]:
    """Median CPU milliseconds of this thread for a call, and what it returns."""
    spent, found = [], None
    for _ in range(RUNS):
        began = time.thread_time()
        found = do()
        spent.append(1000 * (time.thread_time() - began))
    return float(np.median(spent)), found


def masked_sum(layout: Layout, words: Words, devices: int) -> tuple[dict[str, Any], Words]:
    """The cost of a sum of masked updates, and what it opens to."""
    about = {"context": CONTEXT, "device": DEVICE}

    def add() -> Words:
        total = layout.zeros()
        for _ in range(devices):
            layout.add(total, layout.read(sent.tobytes()))
        return total

    def open_all() -> Words:
        total = layout.zeros()
        for _ in range(devices):
            layout.add(total, masks.mask(layout, SEED, helper=HELPER, **about))
        return total

    def unmask() -> Words:
        opened = total.copy()
        layout.subtract(opened, layout.read(answer.tobytes()))
        return opened

    sent: Words
    total: Words
    answer: Words
    device_ms, sent = cpu_ms(lambda: masks.masked(layout, words, [(HELPER, SEED)], **about))
    add_ms, total = cpu_ms(add)
    helper_ms, answer = cpu_ms(open_all)
    unmask_ms, opened = cpu_ms(unmask)
    found = {"update_bytes": sent.nbytes, "ask_bytes": 0, "answer_bytes": answer.nbytes, "key_bytes": 0}
    return {**found, "device_ms": device_ms, "aggregator_ms": add_ms + unmask_ms, "helper_ms": helper_ms}, opened


def encrypted_sum(layout: Layout, words: Words, devices: int) -> tuple[dict[str, Any], Words]:
    """The cost of a sum of encrypted updates, and what it opens to."""
    key = bfv.SecretKey.generate()

    def add() -> bytes:
        for _ in range(devices):
            bfv.check(key.public, layout, sent)
        return bfv.blinded_sum(key.public, layout, [sent] * devices, SEED)

    device_ms, sent = cpu_ms(lambda: bfv.encrypt(key.public, layout, words))
    add_ms, asked = cpu_ms(add)
    helper_ms, answer = cpu_ms(lambda: key.decrypt(bfv.Slots(layout), asked))
    unblind_ms, opened = cpu_ms(lambda: bfv.opened(layout, answer, SEED))
    found = {"update_bytes": len(sent), "ask_bytes": len(asked), "answer_bytes": len(answer)}
    found |= {"key_bytes": len(key.public)}
    return {**found, "device_ms": device_ms, "aggregator_ms": add_ms + unblind_ms, "helper_ms": helper_ms}, opened


def measure(parameters: int, devices: int) -> list[dict[str, Any]]:
    """Both kinds, which must open to the same integers."""
    about = Federation(parameters)
    schema = Schema.of(shapes(parameters))
    layout = Layout(
        bits=BITS_HERE, ternary=schema.ternary_elements, dense=schema.dense_elements, tensors=len(schema.tensors)
    )
    words = layout.read(about.encoded().words)
    rows, sums = [], []
    for kind, one in (("mask", masked_sum), ("bfv", encrypted_sum)):
        cost, opened = one(layout, words, devices)
        rows.append({"parameters": schema.elements, "kind": kind, **cost})
        sums.append(opened)
    assert np.array_equal(sums[0], sums[1])
    return rows


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=PARAMETERS, help="sizes of models")
    parser.add_argument("--devices", type=int, default=DEVICES, help="devices in the sum")
    given = parser.parse_args()
    one_thread()
    rows = [row for each in map(partial(measure, devices=given.devices), given.parameters) for row in each]
    found = {"bits": BITS_HERE, "sum": given.devices, "limit": bfv.ELEMENTS_MAX, "rows": rows}
    print_result(found, as_json=given.json, show=lambda: print("\n".join(map(str, rows))))


if __name__ == "__main__":
    main()
