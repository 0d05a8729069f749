"""Statistics of the data of all devices of a federation, by the code of devices and aggregator, without a wire."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ternbus.aggregator.merge.pooled import Pooled
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.statistics import HISTOGRAM, KINDS, LABELS, MOMENTS, Measured, StatisticsRequest
from ternbus.edge.learn.measure import measured
from ternbus.edge.learn.task import Trainer
from ternbus.lab.notebook.frames import frame

MIN_DEVICES: Final = 1  # the data of a simulation are on this machine
DEFAULT_KINDS: Final = (MOMENTS, LABELS)
COLUMNS: Final = ("devices", "count", "dropped", "mean", "variance", "std", "below", "above")


def request_of(
    kinds: Sequence[str], features: Sequence[str | int], bounds: tuple[float, float] | None, bins: int
) -> StatisticsRequest:
    """The request as devices read it. Raises `ConfigError` for none."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"statistics: there is no kind {unknown[0]!r}: choose some of {', '.join(KINDS)}")
    if isinstance(features, str):
        raise ConfigError(f"features is one text: give a list of them, as [{features!r}]")
    try:
        low, high = ((), ()) if bounds is None else ((float(bounds[0]),), (float(bounds[1]),))
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"bounds is {bounds!r}, but must be two numbers, as (0, 1)") from error
    table = {"id": 1, "kinds": list(kinds), "features": list(map(str, features)), "low": list(low), "high": list(high),
             "bins": bins if HISTOGRAM in kinds else 0, "labels": [], "dp": "none", "noise": 0.0}  # fmt: skip
    try:
        return StatisticsRequest.from_meta(table)
    except ProtocolError as error:
        raise ConfigError(f"statistics: {error.detail}") from error


def facts_of(trainers: Mapping[str, Trainer], request: StatisticsRequest) -> dict[str, Any]:
    """What all devices' answers come to, as `ternbus aggregator statistics --json` has it.

    Raises `ConfigError` if no device gives an answer.
    """
    pooled, refused = Pooled(request=request), dict[str, str]()
    for name, trainer in trainers.items():
        try:
            pooled.add(Measured.read(measured(trainer, request).pack(), request))
        except ConfigError as error:
            refused[name] = str(error)
    if len(refused) == len(trainers):
        name, why = next(iter(refused.items()))
        raise ConfigError(f"{name} gives no statistics: {why}")
    return {**pooled.result(MIN_DEVICES), "refused": refused}


def table_of(facts: Mapping[str, Any]) -> Any:
    """A DataFrame with a row for each feature and each label, and the facts in `.attrs`."""
    rows: list[dict[str, Any]] = []
    for each in facts["features"]:
        row = {"name": each["feature"], "kind": "feature", **{name: each[name] for name in COLUMNS if name in each}}
        row |= {f"q{share}": value for share, value in each.get("quantiles", {}).items()}
        rows.append(row | ({"q_error": each["quantile_error"]} if "quantile_error" in each else {}))
    rows += [{"name": name, "kind": "label", "count": count} for name, count in facts["labels"].items()]
    table = frame(rows, ("name", "kind", "count"))
    table.attrs["facts"] = dict(facts)
    return table
