"""`ternbus doctor` for a broker's directory, and for the certificates in any other one."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ternbus.broker import checkup
from ternbus.broker.checkup import Result, error, failed, ok, warning
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import is_locked
from ternbus.broker.link.connect_errors import CANNOT_SERVE
from ternbus.broker.link.tls import CA, CERTIFICATE
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.endpoint import WILDCARDS, Endpoint
from ternbus.broker.server import mosquitto, refusals
from ternbus.broker.server.full_disk import FullDisk
from ternbus.broker.server.running import ACCESS, LOG, answers, choose

if TYPE_CHECKING:
    from ternbus.broker.server.directory import BrokerDirectory

CERTIFICATE_DAYS: Final = 30.0
CLIENT_RENEWAL: Final = (  # its authority is elsewhere, and need not be one of Ternbus
    "ask the broker's operator for a renewed file and put it in this one's place; of a Ternbus broker `ternbus broker "
    "renew` makes it, on the broker's machine"
)


def examine(directory: Path) -> Iterator[Result]:
    """All checks of a broker with TLS; nothing in the directory is changed."""
    try:
        from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

        home = BrokerDirectory(directory.absolute())
        settings, found = home.settings(), home.certificates()
    except ConfigError as problem:
        yield failed("settings", str(problem))
        return
    yield ok("settings", f"{home.url}, listening on {settings.listen}, engine {settings.engine}")
    yield from checkup.secrets(directory / "tls" / name for name in ("ca.key", "server.key", "probe.key"))
    named = {directory / file: each.name for file, each in found.items()}
    yield from certificates(named, f"ternbus broker renew {quoted(directory)}")
    yield _access(directory, mosquitto.separating_list(home.names()))
    yield from _running(directory, home)
    yield from _refusals(directory)


def of_client(directory: Path) -> Iterator[Result]:
    """The certificates of a device, a helper or an aggregator; nothing where there are none."""
    names = {directory / CA: "the authority", directory / CERTIFICATE: "this client"}
    yield from certificates({path: name for path, name in names.items() if path.exists()}, CLIENT_RENEWAL)


def certificates(files: dict[Path, str], renewal: str) -> Iterator[Result]:
    """How long these certificates are valid; ``renewal`` says what to do about it."""
    if not files:
        return
    try:
        from ternbus.broker.server.certificates import now, read  # noqa: PLC0415 - a library that only few need

        left = {path: read(path.read_text(), str(path)).days_left(now()) for path in files}
    except ConfigError as problem:
        yield (
            warning("certificates", *str(problem).split("; ", 1)) if "; " in str(problem) else failed("", str(problem))
        )
        return
    for path, days in left.items():
        if days < CERTIFICATE_DAYS:
            text = f"{path} ({files[path]}) {'has expired' if days <= 0 else f'expires in {days:.0f} days'}"
            yield (error if days <= 0 else warning)("certificates", text, renewal)
    if min(left.values()) >= CERTIFICATE_DAYS:
        yield ok("certificates", f"{len(left)}, the first expires in {min(left.values()):.0f} days")


def _access(directory: Path, wanted: str) -> Result:
    path = directory / ACCESS
    if not path.exists() or path.read_text() == wanted:
        return ok("access", "the access list has all clients with a certificate, each with its own topics")
    text = f"{path} is not that of the certificates"
    return warning("access", text, f"restart it: ternbus broker up {quoted(directory)}")


def _running(directory: Path, home: "BrokerDirectory") -> Iterator[Result]:
    settings = home.settings()
    try:
        yield ok("software", str(choose(settings.engine)))
        secured = home.secured()
    except ConfigError as problem:
        yield failed("software", str(problem))
        return
    if not is_locked(directory / "lock"):
        yield error("broker", "it does not run", f"ternbus broker up {quoted(directory)}")
        return
    endpoint = Endpoint(host=WILDCARDS.get(settings.listen, settings.listen), port=settings.port, tls=True)
    if answers(endpoint, secured):
        yield ok("broker", f"it answers on {home.url}")
    else:
        yield error("broker", f"it runs and does not answer on {home.url}", CANNOT_SERVE)
    if FullDisk(log=directory / LOG).is_seen():
        yield error("disk", "the broker's log says that it could not store messages", "free some space, restart it")


def _refusals(directory: Path) -> Iterator[Result]:
    """Whom the broker has refused today (UTC)."""
    try:
        rows = json.loads((directory / refusals.FILE).read_text(encoding="utf-8"))["refused"]
        today = time.strftime("%Y-%m-%d", time.gmtime())
        recent = sorted({row["client"] for row in rows if row["last"].startswith(today)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if recent:
        text = f"refused today: {', '.join(recent[:3])}{' and others' if len(recent) > 3 else ''}"
        yield warning("refusals", text, f"ternbus broker refusals {quoted(directory)}")
