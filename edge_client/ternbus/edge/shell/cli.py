"""The commands `ternbus edge …`: join a federation, train or evaluate for it, inspect the device, leave."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_DONE, EXIT_REFUSED
from ternbus.broker.files import check_readable, expanded
from ternbus.broker.folder_owner import act_as_owner
from ternbus.broker.json_output import json_output
from ternbus.broker.login_options import NoTls, PasswordFile
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.plain_help import command_group
from ternbus.broker.plural import counted
from ternbus.broker.protocol.frame import FRAME_BYTES_RANGE
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.core.actions import Stop
from ternbus.edge.core.profile import Role
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.kinds import tensor_kinds
from ternbus.edge.learn.partition_spec import FORMS, Partition
from ternbus.edge.learn.subnetwork import narrow
from ternbus.edge.learn.task import Task, initial_of, placed, task_plan
from ternbus.edge.learn.task_loader import absolute, load_task
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.privacy import KINDS, SUM, PrivacyPolicy
from ternbus.edge.shell import agent, inspection_commands
from ternbus.edge.shell.arguments import AsJson, Dir, FineTune, Reports, Stay, Timeout
from ternbus.edge.shell.check_command import check
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.shell.invitations import TASKS, InvitationFile, load_invitation
from ternbus.edge.shell.noise_command import noise
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.printer import Printer
from ternbus.edge.shell.private_options import (
    Helpers,
    Private,
    PrivateColluding,
    PrivateKind,
    PrivateMin,
    PrivateRoster,
    pinned,
)
from ternbus.edge.shell.rejoin_command import rejoin
from ternbus.edge.shell.run_commands import evaluate, export, run, run_device
from ternbus.edge.shell.statistics_limit import allowed
from ternbus.edge.shell.statistics_options import Statistics, StatisticsPerDay
from ternbus.edge.store import outbox

app = command_group("Run a device: follow the model, train, send updates.")

Seed = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="Seed that `init-model` was given; the device then need not download version 0."
    ),
]
Username = Annotated[str, typer.Option(metavar="NAME", help="User name at the broker, if it is not the device's name.")]
Renew = Annotated[
    bool, typer.Option("--renew", help="Replace the key of a device that has joined; keep everything else.")
]
Width = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of each layer's channels to train; less than 1 for a weak device.")
]
Processor = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Processor that trains: cpu, cuda, cuda:1 or mps; else the plan's.",
    ),
]
HoldOut = Annotated[
    float,
    typer.Option(
        metavar="SHARE", help="Share of the device's data, up to 0.4, kept for evaluation and never trained on."
    ),
]
FrameBytes = Annotated[
    int | None,
    typer.Option(
        min=FRAME_BYTES_RANGE[0],
        max=FRAME_BYTES_RANGE[1],
        help="Largest MQTT payload to send, in bytes, if the broker allows it. Larger payloads mean fewer parts. By "
        "default it is what the aggregator takes, at least 122880.",
    ),
]

Dp = Annotated[
    str, typer.Option(metavar="KIND", help="Required differential privacy of the plan: device, sample, sum.")
]
MaxEpsilon = Annotated[
    float | None, typer.Option(metavar="EPSILON", help="Largest epsilon to spend, whatever the plan allows; with --dp.")
]
MaxDelta = Annotated[float, typer.Option(metavar="DELTA", help="Largest delta of the plan to accept; with --dp.")]
MaxSeconds = Annotated[float | None, typer.Option(metavar="SECONDS", help="Largest duration of one training.")]
MaxSteps = Annotated[int | None, typer.Option(metavar="N", help="Largest number of steps of one training.")]

ThenRun = Annotated[bool, typer.Option("--run", help="Train after joining, like `ternbus edge run`.")]
ThenEvaluate = Annotated[bool, typer.Option("--evaluate", help="Evaluate after joining, like `ternbus edge evaluate`.")]


@app.command()
def join(
    *,
    invitation: InvitationFile,
    directory: Dir,
    task: Annotated[str, typer.Option(help=f"Task: {TASKS} Required unless --renew.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder with the task's data, if the task needs one.")] = None,
    partition: Annotated[str, typer.Option(help=f"Part of the data that this device trains on: {FORMS}.")] = "all",
    seed: Seed = 0,
    username: Username = "",
    password_file: PasswordFile = None,
    no_tls: NoTls = False,
    dp: Dp = "",
    max_epsilon: MaxEpsilon = None,
    max_delta: MaxDelta = 1e-5,
    private: Private = False,
    helpers: Helpers = None,
    private_min: PrivateMin = None,
    private_roster: PrivateRoster = "",
    private_colluding: PrivateColluding = 0,
    private_kind: PrivateKind = "",
    statistics: Statistics = False,
    statistics_per_day: StatisticsPerDay = None,
    max_seconds: MaxSeconds = None,
    max_steps: MaxSteps = None,
    renew: Renew = False,
    hold_out: HoldOut = 0.0,
    width: Width = 1.0,
    processor: Processor = "",
    frame_bytes: FrameBytes = None,
    then_run: ThenRun = False,
    then_evaluate: ThenEvaluate = False,
    reports: Reports = False,
    fine_tune: FineTune = 0.0,
    timeout: Timeout = None,
    stay: Stay = False,
    as_json: AsJson = False,
) -> None:
    """Join a federation: make a key, enroll it with the invitation's code, check that the task's model fits.

    It waits for a broker and an aggregator, and can be repeated: with `--run` or `--evaluate` also after the device has
    joined, to train or evaluate only. `--renew` replaces its key; the old one is valid until the new one is admitted.

    Example: ternbus edge join pi-7.toml pi-7 --task digits --partition iid:0/8
    """
    usual = (width, partition, frame_bytes, max_seconds, max_steps, hold_out) == (1, "all", None, None, None, 0)
    sums = pinned(private, helpers or [], private_min, private_roster, private_colluding, kind=private_kind)
    given = (data, seed, username, password_file, no_tls, dp, max_epsilon, processor, sums, statistics, not usual)
    _check_renew(renew, task, any(given))
    role = _next_role(run=then_run, evaluate=then_evaluate, trains=bool(reports or fine_tune), stay=stay)
    policy, limits = _policy(dp, max_epsilon, max_delta, private), TrainingLimits(seconds=max_seconds, steps=max_steps)
    home, asked = DeviceDirectory(directory), load_invitation(invitation, directory, password_file, no_tls=no_tls)
    options = Options(timeout_s=timeout, reports=reports, fine_tune=fine_tune, stays=stay)
    prepare = partial(
        home.prepare, asked, task=task and absolute(task), data=data, partition=partition, seed=seed, hold_out=hold_out,
        width=width, processor=processor, frame_bytes=frame_bytes, username=username, password_file=password_file,
        no_tls=no_tls, policy=policy, limits=limits, sums=sums, statistics=allowed(statistics, statistics_per_day),
    )  # fmt: skip
    made = partial(_task_for, task, width, processor, data, f"{partition};test:{hold_out!r}" if hold_out else partition)
    goes_on = _enroll(home, asked, made, prepare, renew=renew, role=role, options=options, as_json=as_json)
    raise typer.Exit(run_device(directory, goes_on, options, as_json=as_json))


def _enroll(
    home: DeviceDirectory,
    asked: Invitation,
    task: Callable[[], Task],
    prepare: Callable[[], Settings],
    *,
    renew: bool,
    role: Role | None,
    options: Options,
    as_json: bool,
) -> Role:
    """Join, or renew the key, unless the device has joined. The role in which it goes on; else it ends the command."""
    with json_output(as_json) as output:
        printer = Printer(as_json=as_json, output=output)
        if renew:
            _end(printer, agent.renew(home, asked, load_task(home.settings().task), options, printer), role)
        elif not (role and home.has_joined(asked)):
            model, is_new = task(), not home.folder.exists()  # before the invitation is spent
            made = [each for each in home.folder.absolute().parents if not each.exists()]
            try:
                stop = agent.join(home, prepare(), model, replace(options, trains_next=role == "train"), printer)
            except ConfigError:  # the command is to be repeated with other options
                if is_new and home.folder.exists() and not outbox.exists(home.folder):  # it has sent nothing
                    with home.locked():  # or it belongs to another process
                        home.erase(made)
                raise
            if is_new and stop.code in {EXIT_CONFIG, EXIT_REFUSED}:  # of no use: the key is not enrolled
                home.erase(made)
            _end(printer, stop, role)
    assert role is not None  # noqa: S101 - `_end` has ended the command otherwise
    return role


def _end(printer: Printer, stop: Stop, role: Role | None) -> None:
    """Print how joining ended; end the command too, unless it succeeded and the device goes on in a role."""
    if not (role and stop.code == EXIT_DONE):
        raise typer.Exit(printer.finish(stop, ended=True))
    printer.end(stop)


def _task_for(name: str, width: float, processor: str, data: Path | None, partition: str) -> Task:
    """The task. Raises `ConfigError` for what `edge run` would refuse, before the invitation is spent."""
    Partition.parse(partition)
    narrow(placed(task := load_task(name), processor), width)
    if data is not None:
        check_readable(expanded(data), "--data")
    return task


def _policy(kind: str, max_epsilon: float | None, max_delta: float, private: bool) -> PrivacyPolicy | None:
    """The privacy policy that the options ask for; None without such options."""
    if not kind and max_epsilon is None:
        return None
    if kind == SUM and not private:
        raise ConfigError(
            "--dp sum is for private sums, whose devices' draws are the noise: add --private and --helper"
        )
    if not kind:
        raise ConfigError("--max-epsilon is for differential privacy: add --dp")
    if kind in KINDS and max_epsilon is None:
        raise ConfigError(f"--dp {kind} needs the largest epsilon to spend: add --max-epsilon")
    return PrivacyPolicy(kind=kind, epsilon=max_epsilon or 0.0, delta=max_delta)


def _next_role(*, run: bool, evaluate: bool, trains: bool, stay: bool) -> Role | None:
    """What the device does after joining. Raises `ConfigError` for options that do not go together."""
    if run and evaluate:
        raise ConfigError("--run trains and --evaluate does not: leave out one of them")
    if trains and not run:
        raise ConfigError("--report-metrics and --fine-tune apply to training: add --run, or use `ternbus edge run`")
    if stay and not (run or evaluate):
        raise ConfigError("--stay applies to a device that goes on after joining: add --run or --evaluate")
    return "evaluate" if evaluate else "train" if run else None


def _check_renew(renew: bool, task: str, others: bool) -> None:
    if renew and (task or others):
        raise ConfigError(
            "--renew keeps task, data, partition, seed, login, privacy, helpers, statistics, hold-out, width, "
            "processor, frame size and limits: leave out these options"
        )
    if not renew and not task:
        raise ConfigError(f"no task is given: add --task with {TASKS}")


app.command()(rejoin)


app.command()(run)
app.command()(evaluate)
app.command()(export)


@app.command("init-model")
def init_model(
    task: Annotated[str, typer.Argument(help=f"Task: {TASKS}")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the model; the same seed gives the same model.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Make the initial model, version 0, for `ternbus aggregator init --model`.

    Example: ternbus edge init-model digits model.safetensors --seed 1
    """
    if os.path.lexists(out) and not out.is_dir() and not force:  # it may be a model that hours of training have made
        raise ConfigError(f"{out} exists already: give another name, or add --force to replace it")
    made = load_task(task)
    with explained(task):
        tensors = initial_of(made, seed)
        kinds = tensor_kinds(made, tensors)
    about = {"ternbus": f"{task}, seed {seed}", **task_plan(made).metadata(), **kinds.metadata()}
    save_safetensors(out, tensors, about)
    typer.echo(
        f"{out}: {counted(len(tensors), 'tensor')}, {sum(tensor.size for tensor in tensors.values()):,} parameters"
    )


app.command()(check)
app.command()(noise)


for _each in (inspection_commands.status, inspection_commands.trace, inspection_commands.verify):
    app.command()(_each)


@app.command()
def leave(
    directory: Dir,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for confirmation, for which a terminal is needed.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove the device here even if the broker fails.")] = False,
) -> None:
    """Leave the federation for good: clear the device's status at the broker, remove its key and its outbox.

    Example: ternbus edge leave pi-7
    """
    act_as_owner(directory)
    home = DeviceDirectory(directory)
    settings = home.settings()
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{directory} is not removed: there is no terminal to ask for confirmation; add --yes")
        typer.confirm(f"remove the key and the outbox of {settings.device!r} in {directory}?", abort=True)
    with home.locked():
        try:
            agent.clear_status(home, settings)
        except LinkError as error:
            if not force:
                raise LinkError(
                    f"{error}; the device is not removed: try again, or add --force to leave its status at the broker"
                ) from error
        home.erase()
    typer.echo(f"{settings.device} has left {settings.federation}")
