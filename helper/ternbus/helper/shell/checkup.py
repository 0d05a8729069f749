"""`ternbus doctor` for a helper's directory."""

from collections.abc import Iterator
from pathlib import Path

from ternbus.broker import checkup
from ternbus.broker.checkup import Result, error, failed, ok, warning
from ternbus.broker.errors import FederationError
from ternbus.broker.link.probe import reach
from ternbus.broker.link.tls import TLS_KEY
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.messages import Status
from ternbus.helper.shell import process
from ternbus.helper.shell.directory import KEY, TOML, HelperDirectory
from ternbus.helper.store import store


def is_home(directory: Path) -> bool:
    return (directory / TOML).exists()


def examine(directory: Path) -> Iterator[Result]:
    """All checks; nothing is changed, and a running helper is not disturbed."""
    home = HelperDirectory(directory)
    yield from checkup.secrets(directory / name for name in (KEY, TOML, TLS_KEY))
    try:
        settings, found = home.settings(), store.summary(directory)
        home.identity()
    except FederationError as problem:
        yield failed("settings", str(problem))
        return
    yield ok("settings", f"helper {settings.helper} of {settings.federation}, devices on the roster: {found.devices}")
    if found.state.is_behind:
        yield error("database", "it is an older copy", f"ternbus helper restored {home.quoted}")
    if not settings.aggregator_key:
        yield warning(
            "joined", "there is no invitation yet", f"ternbus aggregator invite AGG --helper {settings.helper}"
        )
        return
    if home.is_running:
        yield ok("process", f"it runs; broker {found.facts.get('broker', 'connected')}")
        return
    yield error("process", "no process runs", f"ternbus helper run {home.quoted}")
    topic = topics.help_of(settings.federation, settings.helper, Status.KIND)
    yield from reach(process.link_maker(home, settings), topic)
