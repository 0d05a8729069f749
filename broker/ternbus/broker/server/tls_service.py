"""Start a broker with TLS from its directory; reload changed files and renew its certificate while it runs."""

import logging
import threading
import time
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.server import running
from ternbus.broker.server.directory import BrokerDirectory
from ternbus.broker.server.running import ACCESS, Engine, RunningBroker

LOOK_EVERY_S: Final = 0.5
RENEW_EVERY_S: Final = 3600.0

_log = logging.getLogger(__name__)


def start(home: BrokerDirectory, engine: Engine = Engine.AUTO) -> RunningBroker:
    """Start the broker and a thread that maintains it. ``engine`` overrides broker.toml, unless it is ``AUTO``.

    Raises the errors of `running.start`.
    """
    settings = home.settings()
    home.renew_if_due()
    broker = running.start(
        running.choose(settings.engine if engine is Engine.AUTO else engine),
        host=settings.listen,
        port=settings.port,
        directory=home.folder,
        secured=home.secured(),
    )
    maintenance = _Maintenance(broker, home)
    home.write_access()  # with the certificates that were issued during the start
    threading.Thread(target=maintenance.run, name="maintenance of the broker", daemon=True).start()
    return broker


class _Maintenance:
    def __init__(self, broker: RunningBroker, home: BrokerDirectory) -> None:
        self._broker = broker
        self._home = home
        self._files = [home.files.certificate]
        if broker.software.engine is Engine.MOSQUITTO:  # nats-server has the authorization service instead of a list
            self._files.append(home.folder / ACCESS)
        self._seen = self._moments()

    def run(self) -> None:
        renew_at = time.monotonic() + RENEW_EVERY_S
        while self._broker.process.poll() is None:
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() > renew_at:
                renew_at += RENEW_EVERY_S
                self._renew()
            if (found := self._moments()) != self._seen:
                self._seen = found
                self._broker.reload()

    def _renew(self) -> None:
        try:
            self._home.renew_if_due()
        except (ConfigError, OSError) as error:
            _log.warning("cannot renew the broker's certificate: %s", error)

    def _moments(self) -> list[int]:
        """The modification times of the files that the broker has loaded; 0 for a missing file."""
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in self._files]
