"""The status and health of an aggregator at one moment, read from its directory, also without a process."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.core.health import Health, examine
from ternbus.aggregator.core.health_view import Certificate, DeviceView, View
from ternbus.aggregator.core.registry import ACTIVE
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import answers, control, private_status, status
from ternbus.aggregator.store.ledger import reading
from ternbus.aggregator.store.remedy import BROKER, start_command
from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.files import expanded
from ternbus.broker.link.tls import CA, CERTIFICATE
from ternbus.broker.path_errors import quoted
from ternbus.broker.server.full_disk import ROOM_BYTES
from ternbus.broker.server.running import is_home

INTERVALS: Final = 20  # versions whose times say what is usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """``found`` is the status as JSON values; ``fault`` is why the running process did not answer."""

    found: dict[str, Any]
    health: Health
    fault: str = ""


def look(directory: Path, versions_max: int | None = None) -> Examination:
    """Have a running process write down what it knows, then read everything; ConfigError where there is nothing."""
    settings, fault = administration.load_settings(directory), ""
    try:
        administration.flush_counts(directory)
    except FederationError as error:
        fault = str(error)
    running = control.is_running(directory)
    with reading(directory) as ledger:
        found = status.read_ledger(ledger, versions_max)
        told = answers.last_situation(ledger.db)
        buffer_devices = sum(row["waits"] for row in found["devices"].values())
    found |= private_status.read(directory, settings)
    moments = [row["time"] for row in found["versions"][-INTERVALS:]]
    claim, broker = found["claim"], broker_folder(directory, settings)
    view = View(
        now=time.time(),
        federation=found["federation"],
        directory=quoted(directory),
        start=start_command(directory),
        state=found["state"],
        version=found["version"],
        running=running,
        answers=not fault,
        situation=None if told is None or fault else told[1],
        made_at=moments[-1] if moments else 0.0,
        intervals_s=tuple(later - earlier for earlier, later in pairwise(moments)),
        buffer=found["buffer"],
        buffer_devices=buffer_devices,
        **_private(found, settings),
        max_wait_s=settings.merge.max_wait_s,
        disk_free=found["disk"]["free"],
        broker="BROKER" if broker is None else quoted(broker),
        broker_disk_full=_is_full(broker),
        certificates=certificates_of(directory, settings),
        devices=tuple(_device(name, row) for name, row in found["devices"].items() if row["key_state"] == ACTIVE),
        evaluated={name: row["evaluated"] for name, row in found["devices"].items() if row["evaluated"] is not None},
        claim=None if claim is None else (claim["device"], claim["version"]),
        **canary_of(found, settings),
    )
    health = examine(view)
    return Examination(found={"health": health.as_json(), **found}, health=health, fault=fault)


def _device(name: str, row: Mapping[str, Any]) -> DeviceView:
    answer = row["answer"] or {"outcome": "", "reason": ""}
    moments = [at for at in (row["seen_at"], row["evaluated_at"]) if at is not None]
    return DeviceView(
        name=name,
        state=row["state"],
        evaluates=row["evaluates"],
        joined_at=row["joined_at"],
        seen_at=max(moments, default=None),
        failing=row["failing"] or "",
        outcome=answer["outcome"],
        reason=answer["reason"],
        refused_in_a_row=row["in_a_row"],
        updates=row["updates"],
        loss=row["loss"],
        cloned=bool(row["cloned"]),
        waits=row["waits"],
    )


def _private(found: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Of how many devices a version is; of private sums, for which helpers they wait, and why the newest were lost."""
    private = found.get("private")
    if private is None:
        return {"min_devices": settings.min_devices}
    waits = {name: row["waits_for"] for name, row in private["helpers"].items() if row["waits_for"]}
    if private["terms"] is not None:
        away = [name for name, row in private["helpers"].items() if row["state"] == "offline"]
        waits = dict.fromkeys(away, "it is offline; its operator starts it: ternbus helper run")
    return {
        "min_devices": private["min"],
        "min_key": "private.min",
        "waits_for_helpers": waits,
        "dropped": private["refused"] or "",
    }


def canary_of(found: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The group, the candidate and who has reported on it, and how many before it were withdrawn."""
    if not settings.canary.group:
        return {}
    about, withdrawn = found["candidate"] or {"version": None, "reports": {}}, 0
    for row, before in pairwise(reversed(found["versions"])):
        if row["updates"] or before["version"] != row["version"] - 1:  # after a rollback there is a gap
            break
        withdrawn += 1
    return {
        "group": settings.canary.group,
        "candidate": about["version"],
        "reports": frozenset(about["reports"]),
        "withdrawn": withdrawn,
    }


def broker_folder(directory: Path, settings: Settings) -> Path | None:
    """The directory of the federation's broker, where it is on this machine."""
    if settings.transport.authority:
        return directory / expanded(Path(settings.transport.authority))
    folder = directory / BROKER  # of `aggregator up` without TLS
    return folder if folder.is_dir() else None


def _is_full(folder: Path | None) -> bool:
    try:
        return folder is not None and shutil.disk_usage(folder).free < ROOM_BYTES
    except OSError:  # another user's
        return False


def certificates_of(directory: Path, settings: Settings) -> tuple[Certificate, ...]:
    """The aggregator's certificate, the authority's, and the broker's where it is on this machine."""
    named = {"the aggregator": directory / CERTIFICATE, "the authority": directory / CA}
    folder = broker_folder(directory, settings)
    if folder is not None and is_home(folder):
        named["the broker"] = folder / "tls" / "server.pem"
    present = {name: path for name, path in named.items() if path.exists()}
    if not present:
        return ()
    try:
        from ternbus.broker.server import certificates  # noqa: PLC0415 - a library that only few need
    except ConfigError:  # it is not installed: nothing can be said
        return ()
    now = certificates.now()
    return tuple(
        Certificate(name=name, days_left=certificates.read(path.read_text(), str(path)).days_left(now))
        for name, path in present.items()
    )
