"""The status of an aggregator as text, for people."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ternbus.aggregator.core import disk_guard
from ternbus.aggregator.core.registry import EVALUATOR
from ternbus.aggregator.shell import search_text
from ternbus.aggregator.shell.health_text import moment
from ternbus.aggregator.store import device_metrics
from ternbus.aggregator.store.device_metrics import shown_name, shown_value
from ternbus.broker.plural import counted
from ternbus.broker.protocol.direction import for_people
from ternbus.broker.text_table import text_table

VERSIONS_MAX: Final = 10
METRICS_MAX: Final = 4  # of one evaluator; `--json` has all


def summary(found: Mapping[str, Any]) -> str:
    """What `ternbus aggregator status` prints."""
    counts = dict(found["counts"])
    invalid = counts.pop("invalid")
    lines = [
        f"federation {found['federation']}: {found['state']}, version {found['version']}, digest {found['digest']}",
        f"{found['buffer']} in the buffer",
        "updates: " + ", ".join(f"{value} {name}" for name, value in counts.items()),
    ]
    if (candidate := found["candidate"]) is not None:
        reports = ", ".join(candidate["reports"]) or "nobody"
        lines.append(f"candidate {candidate['version']} is evaluated; reported by {reports} so far")
    if invalid:
        lines.append("refused: " + ", ".join(f"{value} {name}" for name, value in invalid.items()))
    if found["disk"]["state"] != disk_guard.ENOUGH:
        lines.append(disk_guard.sentence(found["disk"]["free"]))
    versions = found["versions"][-VERSIONS_MAX:]
    if measured := _measured(versions, found["metric"]):
        names = dict.fromkeys(name for _, name in measured)
        shown = (f"{shown_name(name)} ({found['better'][name]} is better)" for name in names)
        lines.append(f"metrics: {', '.join(shown)}")
    lines += [f"{name}: {value}" for name, value in device_metrics.sentences(found["local"])]
    lines += [
        f"{name}: two machines use its key; revoke it, and invite each machine by its own name"
        for name, row in found["devices"].items()
        if row["cloned"]
    ]
    if found["search"] is not None:
        lines += ["", *search_text.lines(found["search"])]
    if "private" in found:
        lines += ["", *_private(found["private"])]
    lines += ["", *device_table(found)]
    return "\n".join([*lines, "", *_version_table(versions, measured, _local_metric(found))])


def _private(found: Mapping[str, Any]) -> list[str]:
    """Private sums: by which terms, and the table of helpers."""
    terms = "no terms yet" if found["terms"] is None else f"terms {found['terms']}"
    lines = [f"private sums of {found['min']} to {found['max']} devices, {found['bits']} bits: {terms}"]
    columns = dict.fromkeys(("helper", "state", "roster"), "<") | dict.fromkeys(("box key", "count"), ">")
    rows = []
    for name, row in found["helpers"].items():
        at = row["answered_at"]
        answered = None if at is None else moment(at)
        rows.append((name, row["state"], row["roster"], row["card"], row["count"], answered, row["waits_for"]))
    return [*lines, *_on_their_way(found), *text_table({**columns, "last answer": "<", "waits for": "<"}, rows)]


def _on_their_way(found: Mapping[str, Any]) -> list[str]:
    """Private updates that no version contains: who waits for whom."""
    lines = ["the federation closes when the helpers have answered"] if found["closing"] else []
    lines += [
        f"{counted(each['updates'], 'update')} on version {each['base']} wait{'s' if each['updates'] == 1 else ''}: "
        f"a sum has {found['min']} devices or more"
        for each in found["groups"]
    ]
    for each in found["sets"]:
        whom = f", waits for {', '.join(each['waits_for'])}" if each["waits_for"] else ""
        lines.append(
            f"a set of {counted(each['devices'], 'update')} on version {each['base']} is {each['state']}{whom}"
        )
    if found["dropped"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in found["dropped"].items())
        lines.append(f"private updates dropped so far: {counts}")
    if found["spoiled"]:
        counts = ", ".join(f"{device} of {count}" for device, count in found["spoiled"].items())
        lines.append(f"part of sums out of range: {counts}")
    return lines


def _local_metric(found: Mapping[str, Any]) -> str | None:
    """The primary metric of the devices' own data; None where no device reports any."""
    return None if found["local"] is None else found["local"]["metric"]


def _measured(versions: Sequence[Mapping[str, Any]], metric: str | None) -> list[tuple[str, str]]:
    """The (evaluator, metric) to show: each evaluator's primary ``metric`` first."""
    names: dict[str, dict[str, None]] = {}
    for row in versions:
        for evaluator, values in row["evaluations"].items():
            names.setdefault(evaluator, {}).update(dict.fromkeys(values))
    return [
        (evaluator, name) for evaluator in sorted(names) for name in for_people(names[evaluator], metric)[:METRICS_MAX]
    ]


def _version_table(
    versions: Sequence[Mapping[str, Any]], measured: Sequence[tuple[str, str]], local: str | None
) -> list[str]:
    """A column for each ``measured`` metric of an evaluator; the last ones are of the devices' ``local`` metric."""
    headings: dict[str, None] = {}
    for evaluator, name in measured:
        heading = f"{shown_name(name)} by {evaluator}"
        while heading in headings:  # of another name, which is as long or no text for a screen
            heading += "'"
        headings[heading] = None
    headings = headings or {"accuracy": None}
    columns = dict.fromkeys(("version", "updates", "staleness", *headings), ">") | {"time": "<"}
    if local is not None:
        columns |= {"worst tenth": ">", "median": ">", "devices": ">"}
    rows = []
    for row in versions:
        values = [row["evaluations"].get(evaluator, {}).get(name) for evaluator, name in measured] or [None]
        cells = [row["version"], row["updates"], f"{row['staleness_mean']:.2f}/{row['staleness_max']}"]
        cells += [*map(shown_value, values), moment(row["time"])]
        if local is not None:
            own = (row["local"] or {"metrics": {}})["metrics"].get(local, {})
            cells += [shown_value(own.get(name)) for name in ("worst_decile", "median")]
            cells.append(own.get("devices"))
        rows.append(cells)
    return text_table(columns, rows)


def device_table(found: Mapping[str, Any]) -> list[str]:
    """The lines of the table of a status's devices."""
    devices, metric = found["devices"], _local_metric(found)
    tuned = metric is not None and found["local"]["fine_tuned"] is not None
    columns = dict.fromkeys(("device", "role", "state"), "<")
    columns |= dict.fromkeys(("updates", "samples", "base", "staleness", "kB", "last seq"), ">")
    columns |= {"last seen": "<", "last answer": "<", "refused": ">", "stale": ">"}
    losses = any(row["loss"] is not None for row in devices.values())
    columns |= {"loss": ">"} if losses else {}
    private = any(row["epsilon"] is not None for row in devices.values())
    if private:
        columns["epsilon"] = ">"
    if metric is not None:
        columns |= {"held out": ">", f"own {shown_name(metric)}": ">"}
        columns |= {"gain": ">"} if tuned else {}
    if any(row["failing"] for row in devices.values()):
        columns["failing"] = "<"
    rows = []
    for name, row in devices.items():
        state = row["state"] if row["key_state"] == "active" else row["key_state"]
        state += ", cloned?" if row["cloned"] else ""
        traffic = [f"{row['bytes'] / 1000:.1f}", row["last_seq"]]
        cells = [
            name,
            (row["role"] or "any") + (", evaluates" if row["evaluates"] and row["role"] != EVALUATOR else ""),
            state,
            row["updates"],
            row["samples"],
            row["base"],
            row["staleness"],
            *traffic,
            None if row["seen_at"] is None else moment(row["seen_at"]),
            _answer(row["answer"]),
            _share(row["refused_share"]),
            _share(row["stale_share"]),
        ]
        if losses:
            cells.append(shown_value(row["loss"]))
        if private:
            cells.append(shown_value(row["epsilon"]))
        if metric is not None:
            own = row["local"] or {"samples": None, "metrics": {}, "gain": {}}
            cells += [own["samples"], shown_value(own["metrics"].get(metric))]
            cells += [shown_value(own["gain"].get(metric), "+")] if tuned else []
        if "failing" in columns:
            cells.append(row["failing"])
        rows.append(cells)
    return text_table(columns, rows)


def _answer(answer: Mapping[str, Any] | None) -> str | None:
    """The last answer, of a reason its first words."""
    if answer is None:
        return None
    slug = answer["reason"].partition(":")[0]
    return f"invalid: {slug}" if answer["outcome"] == "invalid" else str(answer["outcome"])


def _share(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"
