"""The commands `ternbus aggregator versions`, `tag` and `export`."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ternbus.aggregator.shell import administration, log
from ternbus.aggregator.shell.arguments import AsJson, Dir, DirAsRoot
from ternbus.aggregator.shell.health_text import moment
from ternbus.aggregator.store import tags, version_rows
from ternbus.aggregator.store.device_metrics import shown_name, shown_value
from ternbus.aggregator.store.ledger import blaming, reading, writing
from ternbus.aggregator.store.tags import Tag
from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.broker.text_table import text_table

COUNT: Final = 32
VERSION_MAX: Final = 2**63 - 1

Number = Annotated[
    int | None,
    typer.Option("--version", min=0, max=VERSION_MAX, help="Version, one of those kept. [default: the newest]"),
]
Named = Annotated[str | None, typer.Option("--tag", metavar="NAME", help="Version by its tag.")]


def versions(
    directory: Dir,
    version: Annotated[int | None, typer.Argument(metavar="[VERSION]", help="One version, with its updates.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of versions to list; those with a tag come too.")] = COUNT,
    as_json: AsJson = False,
) -> None:
    """List the versions: what each was made of, the norm of its change, its metric, its tags, whether it is kept.

    Kept are the last versions.keep (0 = downlink.slots, 32), those with a tag, and the versions.keep_best with the best
    metric: they can be exported. With VERSION, show one, and which device's updates are in it with which weight.

    Example: ternbus aggregator versions agg 57
    """
    administration.load_settings(directory)
    with reading(directory) as ledger:
        found = version_rows.read(ledger, count, () if version is None else (version,))
    if version is None:
        with blaming(directory):
            typer.echo(json.dumps(found) if as_json else "\n".join(_table(found)))
        return
    rows = [row for row in found["versions"] if row["version"] == version]
    if not rows:
        raise ConfigError(f"there is no version {version}; the newest is {found['newest']}")
    shown = {**rows[0], "contributions": _contributions(directory, version)}
    with blaming(directory):
        typer.echo(json.dumps(shown) if as_json else "\n".join(_page(shown)))


def _contributions(directory: Path, version: int) -> list[dict[str, Any]]:
    return [
        {"device": each.device, "seq": each.seq, "weight": each.weight}
        for entry, _ in log.entries(directory, version)
        for each in entry.updates
    ]


def _table(found: Mapping[str, Any]) -> list[str]:
    metric = found["metric"]
    columns = dict.fromkeys(("version", "updates", "staleness", "norm"), ">")
    columns |= {"" if metric is None else shown_name(metric): ">"} if metric else {}
    columns |= dict.fromkeys(("kept", "tags", "time"), "<")
    rows = []
    for row in found["versions"]:
        cells = [row["version"], row["updates"], f"{row['staleness_mean']:.2f}/{row['staleness_max']}"]
        cells.append(None if row["norm"] is None else f"{row['norm']:.4g}")
        cells += [shown_value(row["metrics"].get(metric))] if metric else []
        names = [*row["tags"], *(["best"] if row["version"] == found["best"] else [])]
        rows.append([*cells, "yes" if row["kept"] else "", ", ".join(names), moment(row["time"])])
    return text_table(columns, rows)


def _page(row: Mapping[str, Any]) -> list[str]:
    lines = [
        f"version {row['version']}, made {moment(row['time'])}, digest {row['digest']}",
        f"{counted(row['updates'], 'update')}, staleness {row['staleness_mean']:.2f}, at most {row['staleness_max']}",
        f"norm of the change: {'not kept' if row['norm'] is None else format(row['norm'], '.4g')}",
        f"tags: {', '.join(row['tags']) or 'none'}; {'kept' if row['kept'] else 'not kept'}",
    ]
    for evaluator, values in row["evaluations"].items():
        metrics = (f"{shown_name(name)} {shown_value(value)}" for name, value in values.items())
        lines.append(f"by {evaluator}: {', '.join(metrics)}")
    columns = {"device": "<", "seq": ">", "weight": ">"}
    cells = [[each["device"], each["seq"], f"{each['weight']:.4f}"] for each in row["contributions"]]
    return [*lines, *(["", *text_table(columns, cells)] if cells else [])]


def tag(
    directory: Dir,
    version: Annotated[
        int | None, typer.Argument(metavar="VERSION", min=0, max=VERSION_MAX, help="Version, one of those kept.")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name: a-z, 0-9, '.', '_', '-'.")] = None,
    remove: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take a name away, instead; its version is then not kept.")
    ] = None,
) -> None:
    """Give a version a name, and keep it for good; also while the aggregator runs.

    The model is DIR/tagged/NAME.safetensors.

    Example: ternbus aggregator tag agg 57 good
    """
    administration.load_settings(directory)
    if (version is None or name is None) == (remove is None):
        raise ConfigError("give VERSION and NAME, or --remove NAME")
    if version is None or name is None:
        with writing(directory) as ledger:
            tags.remove(ledger, remove or "")
        return
    found = name_version(directory, version, name)
    typer.echo(f"{name}: version {found.version}, digest {found.digest}, in {tags.path(directory, name)}")


def name_version(directory: Path, version: int, name: str) -> Tag:
    """Give a kept version a name, also beside a running aggregator; ConfigError says why it cannot have it."""
    with writing(directory) as ledger:
        return tags.put(ledger, name, version, time.time())


def export(
    directory: DirAsRoot,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
    number: Number = None,
    named: Named = None,
    best: Annotated[
        bool, typer.Option("--best", help="The kept version with the best metric of the first evaluator.")
    ] = False,
) -> None:
    """Write a version of the model to a safetensors file, exactly as devices hold it.

    Example: ternbus aggregator export agg model.safetensors --best
    """
    if sum((number is not None, named is not None, best)) > 1:
        raise ConfigError("give only one of --version, --tag and --best")
    administration.load_settings(directory)
    note = ""
    if number is None:
        with reading(directory) as ledger:
            number = version_rows.find(ledger, tag=named, is_best=best)
            note = version_rows.better_one_gone(ledger, number) if best else ""
    found, digest = administration.export(directory, out, number)
    typer.echo(f"{out}: version {found}, digest {digest.hex()}")
    if note:
        typer.echo(f"ternbus: {note}", err=True)
