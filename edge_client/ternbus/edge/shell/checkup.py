"""`ternbus doctor` for a device's directory."""

from collections.abc import Iterator
from pathlib import Path

from ternbus.broker import checkup
from ternbus.broker.checkup import Result, error, failed, ok, warning
from ternbus.broker.errors import FederationError
from ternbus.broker.files import is_locked
from ternbus.broker.link.probe import reach
from ternbus.broker.link.tls import TLS_KEY
from ternbus.broker.path_errors import quoted
from ternbus.broker.plural import counted
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.messages import Status
from ternbus.edge.shell import agent
from ternbus.edge.shell.directory import KEY, LOCK, TOML, DeviceDirectory
from ternbus.edge.store import outbox


def is_home(directory: Path) -> bool:
    return (directory / TOML).exists()


def examine(directory: Path) -> Iterator[Result]:
    """All checks; nothing is changed, and a running device is not disturbed."""
    home = DeviceDirectory(directory)
    yield from checkup.secrets(directory / name for name in (KEY, TOML, TLS_KEY))
    try:
        settings = home.settings()
        home.identity()
    except FederationError as problem:
        yield failed("settings", str(problem))
        return
    yield ok("settings", f"device {settings.device} of {settings.federation}, task {settings.task}")
    if settings.data_folder is not None and not settings.data_folder.is_dir():
        yield error("data", f"{settings.data_folder} is no folder", f"put the data back, or change data in {TOML}")
    if settings.code:
        command = f"ternbus edge join INVITATION.toml {quoted(directory)}"
        yield warning("joined", "the device has not joined yet", command)
    else:
        yield from _outbox(directory)
    if is_locked(directory / LOCK):
        yield ok("process", "a process runs; its log says whether it is connected")
        return
    yield warning("process", "no process runs", f"ternbus edge run {quoted(directory)}")
    yield from reach(agent.make_link(home, settings), topics.up(settings.federation, settings.device, Status.KIND))


def _outbox(directory: Path) -> Iterator[Result]:
    try:
        found = outbox.summary(directory)
    except FederationError as problem:
        yield failed("outbox", str(problem))
        return
    yield ok("outbox", f"{counted(found.state.accepted, 'update')} accepted, version {found.state.head_version} seen")
    if found.is_cloned:
        yield error("clone", "another machine uses this device's key", "stop both, and join each by a name of its own")
    if found.state.refusal:
        yield error(
            "plan",
            f"the device does not train: {found.state.refusal}",
            "ask the operator for another plan, or change what its owner demands in edge.toml",
        )
    if found.last is not None and found.last.outcome in {"stale", "invalid", "revoked", "refused"}:
        text = f"the last update, on version {found.last.base}, was {found.last.outcome}"
        yield warning("answer", text, "ask the aggregator's operator: ternbus aggregator status AGG")
