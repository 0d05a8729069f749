"""`ternbus edge …`: join a federation, train or evaluate for it, look at what a device did, and leave."""

import json
from pathlib import Path
from typing import Annotated

import typer

from broker.errors import LinkError
from broker.identity import is_exposed
from broker.invitation import Invitation
from broker.schema import save_safetensors
from edge_client import agent, outbox
from edge_client.agent import Options
from edge_client.home import Home
from edge_client.partition import Partition
from edge_client.process import become
from edge_client.progress import Printer
from edge_client.trainer import load_task

app = typer.Typer(no_args_is_help=True, help="The device: follow the model, train, send updates.")

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The device's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, a line an event, for scripts.")]
Versions = Annotated[int | None, typer.Option(min=1, help="Stop after so many versions.")]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Give up if broker, aggregator or model are waited for so long."),
]


@app.command()
def join(
    *,
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION.toml", help="From `ternbus aggregator invite`.")],
    directory: Dir,
    task: Annotated[str, typer.Option(help="digits, digits-numpy, fashion-mnist, or your own as MODULE:ATTRIBUTE.")],
    data: Annotated[Path | None, typer.Option(help="Where the task's data are, if it does not bring them.")] = None,
    partition: Annotated[
        str, typer.Option(help="Which part is this device's: all, iid:I/N or dirichlet:ALPHA:I/N:SEED.")
    ] = "all",
    username: Annotated[
        str, typer.Option(metavar="NAME", help="At a broker that others run. [default: the device's name]")
    ] = "",
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With the password in its first line; mode 0600, TLS only.")
    ] = None,
    then_run: Annotated[bool, typer.Option("--run", help="Then train, as `ternbus edge run` does.")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Become a member: make a key, enrol with the invitation's code, check that the task's model fits.

    Waits for a broker or an aggregator that is not there yet. Interrupted, it can be repeated; with `--run` also
    when the device has joined: then it only runs.

    Example: ternbus edge join pi-7.toml pi-7 --task digits --partition iid:0/8
    """
    printer = Printer(as_json=as_json)
    Partition.parse(partition)
    home, options = Home(directory), Options(timeout_s=timeout)
    asked = Invitation.load(invitation)
    if is_exposed(invitation):
        typer.echo(f"ternbus: others on this machine can read {invitation}, a secret: chmod 600 {invitation}", err=True)
    if not (then_run and home.has_joined(asked)):
        model = load_task(task)
        settings = home.prepare(
            asked, task=task, data=data, partition=partition, username=username, password_file=password_file
        )
        stop = agent.join(home, settings, model, options, printer)
        if not then_run or home.settings().code:
            raise typer.Exit(printer.finish(stop, ended=True))
        printer.end(stop)
    raise typer.Exit(become(home, "train", options, as_json=as_json))


@app.command()
def run(
    directory: Dir,
    versions: Versions = None,
    timeout: Timeout = None,
    min_seconds: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Let each training last so long, to play a slow device.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Train for the federation until Ctrl-C, SIGTERM, or its end; what has no answer yet survives in DIR.

    `--versions N` stops after N accepted updates. Exit codes: 0 done, 1 gave up waiting (or a bug in the task),
    2 mend the configuration, 3 the aggregator does not want this device.

    Example: ternbus edge run pi-7
    """
    options = Options(versions=versions, timeout_s=timeout, min_seconds=min_seconds)
    raise typer.Exit(become(Home(directory), "train", options, as_json=as_json))


@app.command()
def evaluate(directory: Dir, versions: Versions = None, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Follow the model, try the newest version on the task's test data whenever free, publish the result.

    Example: ternbus edge evaluate judge
    """
    options = Options(versions=versions, timeout_s=timeout)
    raise typer.Exit(become(Home(directory), "evaluate", options, as_json=as_json))


@app.command("init-model")
def init_model(
    task: Annotated[str, typer.Argument(help="digits, digits-numpy, fashion-mnist, or MODULE:ATTRIBUTE.")],
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
def status(directory: Dir, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What the device did and what waits for an answer; also while it runs.

    Example: ternbus edge status pi-7 --json
    """
    settings = Home(directory).settings()
    found = outbox.summary(directory)
    kept, last = found.kept, found.last
    waiting = kept.outstanding
    facts = {
        "federation": settings.federation,
        "device": settings.device,
        "key": kept.key.hex(),
        "joined": not settings.code,
        "version": kept.head_version,
        "base": kept.answered_base,
        "accepted": kept.accepted,
        "evaluated": kept.evaluated,
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
def leave(
    directory: Dir,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also if the broker cannot be told.")] = False,
) -> None:
    """Take leave: clear the device's status on the broker, and remove its key and store. This cannot be undone.

    Example: ternbus edge leave pi-7
    """
    home = Home(directory)
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
