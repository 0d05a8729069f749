"""README's figures, made from ``benchmarks/results``: what stands there is what a run has printed.

    python -m benchmarks.figures [--write]

Prints the section; with --write it takes its place in README.md, between its two markers.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.__main__ import RESULTS
from ternbus.lab.experiment.table import table

README: Final = Path(__file__).parent.parent / "README.md"
KEPT: Final = RESULTS / "experiments"
BEGIN: Final = "<!-- python -m benchmarks.figures --write -->"
END: Final = "<!-- end of the figures -->"
LARGE: Final = 1_000_000  # parameters: of the sizes measured, the one that README speaks of is the first above


def uplink(sizes: Any) -> str:
    raw, packed = (next(each for each in sizes["sizes"] if each["encoding"] == name) for name in ("raw", "zstd"))
    return (
        f"raw {raw['bits_per_parameter']:.2f} bits a parameter, with zstd {packed['bits_per_parameter']:.2f}, which is "
        f"{packed['bits_per_parameter'] / 32:.1%} of float32. {sizes['parameters']:,} parameters, a Gaussian change."
    )


def codec(rows: Any) -> str:
    row = _large(rows)
    encode, decode, add = (row[name] for name in ("encode_ms", "decode_ms", "add_ms"))
    compiled = row.get("decode_compiled_ms")
    faster = "" if compiled is None else f" With the compiled loop of `aggregator/native` that is {compiled:.2f} ms."
    return (
        f"{row['parameters']:,} parameters on one core: {encode:.1f} ms to clip, ternarize, pack and compress; "
        f"{decode:.2f} ms to decompress, check and add, where adding one float32 vector to another takes {add:.2f} ms."
        + faster
    )


def ingest(rows: Any) -> str:
    columns = (
        "parameters",
        "frames",
        "merged/s",
        "bare skeleton/s",
        "ratio",
        "half load: p50",
        "p99",
        "peak memory",
        "on disk",
    )
    how = " With the compiled loop of `aggregator/native`." if any(row.get("compiled") for row in rows) else ""
    lines = [
        f"updates merged a second, broker and senders on the same cores, each on disk before its receipt.{how}",
        "",
        _row(columns),
        _row(["---"] * len(columns)),
    ]
    for row in rows:
        full, half = row["full"], row["half"]
        frames = f"{row['frame_bytes'] // 1024} KiB"
        speeds = [f"{row['parameters']:,}", frames, f"{full['updates_per_s']:,.0f}", f"{row['skeleton_per_s']:,.0f}"]
        waits = [f"{row['ratio']:.2f}", f"{half['p50_ms']:.0f} ms", f"{half['p99_ms']:.0f} ms"]
        lines.append(_row([*speeds, *waits, f"{full['peak_mb']:.0f} MB", f"{full['ledger_mb']:.0f} MB"]))
    return "\n".join(lines)


def fleet(row: Any) -> str:
    quiet, join = row["fan_out_quiet"], row["join"]
    p99 = statistics.median(each["p99_ms"] for each in quiet) / 1000
    largest = max(row["bytes_per_device"].values())
    return (
        f"{row['devices']:,} devices, connected at once: at most {largest:,.0f} B of the aggregator's memory for each; "
        f"a new version reaches 99 % of them within {p99:.1f} s; all enrol at once in {join['seconds']:.0f} s, and "
        f"{join['resent']:,} frames are sent twice."
    )


def edge(rows: Any) -> str:
    row = rows[-1]
    device, bare = row["device"], row["alone"]
    own, written = 1000 * device["own_cpu_s"], device["written_bytes"] / 1000
    return (
        f"{row['task']}, {bare['samples']:,.0f} samples: Ternbus' own work takes {own:.0f} ms of CPU an update, "
        f"{row['share']:.1%} of the training, {row['above_mb']:.0f} MB beside the trainer, and writes "
        f"{written:,.0f} kB to disk. "
        f"Training itself took {row['training_ratio']:.2f} times the CPU that it takes in a process alone. "
        f"The first one begins {row['later_s']:+.1f} s after when it does there."
    )


def time_to_accuracy(found: Any) -> str:
    ratios = found["compared"]
    if ratios is None:
        return "one of the runs never came so far."
    return (
        f"fashion-mnist, 20 devices of very unequal speed (sigma 1.0), lines of 1/4 Mbit/s, virtual time, "
        f"seeds: {len(found['seeds'])}; asynchronous and ternary reaches {found['accuracy']:.0%} "
        f"{ratios['sooner']:.0f} times sooner than a float32 barrier, with {ratios['up']:.1%} of its bytes up and "
        f"{ratios['both']:.1%} both ways."
    )


def fashion(rows: Any) -> str:
    columns = "both ways", "mean of the last 20 versions", "standard error", "of seeds", "bits up", "down", "MB in all"
    lines = [
        "fashion-mnist, 20 devices, Dirichlet 0.5, speeds lognormal 0.7, 60 versions of 5 updates, in virtual time:",
        "",
        _row(columns),
        _row(["---"] * len(columns)),
    ]
    for name, found in rows.items():
        accuracies = [100 * row["mean_of_last"] for row in found]
        up, down, size = (statistics.mean(row[key] for row in found) for key in ("bits_up", "bits_down", "megabytes"))
        seeds = ", ".join(f"{each:.1f}" for each in accuracies)
        mean, error = f"{statistics.mean(accuracies):.2f} %", f"{_error(accuracies):.2f}"
        lines.append(_row([name, mean, error, seeds, f"{up:.2f}", f"{down:.2f}", f"{size:.0f}"]))
    apart = [100 * (one["mean_of_last"] - two["mean_of_last"]) for one, two in zip(*rows.values(), strict=True)]
    mean, error = f"{statistics.mean(apart):+.2f}", f"{_error(apart):.2f}"
    return "\n".join([*lines, "", f"Ternary minus float32, seed by seed: {mean} points, standard error {error}."])


SECTIONS: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "uplink": ("Bytes of an update", uplink),
    "fashion": ("What ternary costs in accuracy", fashion),
    "time_to_accuracy": ("Time to an accuracy", time_to_accuracy),
    "codec": ("Encode and decode", codec),
    "ingest": ("An aggregator", ingest),
    "fleet": ("A fleet", fleet),
    "edge": ("A device", edge),
}


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _error(values: list[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def _large(rows: Any) -> Any:
    return next(row for row in rows if row["parameters"] > LARGE)


def section() -> str:
    """Everything between the markers."""
    parts, machines = [], []
    for name, (title, words) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            raise SystemExit(f"{path} is missing; run: python -m benchmarks {name} --data DIR")
        kept = json.loads(path.read_text(encoding="utf-8"))
        machines.append(kept["machine"])
        parts.append(f"**{title}** (`{kept['command']}`): {words(kept['result'])}")
    about = machines[0]
    machine = f"{about['cores']} cores ({about['processor']}, shared), {about['memory_gib']} GiB, {about['system']}"
    head = (
        f"Measured on {machine}, Python {about['python']}; times there scatter, so look at the ratios. The JSON of "
        "each run is in `benchmarks/results`, and `make bench DATA=DIR` makes it anew."
    )
    return "\n\n".join([head, *parts, *experiments()])


def experiments() -> list[str]:
    """Of those whose results are kept: title, what it is, table."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))]
    return [
        f"**{kept['result']['title']}** (`{kept['command']}`, {kept['seconds'] / 60:.0f} minutes on a shared core): "
        f"{' '.join(kept['result']['about'].split())} {_of_seeds(kept['result']['seeds'])}\n\n"
        f"{table(kept['result'])}"
        for kept in found
    ]


def _of_seeds(count: int) -> str:
    return "One seed." if count == 1 else f"Means of {count} seeds, ± their standard deviation."


def main() -> None:
    """Print, or put into README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(section())
        return
    text = README.read_text(encoding="utf-8")
    before, marker, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (marker and end):
        sys.exit(f"README.md lacks {BEGIN!r} or {END!r}")
    README.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
