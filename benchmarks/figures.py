"""The figures in README.md and docs/figures.md, made from the results kept in ``benchmarks/results``.

    python -m benchmarks.figures [--write]

Without --write, both sections are printed. With --write, each replaces the text between the markers in its file.
"""

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.__main__ import RESULTS
from benchmarks.path_figures import whole_path
from benchmarks.race import HEAD as RACE_HEAD
from benchmarks.race import LONGEST_S, best, best_of_each, never, sooner
from benchmarks.race import cells as race_cells
from benchmarks.slow_classes import CALIBRATED, NAMES, STAYS, final, until
from benchmarks.sum_figures import encrypted_sums, exact_sums, merge_costs, private_sums
from benchmarks.time_to_accuracy import WAYS
from benchmarks.words import percent, seeds_of, standard_error, table_of
from ternbus.lab.experiment.table import table as experiment_table

ROOT: Final = Path(__file__).parent.parent
KEPT: Final = RESULTS / "experiments"
BEGIN: Final = "<!-- python -m benchmarks.figures --write -->"
END: Final = "<!-- end of the figures -->"
VIRTUAL: Final = ("fashion", "time_to_accuracy", "race", "slow_classes")  # no figure of these is a time of the machine
LARGE: Final = 1_000_000  # parameters; README shows the first measured size above this


# --- docs/figures.md: a section for each benchmark


def uplink(sizes: Any) -> str:
    raw, packed = (_bits(sizes, encoding) for encoding in ("raw", "zstd"))
    return (
        f"An update of {sizes['parameters']:,} parameters, a Gaussian change: {raw:.2f} bits a parameter raw, "
        f"{packed:.2f} with zstd. That is {percent(packed / 32)} of float32."
    )


def codec(rows: Any) -> str:
    row = _large(rows)
    encode, decode, add = (row[name] for name in ("encode_ms", "decode_ms", "add_ms"))
    compiled = row.get("decode_compiled_ms")
    faster = "" if compiled is None else f" With the compiled loop of `aggregator/native` this takes {compiled:.2f} ms."
    return (
        f"{row['parameters']:,} parameters on one core. The device clips, ternarizes, packs and compresses an update "
        f"in {encode:.1f} ms. The aggregator decompresses, checks and adds it in {decode:.2f} ms.{faster} "
        f"Adding one float32 vector to another takes {add:.2f} ms."
    )


def ingest(rows: Any) -> str:
    head = (
        "parameters",
        "frames",
        "merged/s",
        "skeleton/s",
        "ratio",
        "half load: p50",
        "p99",
        "peak memory",
        "on disk",
    )
    how = " The aggregator has the compiled loop of `aggregator/native`." if any(map(_compiled, rows)) else ""
    body = []
    for row in rows:
        full, half = row["full"], row["half"]
        frames = f"{row['frame_bytes'] // 1024} KiB"
        speeds = [f"{row['parameters']:,}", frames, f"{full['updates_per_s']:,.0f}", f"{row['skeleton_per_s']:,.0f}"]
        waits = [f"{row['ratio']:.2f}", f"{half['p50_ms']:.0f} ms", f"{half['p99_ms']:.0f} ms"]
        body.append([*speeds, *waits, f"{full['peak_mb']:.0f} MB", f"{full['ledger_mb']:.0f} MB"])
    return (
        "Updates that one aggregator merges a second. Broker and senders share the machine; each update is on disk "
        f"before its receipt is sent.{how} The skeleton verifies, stores, adds and answers updates and does nothing "
        "else; it runs on the same broker with the same senders. p50 and p99 are the time from sending an update to "
        f"its receipt, at half of that load.\n\n{table_of(head, body)}"
    )


def dashboard(row: Any) -> str:
    viewers = str(row["viewers"])
    return (
        f"With {viewers} open dashboards an aggregator merges {row['watched_per_s']:.0f} updates of "
        f"{row['parameters']:,} parameters a second, without one {row['without_per_s']:.0f} (medians of "
        f"{row['rounds']} alternating rounds; the ratio is {row['ratio']:.2f}). Each update takes it "
        f"{row['cpu_ms'][viewers]:.2f} and {row['cpu_ms']['0']:.2f} ms of CPU. The dashboard is a process of its own, "
        f"and takes {row['dashboard_cores']:.2f} of a core."
    )


def attacks(rows: Any) -> str:
    head = ("attack", "broker", "parameters", "honest updates answered", "p50", "p99", "peak memory")
    body = [
        [
            row["attack"],
            row["engine"],
            f"{row['parameters']:,}",
            f"{row['answered']} of {row['updates']}",
            *("-" if row[key] is None else f"{row[key]:.0f} ms" for key in ("p50_ms", "p99_ms")),
            f"{row['peak_mb']:.0f} MB",
        ]
        for row in rows
    ]
    return (
        "What honest devices notice of one attacker, who does all that it can do at once: their updates answered, the "
        "time from sending one to its receipt, and the aggregator's memory. Broker, aggregator, senders and attacker "
        f"share the machine.\n\n{table_of(head, body)}"
    )


def fleet(row: Any) -> str:
    quiet, join = row["fan_out_quiet"], row["join"]
    p99 = statistics.median(each["p99_ms"] for each in quiet) / 1000
    largest = max(row["bytes_per_device"].values())
    return (
        f"{row['devices']:,} devices are connected at once. Each takes at most {largest:,.0f} B of the aggregator's "
        f"memory. A new version reaches 99 % of them within {p99:.1f} s. All enroll at once within "
        f"{join['seconds']:.0f} s, and send {join['resent']:,} frames twice."
    )


def edge(rows: Any) -> str:
    head = (
        "task",
        "samples",
        "own CPU an update",
        "of the training",
        "peak memory",
        "beside the trainer",
        "written to disk",
        "training CPU, times alone",
        "first training starts",
    )
    body = []
    for row in rows:
        device, bare = row["device"], row["alone"]
        work = [f"{1000 * device['own_cpu_s']:.0f} ms", percent(row["share"])]
        memory = [f"{device['peak_mb']:.0f} MB", f"{row['above_mb']:.0f} MB"]
        rest = [
            f"{device['written_bytes'] / 1000:,.0f} kB",
            f"{row['training_ratio']:.2f}",
            f"{row['later_s']:.1f} s later",
        ]
        body.append([row["task"], f"{bare['samples']:,.0f}", *work, *memory, *rest])
    return (
        "The same trainer in a device of Ternbus and alone in a process. Own CPU is what Ternbus adds to the training "
        f"for one update.\n\n{table_of(head, body)}"
    )


def time_to_accuracy(found: Any) -> str:
    head = ("way", "virtual s", "versions", "updates", "MB up", "MB down", "asynchronous, times sooner", "of its bytes")
    body = []
    for way in _ways(found):
        rows = [each[way] for each in found["seeds"]]
        if any(row["version"] is None for row in rows):
            body.append([way, "never", *([""] * 6)])
            continue
        means = [statistics.mean(row[key] for row in rows) for key in ("seconds", "version", "updates")]
        sizes = [statistics.mean(row[key] for row in rows) / 1e6 for key in ("up", "both")]
        ratios = found["compared"].get(way)
        than = ["", ""] if ratios is None else [f"{ratios['sooner']:.1f}", percent(ratios["both"])]
        body.append([way, *(f"{mean:.0f}" for mean in means), f"{sizes[0]:.1f}", f"{sizes[1] - sizes[0]:.1f}", *than])
    over = ""
    if any(way.startswith("over") for way in _ways(found)):
        over = (
            " Over-selection takes the first 10 of 20 on each version (Bonawitz et al. 2019); it was not tuned. The "
            "asynchronous way has the buffer that [the race](#a-race-of-ways-and-settings) found on digits-numpy."
        )
    return (
        "fashion-mnist, 20 devices of very unequal speed (sigma 1.0), lines of 1/4 Mbit/s, virtual time, "
        f"{seeds_of(len(found['seeds']))}: until {100 * found['accuracy']:.0f} %. The barrier waits for all 20 devices "
        f"(McMahan et al. 2017).{over}\n\n{table_of(head, body)}\n\n{_of_seeds(found)} {_goals(found)}"
    )


def _of_seeds(found: Any) -> str:
    """How many times sooner the asynchronous way was with each seed."""
    told = [
        f"than {way}, {', '.join(f'{each:.1f}' for each in ratios)}"
        for way in found["compared"]
        if None not in (rows := [each["compared"][way] for each in found["seeds"]])
        for ratios in [[row["sooner"] for row in rows]]
    ]
    return f"Times sooner, seed by seed: {'; '.join(told)}." if told else ""


def _goals(found: Any) -> str:
    """The goals against the barrier, and whether they were met."""
    ratios, goals = found["compared"]["barrier, float32"], found["goals"]
    if ratios is None:
        return ""
    told = [
        f"{goals['sooner']:.0f} times sooner: {_met(ratios['sooner'] >= goals['sooner'])}",
        f"{percent(goals['up'])} of its bytes up: {_met(ratios['up'] <= goals['up'])} ({percent(ratios['up'])})",
        f"{percent(goals['both'])} both ways: {_met(ratios['both'] <= goals['both'])} ({percent(ratios['both'])})",
    ]
    return f"Goals against the barrier: {'; '.join(told)}."


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _ways(found: Any) -> list[str]:
    """The ways that were run, the asynchronous one first."""
    return [name for name in found["seeds"][0] if ", " in name]


def slow_classes(found: Any) -> str:
    head = (
        "way", "versions", "test accuracy", "on the slow devices' classes", f"{100 * STAYS:.0f} % from virtual s on",
        "updates too stale",
    )  # fmt: skip
    seconds, body = found["asked"]["seconds"], []
    for way, runs in found["ways"].items():
        accuracies = [
            "{:.1f} % ± {:.1f}".format(*(100 * each for each in final(runs, name, seconds))) for name in NAMES
        ]
        stale = sum(each["stale"] for each in runs)
        share = stale / max(1, stale + sum(each["updates"] for each in runs))
        versions, reached = statistics.mean(len(each["seconds"]) - 1 for each in runs), until(runs)
        arrived = "never" if reached is None else f"{reached:.0f}"
        body.append([way, f"{versions:.0f}", *accuracies, arrived, percent(share)])
    return (
        "digits-numpy, 20 devices of very unequal speed (sigma 1.0); the five slowest have three classes that no other "
        "device has. Over-selection takes the first 10 of 20 on each version, so it seldom hears of a slow device. The "
        "asynchronous way hears of them, but a late update counts less, and many others come between two of theirs. "
        "With CA2FL and a server rate of 0.5, each version also moves by what every device sent last. "
        f"After {seconds:.0f} virtual seconds, {seeds_of(found['asked']['seeds'])}, ± standard deviation "
        f"([plot](../benchmarks/results/slow_classes.png)).\n\n{table_of(head, body)}"
        f"{_sooner_with_ca2fl(found['ways'])}"
    )


def _sooner_with_ca2fl(ways: Any) -> str:
    """The sentence on the best synchronous way, if CA2FL and a synchronous way have reached the accuracy."""
    calibrated = until(ways[CALIBRATED]) if CALIBRATED in ways else None
    others = [reached for way in WAYS[1:] if (reached := until(ways[way])) is not None]
    if calibrated is None or not others:
        return ""
    return (
        f"\n\nWith CA2FL {100 * STAYS:.0f} % is reached, for good, {min(others) / calibrated:.1f} times sooner than by "
        "the best synchronous way."
    )


def race(found: Any) -> str:
    about = (
        "The same devices and lines with other settings: which way is first at an accuracy. A synchronous way makes a "
        "version from the first updates on the newest one (over-selection), an asynchronous one from each full "
        "buffer, however stale its updates are: by a discount of staleness, or by an algorithm of its own "
        "([CA2FL, FADAS](notebook.md#algorithms-of-your-own)). Both choose from the same server optimizers; of each "
        f"buffer and discount the best is shown. Virtual time, {seeds_of(found['asked']['seeds'])}, ternary both ways."
    )
    parts = [about]
    for task, raced in found["tasks"].items():
        rows = raced["rows"]
        first = best(rows, synchronous=False)
        ratio = None if first is None else sooner(first, rows)
        verdict = "no synchronous way arrives" if ratio is None else f"the first one is {ratio:.2f} times sooner"
        met = _met(ratio is None or ratio >= found["goal"])
        goal = f"Goal: {found['goal']:.0f} times sooner than the best synchronous way: {met}, {verdict}."
        table = table_of(RACE_HEAD, [race_cells(row, rows) for row in best_of_each(rows)])
        late = "; ".join(never(rows))
        late = f" Not with every seed within {LONGEST_S[task]:.0f} s: {late}." if late else ""
        parts += [f"{task}, until {100 * raced['accuracy']:.0f} %:", table, f"{goal}{late}"]
    return "\n\n".join(parts)


def fashion(rows: Any) -> str:
    head = "both ways", "mean of the last 20 versions", "standard error", "of seeds", "bits up", "down", "MB in all"
    body = []
    for name, found in rows.items():
        accuracies = [100 * row["mean_of_last"] for row in found]
        up, down, size = (statistics.mean(row[key] for row in found) for key in ("bits_up", "bits_down", "megabytes"))
        seeds = ", ".join(f"{each:.1f}" for each in accuracies)
        mean, error = f"{statistics.mean(accuracies):.2f} %", f"{standard_error(accuracies):.2f}"
        body.append([name, mean, error, seeds, f"{up:.2f}", f"{down:.2f}", f"{size:.0f}"])
    apart, scatter = _ternary_minus_float32(rows)
    return (
        "fashion-mnist, 20 devices, Dirichlet 0.5, speeds lognormal 0.7, 60 versions of 5 updates, in virtual time. "
        f"Bits are those of one parameter.\n\n{table_of(head, body)}\n\n"
        f"Ternary minus float32, seed by seed: {apart:+.2f} points, standard error {scatter:.2f}."
    )


def simulator(rows: Any) -> str:
    head = ("devices", "versions", "updates", "setup", "in all", "peak memory")
    body = [
        [
            f"{row['devices']:,}",
            str(row["versions"]),
            f"{row['updates']:,}",
            *(f"{row[key]:.1f} s" for key in ("setup_s", "seconds")),
            f"{row['peak_mb']:.0f} MB",
        ]
        for row in rows
    ]
    return (
        "A simulation of digits-numpy, Dirichlet 0.5: three versions, each of the updates of a tenth of the devices. "
        "All devices enroll, fetch each version and begin to train. Times are those of one processor.\n\n"
        f"{table_of(head, body)}"
    )


def training_speed(rows: Any) -> str:
    ways = (
        "simulation", "bare training", "simulation / bare", "Flower's engine", "Flower / simulation", "processor / bare"
    )  # fmt: skip
    head = ("task", "data", "versions", "option", *ways)
    body = []
    for row in rows:
        ours = [row["task"], row["partition"], str(row["versions"]), f"`{row['options']}`", f"{row['ternbus_s']:.1f} s"]
        peer = ["", ""] if "flower_s" not in row else [f"{row['flower_s']:.1f} s", f"{row['to_flower']:.1f}"]
        spent = f"{row['cpu_to_training']:.2f}"
        body.append([*ours, f"{row['bare_s']:.1f} s", f"{row['to_bare']:.2f}", *peer, spent])
    return (
        "Rounds of 20 devices. Bare training is the same batches in a plain loop of PyTorch, in two processes that "
        "wait for nobody; nothing is merged or evaluated. Flower's engine trains in two processes. Those of the "
        "simulation keep the memory that a step frees, the others have their libraries' defaults. The simulation and "
        "Flower evaluate each version. Seconds are medians of whole commands, with their imports, and ratios are "
        "medians of the rounds' ratios. The last column has the processor's time of the simulation as a multiple of "
        "that of the training alone. Flower's columns need a Python with `flwr[simulation]`, named by "
        "FLOWER_PYTHON.\n\n"
        f"{table_of(head, body)}"
    )


AGREEMENT: Final[Mapping[str, str]] = {
    "versions_per_min": "versions a minute",
    "update_bytes": "bytes of an update",
    "staleness": "staleness of an update, mean",
    "staleness_p95": "staleness of a version's oldest update, 95th percentile",
    "accepted": "share of the updates accepted",
}


def agreement(found: Any) -> str:
    head = ("figure", "real processes", "simulation", "apart", "allowed")
    body = []
    for row in found["rows"]:
        share = row["relative"]
        apart, allowed = (percent(row[key]) if share else f"{row[key]:.2f}" for key in ("apart", "allowed"))
        body.append([AGREEMENT[row["figure"]], f"{row['real']:.4g}", f"{row['simulated']:.4g}", apart, allowed])
    return (
        f"digits-numpy, {found['devices']} devices (speeds lognormal 0.7), {found['versions']} versions of 10 updates: "
        "the same scenario by `ternbus lab run`, with a process for each device, and by `ternbus lab simulate`. The "
        f"first third of the versions is left out, while processes start.\n\n{table_of(head, body)}"
    )


SECTIONS: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "uplink": ("Bytes of an update", uplink),
    "fashion": ("What ternary costs in accuracy", fashion),
    "time_to_accuracy": ("Time to an accuracy", time_to_accuracy),
    "race": ("A race of ways and settings", race),
    "slow_classes": ("Where slow devices have classes of their own", slow_classes),
    "simulator": ("A simulation", simulator),
    "training_speed": ("A simulation beside the training in it", training_speed),
    "agreement": ("A simulation beside real processes", agreement),
    "codec": ("Encode and decode", codec),
    "ingest": ("An aggregator", ingest),
    "path": ("The whole path of an update", whole_path),
    "dashboard": ("An aggregator with a dashboard", dashboard),
    "exact_sums": ("Exact sums", exact_sums),
    "private_sums": ("Private sums", private_sums),
    "encrypted_sums": ("Private sums by encryption", encrypted_sums),
    "merge_costs": ("What an update and a version cost", merge_costs),
    "attacks": ("An aggregator under attack", attacks),
    "fleet": ("A fleet", fleet),
    "edge": ("A device", edge),
}


def figures() -> str:
    """The section of docs/figures.md between its markers."""
    kept = _all_kept()
    here = _machine(kept["uplink"])
    head = (
        f"Measured on {here}, unless a section names another machine. Times scatter on that machine, so compare "
        "ratios. `benchmarks/results` holds the JSON of each run."
    )
    parts = [
        _part(title, _source(name, kept[name], here), words(kept[name]["result"]))
        for name, (title, words) in SECTIONS.items()
    ]
    return _wrapped("\n\n".join([head, *parts, *_experiments(here)]))


def _experiments(here: str) -> list[str]:
    """The title, description and table of each experiment with a kept result."""
    parts = []
    for path in sorted(KEPT.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        result, minutes = kept["result"], kept["seconds"] / 60
        seeds = "One seed." if result["seeds"] == 1 else f"Means of {result['seeds']} seeds, ± standard deviation."
        about = f"{' '.join(result['about'].split())} {seeds} All runs took {minutes:.0f} minutes on a shared core."
        parts.append(_part(result["title"], _command(kept, here), f"{about}\n\n{experiment_table(result)}"))
    return parts


def _part(title: str, source: str, text: str) -> str:
    return f"## {title}\n\n{source}\n\n{text}"


# --- README.md: five of them


def summary() -> str:
    """The section of README.md between its markers."""
    kept = _all_kept()
    here = _machine(kept["uplink"])
    rows = [
        (what, words(kept[name]["result"]), _source(name, kept[name], here, short=True))
        for name, (what, words) in SUMMARY.items()
    ]
    return _wrapped(f"Measured on {here}.\n\n{table_of(('what', 'figure', 'command'), rows)}")


def _uplink_line(sizes: Any) -> str:
    packed = _bits(sizes, "zstd")
    return f"{packed:.2f} bits a parameter, {percent(packed / 32)} of float32"


def _fashion_line(rows: Any) -> str:
    mean, error = _ternary_minus_float32(rows)
    seeds = len(next(iter(rows.values())))
    return f"{mean:+.2f} points beside float32 both ways, standard error {error:.2f} ({seeds_of(seeds)})"


def _time_line(found: Any) -> str:
    names = {
        "barrier, float32": "by a float32 barrier",
        "over-selection, ternary": "the first 10",
    }
    told = [
        f"{ratios['sooner']:.{0 if ratios['sooner'] >= 10 else 1}f} times sooner than {name}"
        for way, name in names.items()
        if (ratios := found["compared"].get(way)) is not None
    ]
    if not told:
        return "not reached"
    first = found["compared"].get("over-selection, ternary")
    told += [] if first is None else [f"for {first['both']:.1f} times its bytes"]
    seeds = seeds_of(len(found["seeds"]))
    return f"{100 * found['accuracy']:.0f} % is reached {', '.join(told)} ({seeds}, virtual time)"


def _ingest_line(rows: Any) -> str:
    row = _large(rows)
    how = ", with the compiled loop" if _compiled(row) else ""
    return (
        f"{row['full']['updates_per_s']:,.0f} updates/s of {row['parameters']:,} parameters, each on disk before its "
        f"receipt{how}"
    )


def _edge_line(rows: Any) -> str:
    numpy, torch = rows[0], rows[-1]
    return (
        f"{1000 * torch['device']['own_cpu_s']:.0f} ms of CPU an update, {percent(torch['share'])} of the training "
        f"({torch['task']}); {numpy['device']['peak_mb']:.0f} MB with a numpy model ({numpy['task']})"
    )


SUMMARY: Final[Mapping[str, tuple[str, Callable[[Any], str]]]] = {
    "uplink": ("Size of an update", _uplink_line),
    "fashion": ("Accuracy with ternary both ways", _fashion_line),
    "time_to_accuracy": ("Time to an accuracy, 20 unequal devices", _time_line),
    "ingest": ("One aggregator, with its broker on two cores", _ingest_line),
    "edge": ("Cost on a device", _edge_line),
}

PAGES: Final[Mapping[Path, Callable[[], str]]] = {ROOT / "README.md": summary, ROOT / "docs" / "figures.md": figures}


# --- common functions


def _all_kept() -> dict[str, Any]:
    """The command, machine and result of each benchmark, by name."""
    kept = {}
    for name in SECTIONS:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            raise SystemExit(f"{path} is missing; run: python -m benchmarks {name} --data DIR")
        kept[name] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def _machine(kept: Any) -> str:
    about = kept["machine"]
    return (
        f"{about['cores']} cores ({about['processor']}, shared), {about['memory_gib']} GiB, {about['system']}, "
        f"Python {about['python']}"
    )


def _source(name: str, kept: Any, here: str, *, short: bool = False) -> str:
    """The command of a benchmark; with the machine and other work on it, unless no figure depends on them."""
    if name in VIRTUAL:
        return f"`{kept['command']}`"
    return _short(kept, here) if short else _command(kept, here)


def _command(kept: Any, here: str) -> str:
    """The command of a measurement, with the machine if that is not `here`, and with other work that ran on it."""
    elsewhere = "" if _machine(kept) == here else f", on {_machine(kept)}"
    load = kept.get("load_before") or 0.0
    busy = f", beside other work (load average {load:.1f})" if load > kept["machine"]["cores"] else ""
    return f"`{kept['command']}`{elsewhere}{busy}"


def _short(kept: Any, here: str) -> str:
    """The command, with no more than the processor's name if the machine is not `here`."""
    elsewhere = "" if _machine(kept) == here else f" ({kept['machine']['processor'].partition('(')[0]})"
    return f"`{kept['command']}`{elsewhere}"


def _wrapped(text: str) -> str:
    """The text in lines of at most 100 characters, with unchanged tables."""
    return "\n\n".join(
        part if part.startswith("|") else textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    )


def _bits(sizes: Any, encoding: str) -> float:
    """The bits per parameter of an update with this encoding."""
    return float(next(each["bits_per_parameter"] for each in sizes["sizes"] if each["encoding"] == encoding))


def _large(rows: Any) -> Any:
    return next(row for row in rows if row["parameters"] > LARGE)


def _compiled(row: Any) -> bool:
    return bool(row.get("compiled"))


def _ternary_minus_float32(rows: Any) -> tuple[float, float]:
    """(mean, standard error) of the differences in accuracy between runs with the same seed, in points."""
    apart = [100 * (one["mean_of_last"] - two["mean_of_last"]) for one, two in zip(*rows.values(), strict=True)]
    return statistics.mean(apart), standard_error(apart)


def between_markers(text: str) -> str | None:
    """The text between the two markers of a page; None if a marker is missing."""
    _, begin, rest = text.partition(BEGIN)
    found, end, _ = rest.partition(END)
    return found.strip() if begin and end else None


def main() -> None:
    """Print both sections, or write them into their pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the sections of README.md and docs/figures.md")
    write = parser.parse_args().write
    for page, section in PAGES.items():
        text = page.read_text(encoding="utf-8")
        if between_markers(text) is None:
            sys.exit(f"{page} lacks the marker {BEGIN!r} or {END!r}")
        if write:
            before, after = text.partition(BEGIN)[0], text.partition(END)[2]
            page.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}", encoding="utf-8")
        else:
            print(section(), end="\n\n")


if __name__ == "__main__":
    main()
