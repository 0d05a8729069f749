"""The words of the figures about the whole path of an update."""

import statistics
from typing import Any

from benchmarks.words import table_of


def whole_path(rows: Any) -> str:
    """A table of all cases, and what the engines and ways of merging are beside each other."""
    head = (
        "parameters", "frames", "broker", "merge", "updates/s", "a device's CPU", "bare parts", "the aggregator's CPU",
        "bare parts", "the broker's CPU", "bytes that the broker reads", "durable writes: device", "aggregator",
    )  # fmt: skip
    body = []
    for row in rows:
        cpu, bare, writes = row["cpu_ms"], row["bare_ms"], row["durable_writes"] or {}
        times = [f"{cpu['device']:.1f} ms", f"{bare['device']:.1f}", f"{cpu['aggregator']:.1f} ms"]
        times += [f"{bare['aggregator']:.1f}", f"{cpu['broker']:.1f} ms"]
        durable = [f"{writes[role]:.1f}" if role in writes else "-" for role in ("device", "aggregator")]
        about = [*_size(row), row["engine"], _merge(row), f"{row['updates_per_s']:.1f}"]
        body.append([*about, *times, f"{row['broker_bytes']['in']:,.0f}", *durable])
    first = rows[0]
    return (
        f"{first['devices']} devices, each a process of its own, whose task trains nothing: they follow, compress, "
        "store, sign, send and wait for receipts. Devices, broker and aggregator share the machine. With a "
        f"barrier a version takes an update of each device, asynchronously of {first['devices'] // 2}. CPU is that of "
        "whole processes for an accepted update; beside it are the parts that cannot be left out, each once and alone "
        "on an idle processor. Durable writes are calls of fsync and fdatasync for an update."
        f"\n\n{table_of(head, body)}\n\n{_beside(rows)}"
    )


def _merge(row: Any) -> str:
    return "barrier" if row["barrier"] else "asynchronous"


def _size(row: Any) -> tuple[str, str]:
    """Of the model and of frames, in words."""
    return f"{row['parameters']:,}", f"{row['frame_bytes'] // 1024} KiB"


def _beside(rows: Any) -> str:
    """By model: asynchronous merges beside the barrier, the brokers beside each other, and the start of a device."""
    first, second = dict.fromkeys(row["engine"] for row in rows)
    rates = {(_size(row), row["engine"], row["barrier"]): row["updates_per_s"] for row in rows}
    head = (
        "parameters", "frames", f"asynchronous / barrier, {first}", f"{second}", f"{second} / {first}, barrier",
        "a device's CPU from its start to its first update",
    )  # fmt: skip
    body = []
    for size in dict.fromkeys(map(_size, rows)):
        ratios = [rates[size, engine, False] / rates[size, engine, True] for engine in (first, second)]
        ratios.append(rates[size, second, True] / rates[size, first, True])
        start = statistics.median(row["start_cpu_s"] for row in rows if _size(row) == size)
        body.append([*size, *(f"{each:.2f}" for each in ratios), f"{start:.1f} s"])
    return f"Ratios of updates/s:\n\n{table_of(head, body)}"
