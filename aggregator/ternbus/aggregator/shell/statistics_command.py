"""`ternbus aggregator statistics`: ask devices for statistics of their data, and show what they come to."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ternbus.aggregator.core.findings import of_devices
from ternbus.aggregator.core.statistics import ANSWERED, INVALID, REFUSED
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.arguments import AsJson, Dir
from ternbus.aggregator.store import control, membership, statistics_rows
from ternbus.aggregator.store.ledger import reading
from ternbus.aggregator.store.remedy import start_command
from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.path_errors import quoted
from ternbus.broker.plural import counted
from ternbus.broker.protocol.statistics import BINS_MAX, HISTOGRAM, KINDS, LABELS, MOMENTS
from ternbus.broker.text_table import text_table

MIN_DEVICES: Final = 2
BINS: Final = 32
POLL_S: Final = 0.1
GRACE_S: Final = 5.0  # for the process to end a request when its time has come
WAIT_S: Final = 60.0
UNANSWERED: Final = "is offline, or its owner joined it without --statistics"
SHOWN: Final = ("0.05", "0.5", "0.95")  # quantiles, in the table for people

Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help=f"{', '.join(KINDS)}; repeatable. [default: moments and labels]"),
]
Features = Annotated[
    list[str] | None,
    typer.Option("--feature", metavar="NAME[=LOW:HIGH]", help="Feature, with bounds of its own; repeatable."),
]
Bounds = Annotated[
    str, typer.Option(metavar="LOW:HIGH", help="Bounds of all features: of the histogram, and of clipping with dp.")
]
Bins = Annotated[int, typer.Option(min=1, max=BINS_MAX, help="Bins of the histogram.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME", help="Label to count; needed with dp; repeatable.")
]
Noise = Annotated[
    float | None, typer.Option(min=0, metavar="Z", help="Noise multiplier, with dp. [default: the plan's dp_noise]")
]
Wait = Annotated[float, typer.Option(min=0, max=86_400, metavar="SECONDS", help="How long devices may answer.")]
Last = Annotated[bool, typer.Option("--last", help="Show the last result, and ask nobody.")]


def statistics(
    directory: Dir,
    kinds: Kinds = None,
    *,
    features: Features = None,
    bounds: Bounds = "",
    bins: Bins = BINS,
    labels: Labels = None,
    noise: Noise = None,
    wait: Wait = WAIT_S,
    last: Last = False,
    as_json: AsJson = False,
) -> None:
    """Ask devices for statistics of their data: count, mean, variance, histogram, quantiles, labels.

    Only devices that joined with `--statistics` answer, each at most once. The aggregator must run. What fewer than two
    devices, or merge.min_devices, have answered is not shown. Without dp in the plan the aggregator sees each answer;
    with it each device adds noise, and pays from its privacy budget. See docs/statistics.md.

    Example: ternbus aggregator statistics agg --kind moments --kind histogram --bounds 0:1
    """
    if not last:
        administration.load_settings(directory)  # or there is no aggregator
        chosen, limits = _chosen(kinds or (MOMENTS, LABELS)), _bounded(features or (), bounds)
        if HISTOGRAM in chosen and not limits["low"]:
            raise ConfigError(
                "--kind histogram needs bounds: add --bounds LOW:HIGH, or to each --feature NAME=LOW:HIGH"
            )
        asked = {
            **limits,
            "kinds": chosen,
            "bins": bins if HISTOGRAM in chosen else 0,
            "labels": labels or (),
            "noise": noise,
            "wait_s": wait,
        }
        try:
            control.ask(directory, control.STATISTICS, json.dumps(asked))
        except control.NotRunningError as error:
            start = f"ternbus aggregator {start_command(directory)} {quoted(directory)}"
            raise ConfigError(f"{error}: start it with `{start}`, and ask again") from error
        _tell(directory, wait)
        _wait(directory, wait)
    found = result(directory)
    typer.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


def _chosen(kinds: Sequence[str]) -> tuple[str, ...]:
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--kind is {kind!r}: give one of {', '.join(KINDS)}")
    return tuple(dict.fromkeys(kinds))


def _bounded(features: Sequence[str], bounds: str) -> dict[str, Any]:
    """Names and bounds of the features, as in a request."""
    named = [each.rpartition("=") if "=" in each else (each, "", bounds) for each in features]
    pairs = [_pair(text, name) for name, _, text in named if text]
    if len(pairs) not in {0, len(named)}:
        raise ConfigError("give bounds to all features or to none: --feature NAME=LOW:HIGH, or --bounds LOW:HIGH")
    if not named and bounds:
        pairs = [_pair(bounds, "--bounds")]
    return {
        "features": [name for name, _, _ in named],
        "low": [low for low, _ in pairs],
        "high": [high for _, high in pairs],
    }


def _pair(text: str, what: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ConfigError(f"{what}: {text!r} are no bounds: write LOW:HIGH, for example 0:1") from None
    if not low < high:
        raise ConfigError(f"{what}: {text!r} are no bounds: LOW must be below HIGH")
    return low, high


def _tell(directory: Path, wait_s: float) -> None:
    with reading(directory) as ledger:
        count = len(membership.trainers(ledger.db))
    asked = f"{count} device{'' if count == 1 else 's'}"
    typer.echo(f"ternbus: asked {asked}; waiting up to {wait_s:g} s for answers (--wait)", err=True)


def _wait(directory: Path, wait_s: float) -> None:
    """Until the request has ended; FederationError where the aggregator does not end it."""
    deadline = time.monotonic() + wait_s + GRACE_S
    while True:
        with reading(directory) as ledger:
            if not statistics_rows.read(ledger.db).is_open:
                return
        if not control.is_running(directory):
            raise FederationError(
                "the aggregator stopped before devices had answered; it goes on when it runs again: see --last"
            )
        if time.monotonic() > deadline:
            raise FederationError("the aggregator does not end the request: look at its log; --last shows what came")
        time.sleep(POLL_S)  # between two looks at the ledger, which another process writes


def result(directory: Path) -> dict[str, Any]:
    """What the last request came to; ConfigError where there was none."""
    least = max(MIN_DEVICES, administration.load_settings(directory).min_devices)
    with reading(directory) as ledger:
        state, devices = statistics_rows.read(ledger.db), membership.trainers(ledger.db)
    if state.pooled is None:
        raise ConfigError(f"nobody was asked for statistics in {directory}: leave out --last")
    outcomes = state.outcomes
    return {
        **state.pooled.result(least, is_open=state.is_open),
        "open": state.is_open,
        "answered": [name for name, outcome in outcomes.items() if outcome == ANSWERED],
        "refused": _why(outcomes, REFUSED),
        "invalid": _why(outcomes, INVALID),
        "unanswered": [name for name in devices if name not in outcomes],
    }


def _why(outcomes: Mapping[str, str], what: str) -> dict[str, str]:
    return {name: outcome.removeprefix(what) for name, outcome in outcomes.items() if outcome.startswith(what)}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    told = [f"{counted(found['devices'], 'device')} answered" + (", and some may yet" if found["open"] else "")]
    for what in ("refused", "invalid"):
        told += [f"{what}: {name}: {why}" for name, why in found[what].items()]
    if found["unanswered"] and not found["open"]:
        each = "each " if len(found["unanswered"]) > 1 else ""
        told.append(f"no answer: {of_devices(found['unanswered'])}: {each}{UNANSWERED}")
    if not found["shown"] and found["open"]:
        return [*told, "nothing is shown before the request has ended"]
    if not found["shown"]:
        return [*told, f"fewer than {found['min_devices']} devices have answered, so nothing is shown"]
    if found["samples"] is not None:
        told.append(counted(found["samples"], "sample"))
    if found["dp"] != "none":
        told.append(
            f'with the noise of dp = "{found["dp"]}", multiplier {found["noise"]:g}; counts are in {found["unit"]}'
        )
    if found.get("label_noise") is not None:
        told.append(f"noise of the count of a label: {_number(found['label_noise'])}")
    if found["features"]:
        told += ["", *_table(found["features"])]
    if found["labels"]:
        unit = found["unit"] if found["dp"] != "none" else "samples"
        counts = [(name, _number(count)) for name, count in found["labels"].items()]
        told += ["", *text_table({"label": "<", unit: ">"}, counts)]
    if found["hidden"]:
        few = f"of fewer than {found['min_devices']} devices, or by which those could be told"
        told += ["", f"not shown: {found['hidden']} features or labels, {few}"]
    return told


def _table(features: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = [
        name
        for name in ("count", "dropped", "mean", "mean_noise", "variance", "std", "histogram_noise")
        if name in features[0]
    ]
    names = {"feature": "<", "devices": ">"} | dict.fromkeys(columns, ">")
    has_bins = "quantiles" in features[0]
    names |= {f"{share} quantile": ">" for share in SHOWN} | {"error": ">"} if has_bins else {}
    rows = []
    for each in features:
        row = [each["feature"], each["devices"], *(_number(each[name]) for name in columns)]
        if has_bins:
            row += [*(_number(each["quantiles"][share]) for share in SHOWN), _number(each["quantile_error"])]
        rows.append(row)
    return text_table(names, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"
