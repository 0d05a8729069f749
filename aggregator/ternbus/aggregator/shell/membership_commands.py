"""The commands `ternbus aggregator invite`, `invitations` and `revoke`."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ternbus.aggregator.core.registry import EVALUATOR, HELPER
from ternbus.aggregator.shell import administration, backup, quickstart
from ternbus.aggregator.shell.arguments import AsJson, Dir, DirAsRoot, ExpiresIn, InvitedHelpers
from ternbus.aggregator.shell.health_text import moment
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import blaming
from ternbus.broker.errors import ConfigError, StorageError
from ternbus.broker.files import make_folder
from ternbus.broker.text_table import text_table
from ternbus.broker.version import software

NEWCOMERS: Final = {EVALUATOR: "a new evaluator", HELPER: "a helper"}
UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


def invite(
    directory: DirAsRoot,
    devices: Annotated[
        list[str] | None,
        typer.Argument(metavar="DEVICE", help="Names of devices: a-z, 0-9, '_', '-'; at most 64 characters."),
    ] = None,
    *,
    evaluators: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluator",
            metavar="NAME",
            help="Evaluator to invite: it publishes test metrics, no updates; repeatable.",
        ),
    ] = None,
    helpers: InvitedHelpers = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder to write; each device gets FOLDER/DEVICE.toml. [default: standard output]"
        ),
    ] = None,
    certificates: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of the devices' certificates, from `ternbus broker certificate --out`."
        ),
    ] = None,
    expires_in: ExpiresIn = None,
) -> None:
    """Invite devices, evaluators and helpers. An invitation is secret: its holder can join under that name, once.

    Only a member that was invited with --evaluator can publish test metrics, and it sends no updates. A device that
    joined already gets a new key: `ternbus edge join --renew`; it keeps its role unless --evaluator names it. An
    earlier open invitation of the device becomes void. A helper of private sums is named in aggregator.toml with its
    key, and joins under this key only: `ternbus helper init DIR --invitation FILE`. If `ternbus broker init`
    made the broker on this machine, the invitation carries a new certificate.

    Example: ternbus aggregator invite agg pi-1 pi-2 --evaluator judge --expires-in 12h --out invitations
    """
    devices, evaluators, helpers = devices or [], evaluators or [], helpers or []
    _check_names(devices, evaluators, helpers)
    _warn_of_helpers(directory, devices)
    expires_in_s = None if expires_in is None else seconds(expires_in)
    if out is None and len([*devices, *evaluators, *helpers]) > 1:
        raise ConfigError("several invitations need a folder: add --out FOLDER")
    if out is not None:
        make_folder(out)
    for invitation in administration.invite(
        directory,
        *devices,
        evaluators=evaluators,
        helpers=helpers,
        certificates=certificates,
        expires_in_s=expires_in_s,
    ):
        if out is None:
            typer.echo(invitation.dumps(), nl=False)
        else:
            typer.echo(str(quickstart.write_invitation(out, invitation)))


def _check_names(devices: Sequence[str], evaluators: Sequence[str], helpers: Sequence[str]) -> None:
    if not devices and not evaluators and not helpers:
        raise ConfigError("nobody to invite: give the name of a DEVICE, --evaluator NAME or --helper NAME")
    if same := sorted(set(helpers) & {*devices, *evaluators}):
        raise ConfigError(f"{same[0]} is named as a helper and as a device: invite them by two commands")
    if both := sorted(set(devices) & set(evaluators)):
        raise ConfigError(f"{both[0]} cannot be a device and an evaluator: use two names")


def _warn_of_helpers(directory: Path, devices: Sequence[str]) -> None:
    """Say which devices have a helper's name: both may have one name, and the option is easily forgotten."""
    private = administration.load_settings(directory).private
    for name in sorted(set(devices) & set(private.helpers if private else ())):
        typer.echo(f"ternbus: this invites a device {name}; for the helper of that name use --helper {name}", err=True)


def seconds(text: str) -> float:
    """A duration such as `12h`, in seconds; ConfigError for a text that is none."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text)
    if found is None or not 0 < (seconds := float(found[1]) * UNITS[found[2]]) <= 1e9:
        raise ConfigError(f"invalid --expires-in {text}: write a number and a unit, for example 30m, 12h, 7d or 2w")
    return seconds


def invitations(
    directory: Dir,
    cancel: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Device or helper whose invitation is cancelled at once; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the open invitations, without their codes. `--cancel NAME` first cancels the invitation of a device, or of
    a helper if no device of that name has one.

    Example: ternbus aggregator invitations agg --cancel pi-7
    """
    administration.load_settings(directory)
    for device in cancel or ():
        administration.cancel(directory, device, software())
    with blaming(directory):
        found = statuses.invitations(directory, time.time())
        typer.echo(json.dumps(found) if as_json else "\n".join(_invitations(found)))


def _invitations(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for row in found:
        made, ends = (moment(row[name])[:-3] for name in ("made_at", "expires_at"))  # to the minute
        newcomer = NEWCOMERS.get(row["role"], "a new device")
        purpose = newcomer if row["key_state"] is None else f"a new key ({row['key_state']} now)"
        if row["role"] == HELPER and row["key_state"] is not None:
            purpose = "a helper, again under its key"
        rows.append((row["device"], row["state"], made, ends, purpose))
    return text_table(dict.fromkeys(("device", "state", "made", "ends", "for"), "<"), rows)


def revoke(
    directory: Dir,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of a device that joined.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Reason; the device is told, and it is kept.")] = "",
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Still merge the device's accepted updates. [default: those not merged yet are dropped]"
        ),
    ] = False,
) -> None:
    """Revoke a device: its key is void for good. The aggregator may run; the command ends when it is done.

    Its next message is answered `revoked`, and the device stops. Merged updates stay merged. The device returns only
    with a new invitation and a new key. Its certificate stays valid at the broker: see docs/security.md.

    Example: ternbus aggregator revoke agg pi-7 --reason "stolen on 3 May"
    """
    dropped, faults = put_out(directory, device, why=reason, keep=keep)
    typer.echo(f"{device} is revoked; {dropped} of its accepted updates will not be merged")
    if faults:
        raise StorageError(f"{device} is revoked all the same, but {faults}")


def put_out(directory: Path, device: str, *, why: str, keep: bool) -> tuple[int, str]:
    """Revoke a device; how many of its updates were dropped, and what hindered copies of the list of revoked keys."""
    dropped = administration.revoke(directory, device, software(), why=why, keep=keep)
    faults = backup.spread_revocations(directory, administration.load_settings(directory).federation)
    copied = f"{backup.NOT_COPIED}{'; '.join(faults)}; the next revocation or backup copies it" if faults else ""
    return dropped, copied
