"""`ternbus edge …`: join a federation, train or evaluate for it, look at what a device did, and leave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED
from ternbus.broker.files import is_exposed, load_toml
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_RANGE
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.learn import accountant
from ternbus.edge.learn.loader import BUILT_IN_TASKS, absolute, expanded, load_task
from ternbus.edge.learn.partition import FORMS, Partition
from ternbus.edge.learn.subnetwork import narrow
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import DEVICE, SAMPLE, PrivacyPolicy, cost
from ternbus.edge.shell import agent, log_check, outbox
from ternbus.edge.shell.agent import Options
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.preflight import check as examine
from ternbus.edge.shell.printer import Printer
from ternbus.edge.shell.process import become
from ternbus.edge.shell.service import PERSONAL

app = typer.Typer(no_args_is_help=True, help="The device: follow the model, train, send updates.")

TASKS = f"{', '.join(BUILT_IN_TASKS)}, or your own as MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE."
Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The device's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, a line an event, for scripts.")]
Versions = Annotated[int | None, typer.Option(min=1, help="Stop after so many versions.")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**63 - 1, help="As given to init-model: the same first model need not be fetched."),
]
Username = Annotated[
    str, typer.Option(metavar="NAME", help="At a broker that others run. [default: the device's name]")
]
PasswordFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="With the password in its first line; mode 0600, TLS only.")
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Give up if broker, aggregator or model are waited for so long."),
]
Renew = Annotated[
    bool, typer.Option("--renew", help="Give a device that has joined a new key; all else stays as it is.")
]
Width = Annotated[
    float, typer.Option(metavar="SHARE", help="Train only this share of each layer's channels, on a weak device.")
]
HoldOut = Annotated[
    float,
    typer.Option(metavar="SHARE", help="Never train on this share of the device's data, up to 0.4, but try on it."),
]
Reports = Annotated[
    bool,
    typer.Option(
        "--report-metrics",
        help="Tell the aggregator what versions are worth on the data held out; the broker reads it.",
    ),
]
FineTune = Annotated[
    float,
    typer.Option(
        min=0, max=1e4, metavar="EPOCHS", help="Before leaving, train a model of its own: DIR/personal.safetensors."
    ),
]

FrameBytes = Annotated[
    int,
    typer.Option(
        min=FRAME_BYTES_RANGE[0],
        max=FRAME_BYTES_RANGE[1],
        help="The largest MQTT payload that it sends; the broker's limit counts too. Larger ones: fewer parts.",
    ),
]

Dp = Annotated[str, typer.Option(metavar="KIND", help="Train only under this differential privacy: device or sample.")]
MaxEpsilon = Annotated[
    float | None, typer.Option(metavar="EPSILON", help="With --dp: stop there, whatever the plan allows.")
]
MaxDelta = Annotated[float, typer.Option(metavar="DELTA", help="With --dp: at no larger delta.")]
MaxSeconds = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Limit of one training; it stops there and sends what it has."),
]
MaxSteps = Annotated[int | None, typer.Option(metavar="N", help="Limit of one training, in steps, likewise.")]


@app.command()
def join(
    *,
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION.toml", help="From `ternbus aggregator invite`.")],
    directory: Dir,
    task: Annotated[str, typer.Option(help=f"{TASKS} Needed unless --renew.")] = "",
    data: Annotated[Path | None, typer.Option(help="Where the task's data are, if it does not bring them.")] = None,
    partition: Annotated[str, typer.Option(help=f"Which part is this device's: {FORMS}.")] = "all",
    seed: Seed = 0,
    username: Username = "",
    password_file: PasswordFile = None,
    dp: Dp = "",
    max_epsilon: MaxEpsilon = None,
    max_delta: MaxDelta = 1e-5,
    max_seconds: MaxSeconds = None,
    max_steps: MaxSteps = None,
    renew: Renew = False,
    hold_out: HoldOut = 0.0,
    width: Width = 1.0,
    frame_bytes: FrameBytes = FRAME_BYTES,
    then_run: Annotated[bool, typer.Option("--run", help="Then train, as `ternbus edge run` does.")] = False,
    reports: Reports = False,
    fine_tune: FineTune = 0.0,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Become a member: make a key, enrol with the invitation's code, check that the task's model fits.

    Waits for a broker or an aggregator that is not there yet. Interrupted, it can be repeated; with `--run` also
    when the device has joined: then it only runs.

    With `--renew` and a new invitation, a device that has joined gets a new key and keeps everything else: its data,
    what it has not sent yet, its counters. Until the new key is taken the old one stays.

    Example: ternbus edge join pi-7.toml pi-7 --task digits --partition iid:0/8
    """
    printer = Printer(as_json=as_json)
    at_its_default = (width, partition, frame_bytes, max_seconds, max_steps) == (1, "all", FRAME_BYTES, None, None)
    _check_renew(renew, task, any((data, seed, username, password_file, dp, max_epsilon, hold_out, not at_its_default)))
    _check_run(then_run, bool(reports or fine_tune))
    Partition.parse(f"{partition};test:{hold_out!r}" if hold_out else partition)
    policy, limits = _policy(dp, max_epsilon, max_delta), TrainingLimits(seconds=max_seconds, steps=max_steps)
    home, options = DeviceDirectory(directory), Options(timeout_s=timeout, reports=reports, fine_tune=fine_tune)
    asked = _load(invitation)
    if renew:
        stop = agent.renew(home, asked, load_task(home.settings().task), options, printer)
        if not then_run or stop.code != EXIT_DONE:
            raise typer.Exit(printer.finish(stop, ended=True))
        printer.end(stop)
    elif not (then_run and home.has_joined(asked)):
        narrow(model := load_task(task), width)  # a mistake is best said before
        settings = home.prepare(
            asked, task=absolute(task), data=data, partition=partition, seed=seed, hold_out=hold_out, width=width,
            frame_bytes=frame_bytes, username=username, password_file=password_file, promise=policy, limits=limits,
        )  # fmt: skip
        agent.check(settings, options)
        stop = agent.join(home, settings, model, options, printer)
        if not then_run or home.settings().code:
            raise typer.Exit(printer.finish(stop, ended=True))
        printer.end(stop)
    raise typer.Exit(become(home, "train", options, as_json=as_json))


def _policy(kind: str, max_epsilon: float | None, max_delta: float) -> PrivacyPolicy | None:
    """What the device's owner insists on; None where nothing was said."""
    if not kind and max_epsilon is None:
        return None
    return PrivacyPolicy(kind=kind, epsilon=max_epsilon or 0.0, delta=max_delta)


def _check_run(then_run: bool, others: bool) -> None:
    if others and not then_run:
        raise ConfigError("--report-metrics and --fine-tune are for training: add --run, or give them to `edge run`")


def _load(path: Path) -> Invitation:
    invitation = Invitation.from_table(load_toml(path), str(path))
    if is_exposed(path):
        typer.echo(f"ternbus: others on this machine can read {path}, a secret: chmod 600 {path}", err=True)
    return invitation


def _check_renew(renew: bool, task: str, others: bool) -> None:
    if renew and (task or others):
        raise ConfigError(
            "--renew keeps task, data, partition, seed, login, privacy and limits as they are: leave these options out"
        )
    if not renew and not task:
        raise ConfigError(f"add --task: {TASKS}")


@app.command()
def run(
    directory: Dir,
    *,
    versions: Versions = None,
    timeout: Timeout = None,
    min_seconds: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Let each training last so long, to play a slow device.")
    ] = 0.0,
    reports: Reports = False,
    fine_tune: FineTune = 0.0,
    as_json: AsJson = False,
) -> None:
    """Train for the federation until Ctrl-C, SIGTERM, or its end; what has no answer yet survives in DIR.

    `--versions N` stops after N accepted updates. `--report-metrics` and `--fine-tune EPOCHS` need data held out:
    `ternbus edge join … --hold-out 0.2`. The model of one's own, and what it gains on them, is the device's; with
    `--report-metrics` the aggregator learns the gain. Exit codes: 0 done, 1 gave up waiting (or a bug in the task),
    2 mend the configuration, 3 the aggregator does not want this device, 4 its privacy budget is spent.

    Example: ternbus edge run pi-7
    """
    options = Options(
        versions=versions, timeout_s=timeout, min_seconds=min_seconds, reports=reports, fine_tune=fine_tune
    )
    raise typer.Exit(become(DeviceDirectory(directory), "train", options, as_json=as_json))


@app.command()
def evaluate(directory: Dir, versions: Versions = None, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Follow the model, try the newest version on the task's test data whenever free, publish the result.

    Example: ternbus edge evaluate judge
    """
    options = Options(versions=versions, timeout_s=timeout)
    raise typer.Exit(become(DeviceDirectory(directory), "evaluate", options, as_json=as_json))


@app.command("init-model")
def init_model(
    task: Annotated[str, typer.Argument(help=TASKS)],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same model.")] = 0,
) -> None:
    """Make the initial model, version 0, for `ternbus aggregator init --model`.

    Example: ternbus edge init-model digits model.safetensors --seed 1
    """
    tensors = load_task(task).initial(seed)
    about = {"ternbus": f"{task}, seed {seed}"}  # one entry: several come in any order, and the file would differ
    save_safetensors(out, tensors, about)
    typer.echo(f"{out}: {len(tensors)} tensors, {sum(tensor.size for tensor in tensors.values()):,} parameters")


@app.command()
def check(
    task: Annotated[str, typer.Argument(help=TASKS)],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the task's data are.")] = None,
    partition: Annotated[str, typer.Option(help="Which part to train on, as for `join`.")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try a task without a federation: a step of training, an update there and back; say size, time, and what is wrong.

    Exit codes: 0 ready, 2 something must be mended.

    Example: ternbus edge check my_task:TASK --data data
    """
    Partition.parse(partition)
    report = examine(load_task(task), data=data and expanded(data), partition=partition)
    if as_json:
        typer.echo(json.dumps({"task": task, "ok": not report.problems, **report.facts,
                               "problems": report.problems, "notes": report.notes}))  # fmt: skip
    else:
        for line in report.lines():
            typer.echo(line)
    raise typer.Exit(EXIT_CONFIG if report.problems else EXIT_DONE)


@app.command()
def noise(
    *,
    dp: Annotated[str, typer.Option(metavar="KIND", help="device or sample, as in the plan.")],
    epsilon: Annotated[float, typer.Option(metavar="EPSILON", help="What a device may spend.")],
    updates: Annotated[int, typer.Option(min=1, metavar="N", help="How many times a device is to train.")],
    delta: Annotated[float, typer.Option(metavar="DELTA")] = 1e-5,
    samples: Annotated[int, typer.Option(min=0, help="For sample: how many a device has.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="For sample: as in the plan, and so the next two.")] = 32,
    local_epochs: Annotated[float, typer.Option(min=0)] = 1.0,
    local_steps: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Say the least noise, the plan's `dp_noise`, with which a device can train so many times within an epsilon.

    Example: ternbus edge noise --dp sample --epsilon 8 --updates 20 --samples 5000 --batch-size 1000 --local-steps 5
    """
    if dp not in (DEVICE, SAMPLE) or not epsilon > 0 or not 0 < delta < 1 or (dp == SAMPLE) != bool(samples):
        raise ConfigError(
            "noise takes --dp device or sample, --epsilon above 0, --delta between 0 and 1, and for sample --samples"
        )
    plan = Plan(
        dp=dp, dp_clip=1, dp_noise=1, dp_epsilon=epsilon,
        batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps,
    )  # fmt: skip
    one = cost(plan, samples)
    least = accountant.noise(replace(one, steps=updates * one.steps), epsilon, delta)
    typer.echo(f"dp_noise = {least:g}")


@app.command()
def status(directory: Dir, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What the device did and what waits for an answer; also while it runs.

    Example: ternbus edge status pi-7 --json
    """
    settings = DeviceDirectory(directory).settings()
    found = outbox.summary(directory)
    kept, last = found.kept, found.last
    waiting = kept.outstanding
    facts = {
        "federation": settings.federation,
        "device": settings.device,
        "key": kept.key.hex(),
        "joined": not settings.code,
        "version": kept.head_version,
        "digest": kept.head_digest.hex(),
        "base": kept.answered_base,
        "accepted": kept.accepted,
        "evaluated": kept.evaluated,
        "epsilon": kept.account.epsilon,
        "delta": kept.account.delta,
        "hold_out": settings.hold_out or None,
        "width": settings.width or None,
        "max_seconds": settings.limits.seconds,
        "max_steps": settings.limits.steps,
        "personal": str(directory / PERSONAL) if (directory / PERSONAL).exists() else None,
        "outstanding": None
        if waiting is None
        else {"seq": waiting.seq, "base": waiting.base, "bytes": len(waiting.body)},
        "receipt": None if last is None else {"seq": last.seq, "base": last.base, "outcome": last.outcome},
        "counters": dict(sorted(found.counters.items())),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        for line, shown in value.items() if name == "counters" and isinstance(value, dict) else [(name, value)]:
            typer.echo(f"{line:28} {'-' if shown is None else shown}")


@app.command()
def verify(
    directory: Dir,
    log: Annotated[
        Path, typer.Argument(metavar="LOG", exists=True, dir_okay=False, help="From `ternbus aggregator log export`.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check by the aggregator's log of merges that every update it accepted from here went into a version, once.

    The log itself is checked first, with the key from the invitation, and against the newest head that this device has
    seen. Exit code 1 if anything is not as the aggregator promised.

    Example: ternbus edge verify pi-7 lab.log
    """
    settings = DeviceDirectory(directory).joined()
    found = log_check.check(log, settings, outbox.summary(directory).kept, outbox.answers(directory))
    typer.echo(json.dumps(found.facts()) if as_json else found.report(settings.device))
    if found.faults:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def leave(
    directory: Dir,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also if the broker cannot be told.")] = False,
) -> None:
    """Take leave: clear the device's status on the broker, and remove its key and store. This cannot be undone.

    Example: ternbus edge leave pi-7
    """
    home = DeviceDirectory(directory)
    settings = home.settings()
    if not yes:
        typer.confirm(f"remove the key of {settings.device!r}, and the update that waits in {directory}?", abort=True)
    with home.held():
        try:
            agent.say_goodbye(home, settings)
        except LinkError as error:
            if not force:
                raise LinkError(f"{error}; with --force it is removed from here only") from error
        home.erase()
    typer.echo(f"{settings.device} has left {settings.federation}")
