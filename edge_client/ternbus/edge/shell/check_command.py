"""The command `ternbus edge check`: a task, tried as the plan of a federation asks for it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_DONE
from ternbus.broker.files import check_readable, expanded, load_toml
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.json_output import json_output
from ternbus.broker.toml import toml_value
from ternbus.edge.learn.partition_spec import FORMS, Partition
from ternbus.edge.learn.task import placed
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.invitations import TASKS
from ternbus.edge.shell.preflight import Conditions
from ternbus.edge.shell.preflight import check as examine
from ternbus.edge.store import outbox


def check(
    task: Annotated[str | None, typer.Argument(help=f"Task: {TASKS}")] = None,
    *,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the task's data.")] = None,
    partition: Annotated[
        str | None, typer.Option(help=f"Part of the data to train on: {FORMS}. [default: all]")
    ] = None,
    width: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of each layer's channels to train. [default: 1]")
    ] = None,
    hold_out: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the data kept for evaluation. [default: 0]")
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help='Key of the federation\'s plan, for example dp="sample"; repeatable.'),
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan-from", metavar="FILE.toml", help="File with the plan: aggregator.toml, or a scenario of the lab."
        ),
    ] = None,
    device: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", help="Directory of a device that has joined: its task, data, privacy and limits."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check a task without a federation: train one step, encode and decode an update, evaluate, list problems.

    The step is that of the task's default plan with the changes of `--plan-from` and `--plan`: its batch size,
    precision and differential privacy. What the plan asks for and the model cannot do is a problem. With `--dir` and no
    other plan, so is a reason for which the device trains by no plan of its federation at present.

    Exit codes: 0 ready, 2 problems found.

    Example: ternbus edge check my_task:TASK --data data --plan batch_size=1
    """
    with json_output(as_json) as output:
        if (folder := data and expanded(data)) is not None:
            check_readable(folder, "--data")
        options = {"data": folder, "partition": partition, "width": width, "hold_out": hold_out}
        given = {key: value for key, value in options.items() if value is not None}
        name, processor, conditions = _conditions(task, device, given)
        asked, allowed = _plan_in(plan_file)
        asked |= dict(map(_key, plan or []))
        report = examine(placed(load_task(name), processor), replace(conditions, allowed=allowed), asked)
        if as_json:
            facts = {"task": name, "ok": not report.problems, **report.facts}
            output.write(json.dumps({**facts, "problems": report.problems, "notes": report.notes}) + "\n")
        else:
            typer.echo("\n".join(report.lines()))
    raise typer.Exit(EXIT_CONFIG if report.problems else EXIT_DONE)


def _conditions(task: str | None, device: Path | None, given: Mapping[str, Any]) -> tuple[str, str, Conditions]:
    """The name of the task, the device's processor, and the conditions: ``given``, else by the directory."""
    found, processor = Conditions(), ""
    if device is not None:
        act_as_owner(device)
        settings = DeviceDirectory(device).settings()
        task, processor = task or settings.task, settings.processor
        found = Conditions(
            data=settings.data_folder,
            partition=settings.partition,
            width=settings.share_of_channels,
            hold_out=settings.held_share,
            policy=settings.policy,
            sums=settings.sums,
            limits=settings.limits,
            refusal=outbox.summary(device).state.refusal if outbox.exists(device) else "",
        )
    if task is None:
        raise ConfigError(f"no task is given: name {TASKS} Or give --dir DIR")
    found = replace(found, **given)
    Partition.parse(found.held_out)
    return task, processor, found


def _plan_in(path: Path | None) -> tuple[dict[str, object], tuple[str, ...]]:
    """The plan of a file, and the keys that it allows besides those that Ternbus and the task know."""
    if path is None:
        return {}, ()
    table = load_toml(expanded(path))
    if not isinstance(plan := table.get("plan"), dict):
        raise ConfigError(f"{path} has no section [plan]: give an aggregator.toml or a scenario with one")
    checked = table.get("plan_check")
    allowed = checked.get("allowed_keys") if isinstance(checked, dict) else table.get("allow_plan_keys")
    return plan, tuple(str(name) for name in allowed) if isinstance(allowed, list) else ()


def _key(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"invalid --plan {text}: write KEY=VALUE, for example batch_size=16")
    return key.strip().removeprefix("plan."), toml_value(value)
