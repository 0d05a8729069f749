"""The rows of `aggregator versions`: each version's updates, norm, metric and tags, and whether its model is kept."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ternbus.aggregator.merge.mean import norm
from ternbus.aggregator.store import metric_rows, status, tags
from ternbus.aggregator.store.ledger import Ledger
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import direction_of, sign_of


def read(ledger: Ledger, count: int, also: Collection[int] = ()) -> dict[str, Any]:
    """The last ``count`` versions, all that have a tag, and those in ``also``, as JSON values.

    Each has a row as in the status, and its ``tags``, whether it is ``kept`` (it can be exported), and the ``norm`` of
    the change that it was (None: its delta is not kept). ``metric`` is the primary one, ``best`` the kept version that
    has the best of it by the first evaluator (None: no kept version was evaluated).
    """
    names: dict[int, list[str]] = {}
    for name, tag in tags.read(ledger).items():
        names.setdefault(tag.version, []).append(name)
    (oldest,) = ledger.db.execute("SELECT min(version) FROM snapshots").fetchone()
    number, kept_number = ledger.db.execute(
        "SELECT count(*), count(*) FILTER (WHERE version >= ?) FROM versions", (oldest,)
    ).fetchone()
    found = status.read_ledger(ledger, max(min(count, number), kept_number), also={*names, *also})
    asked = names.keys() | set(also)
    rows = [row for row in found["versions"][-count:] if row["version"] not in asked]
    rows += [row for row in found["versions"] if row["version"] in asked]
    norms = _norms(ledger, oldest)
    versions = [
        {
            **row,
            "tags": sorted(names.get(row["version"], [])),
            "kept": row["version"] >= oldest or row["version"] in names,
            "norm": norms.get(row["version"]),
        }
        for row in sorted(rows, key=lambda row: int(row["version"]))
    ]
    kept = [row for row in found["versions"] if row["version"] >= oldest or row["version"] in names]
    metric, better = found["metric"], found["better"]
    return {"metric": metric, "best": best(kept, metric, better), "newest": found["version"], "versions": versions}


def best(rows: Sequence[Mapping[str, Any]], metric: str | None, better: Mapping[str, Any]) -> int | None:
    """The version with the best value of a metric, the newest of equals; None where no row has one."""
    if metric is None:
        return None
    sign = sign_of(direction_of(metric, better))
    worth = [(sign * row["metrics"][metric], row["version"]) for row in rows if metric in row["metrics"]]
    return max(worth)[1] if worth else None


def _norms(ledger: Ledger, oldest: int) -> dict[int, float]:
    """The L2 norm of the change of each version whose delta is kept."""
    return {version: float(norm(block)) for version, _, block in ledger.deltas(ledger.schema(), oldest, ledger.version)}


def find(ledger: Ledger, *, tag: str | None, is_best: bool) -> int:
    """The version with a tag, or the best; ConfigError where there is none."""
    if tag is not None:
        found = tags.read(ledger)
        if tag not in found:
            raise ConfigError(f"there is no tag {tag!r}; see `ternbus aggregator versions`")
        return found[tag].version
    best_version: int | None = read(ledger, 1)["best"] if is_best else ledger.version
    if best_version is None:
        raise ConfigError("no kept version has been evaluated: run an evaluator, or give --version")
    return best_version


def better_one_gone(ledger: Ledger, kept: int) -> str:
    """In words, the version that was better than the best one that is ``kept``; empty where none was."""
    tests = metric_rows.tests(ledger)
    metric = tests.metric
    numbers = [number for (number,) in ledger.db.execute("SELECT version FROM versions")]
    rows = [{"version": number, **tests.version(number)} for number in numbers]
    values = {row["version"]: row["metrics"].get(metric) for row in rows}
    first = best(rows, metric, tests.better)
    if first is None or values[first] == values.get(kept):
        return ""
    return (
        f"version {first} was better, with {metric} {values[first]:.4g}, and is not kept: set versions.keep_best = 1 "
        "in aggregator.toml to keep the best of those to come"
    )
