"""The broker and the aggregator of a first federation, created and run by one command."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import lost_ledger, membership, swapping
from ternbus.aggregator.store.ledger import LEDGER, reading
from ternbus.aggregator.store.remedy import BROKER
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import write_secret
from ternbus.broker.log_levels import ERROR
from ternbus.broker.log_output import WriteLog
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.endpoint import PORTS, Endpoint, is_loopback, is_same_host
from ternbus.broker.protocol.identity import check_device, check_federation
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.server import running

INVITATIONS: Final = "invitations"
FEDERATION: Final = "home"  # its name, where none is given
HOST: Final = "127.0.0.1"  # likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """What a directory that holds no aggregator yet is made from; None: not said."""

    model: Path | None
    federation: str | None = None
    host: str | None = None
    port: int | None = None  # 0: a free one
    tls: bool | None = None

    @property
    def name(self) -> str:
        """The federation's."""
        return FEDERATION if self.federation is None else self.federation

    @property
    def address(self) -> str:
        """The broker's host."""
        return HOST if self.host is None else self.host

    @property
    def is_secured(self) -> bool:
        """Whether the broker has TLS: else where other machines reach it."""
        return not is_loopback(self.address) if self.tls is None else self.tls

    @property
    def listens_at(self) -> int:
        """The broker's port."""
        return PORTS["mqtts" if self.is_secured else "mqtt"] if self.port is None else self.port

    def check(self, directory: Path, settings: Settings, endpoint: Endpoint) -> None:
        """Raise ConfigError where a directory that holds an aggregator has another federation or broker."""
        host = endpoint.host if self.host is None or is_same_host(self.host, endpoint.host) else self.host
        said = [
            ("--federation", self.federation, settings.federation),
            ("--host", host, endpoint.host),
            ("--port", self.port or None, endpoint.port),
            ("--tls" if self.tls else "--no-tls", self.tls, endpoint.tls),
        ]
        for option, wanted, found in said:
            if wanted is not None and wanted != found:
                raise ConfigError(
                    f"{directory} holds the federation {settings.federation} with the broker {endpoint} already, and "
                    f"{option} is for the first start: leave it out"
                )


def check_names(first: First, devices: Sequence[str], evaluators: Sequence[str]) -> None:
    """Raise ConfigError for a name that cannot be, before anything is made."""
    check_federation(first.name)
    for name in (*devices, *evaluators):
        check_device(name)
    if both := sorted(set(devices) & set(evaluators)):
        raise ConfigError(f"{both[0]} cannot be a device and an evaluator: use two names")


def start_broker(directory: Path, engine: running.Engine, first: First) -> running.RunningBroker:
    """The broker that this directory's federation has, or the one that its first start chooses."""
    swapping.check(directory)  # or a new federation would be begun
    if lost_ledger.is_lost(directory / LEDGER):
        raise lost_ledger.missing(directory / LEDGER)
    folder = directory / BROKER
    host, port = first.address, first.listens_at
    if (directory / LEDGER).exists():
        settings = administration.load_settings(directory)
        endpoint = Endpoint.parse(settings.broker)
        first.check(directory, settings, endpoint)
        host, port = endpoint.host, endpoint.port
        if endpoint.tls and not running.is_home(folder):
            raise ConfigError(
                f"{directory} does not hold the broker {endpoint}: use ternbus aggregator run {quoted(directory)}"
            )
    elif first.model is None:
        raise ConfigError(f"{directory} holds no aggregator yet: add --model FILE.safetensors to make one")
    else:
        administration.FirstModel.load(first.model)  # or nothing is made
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if running.is_home(folder) or (first.is_secured and not (directory / LEDGER).exists()):
        return _start_secured(directory, engine, first)
    remedy = running.CHOOSE
    if (directory / LEDGER).exists():
        remedy = (
            f"end what uses it, or change `broker` in {directory / administration.TOML} and each device's edge.toml"
        )
    return running.start(running.choose(engine), host=host, port=port, directory=folder, remedy=remedy)


def _start_secured(directory: Path, engine: running.Engine, first: First) -> running.RunningBroker:
    """Start a broker with TLS, which knows the aggregator from its first moment."""
    from ternbus.broker.server import tls_service  # noqa: PLC0415 - certificates take a library that only few need
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - likewise

    folder = (directory / BROKER).absolute()
    running.choose(engine)  # or nothing is made
    if not running.is_home(folder):
        BrokerDirectory.create(folder, names=[first.address], port=first.listens_at, engine=engine)
    broker = BrokerDirectory(folder)
    if not (directory / LEDGER).exists():
        _create(directory, first, broker.url, {"transport.authority": BROKER})
    return tls_service.start(broker, engine)


def _create(directory: Path, first: First, broker_url: str, settings: Mapping[str, object]) -> None:
    assert first.model is not None  # noqa: S101 - start_broker has looked
    found = administration.FirstModel.load(first.model)
    administration.create(
        directory,
        federation=first.name,
        broker=broker_url,
        model=found.tensors,
        settings={**settings, **PlanCheck.settings(found.plan)},
        kinds=found.kinds,
    )


def prepare(
    directory: Path, first: First, broker_url: str, devices: Sequence[str], evaluators: Sequence[str] = ()
) -> list[Path]:
    """Make the aggregator if there is none; invite those who are not known. Returns new files."""
    if not (directory / LEDGER).exists():
        _create(directory, first, broker_url, {})
    with administration.exclusive(directory):
        pass  # to invite takes a ledger of today's format
    known = _known(directory)
    new, judges = ([name for name in names if name not in known] for names in (devices, evaluators))
    folder = directory / INVITATIONS
    folder.mkdir(exist_ok=True, mode=0o700)
    invitations = administration.invite(directory, *new, evaluators=judges)
    return [write_invitation(folder, invitation) for invitation in invitations]


def write_invitation(folder: Path, invitation: Invitation) -> Path:
    """FOLDER/DEVICE.toml, for its owner's eyes only."""
    path = folder / f"{invitation.device}.toml"
    write_secret(path, invitation.dumps().encode())
    return path


def _known(directory: Path) -> set[str]:
    with reading(directory) as ledger:
        return membership.known(ledger.db, time.time())


def watch(broker: running.RunningBroker, stop: Callable[[], None], say: WriteLog) -> list[int]:
    """Call ``stop`` when the broker ends before we end it; its exit code is then in the list that is returned.

    ``say`` is called, in a thread, when the broker's disk is full.
    """
    ended: list[int] = []

    def wait() -> None:
        ended.append(broker.wait(lambda text: say(text, level=ERROR, event="broker-disk")))
        stop()

    threading.Thread(target=wait, name="broker", daemon=True).start()
    return ended
