"""A broker's directory as `broker init` makes it: what it is called, its authority, and what that has signed."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Self

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import load_toml, read_secret, replacing, write_secret
from ternbus.broker.link.tls import PROBE, ServerTls, Tls
from ternbus.broker.protocol.endpoint import Endpoint, is_loopback
from ternbus.broker.protocol.identity import AGGREGATOR, check_device, check_federation
from ternbus.broker.server import certificates, mosquitto
from ternbus.broker.server.certificates import Authority, Named, Pair
from ternbus.broker.server.running import ACCESS, HOME, Engine, Secured, is_home, reserve

FOLDER: Final = "tls"
ISSUED: Final = "issued"
RENEW_SERVER_DAYS: Final = 60
RENEW_CLIENT_DAYS: Final = 365
RENEW_AUTHORITY_DAYS: Final = 3 * 365


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """broker.toml."""

    names: tuple[str, ...]  # under which devices reach it, the first in invitations
    listen: str
    port: int
    engine: Engine = Engine.AUTO

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("a broker needs a name: the host name or address by which devices reach it")
        for name in self.names:
            certificates.check_host(name)
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is none: use 1 to 65535")

    @classmethod
    def from_table(cls, table: dict[str, Any], source: str) -> Self:
        """Check a table as TOML gives it; ConfigError names ``source``."""
        try:
            names, listen, port, engine = (table.pop(key) for key in ("names", "listen", "port", "engine"))
            if not isinstance(names, list) or not isinstance(port, int) or table:
                raise TypeError("names must be a list, port a number, and nothing else be there")  # noqa: TRY301
            return cls(names=tuple(map(str, names)), listen=str(listen), port=port, engine=Engine(engine))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{source} cannot be read: {error}") from error

    def dumps(self) -> str:
        """The TOML file's text."""
        comments = {
            (): "A Ternbus broker. After a change of names: ternbus broker renew DIR",
            ("names",): "how devices reach it; the first is in invitations",
            ("engine",): "auto, mosquitto or nats",
        }
        return toml.dumps(asdict(self), comments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client needs to connect, as PEM text: whom to believe, and who it is."""

    authority: str
    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class BrokerDirectory:
    """The directory of a broker with TLS."""

    folder: Path

    @classmethod
    def create(
        cls, folder: Path, *, names: Sequence[str], port: int, engine: Engine = Engine.AUTO, listen: str | None = None
    ) -> Self:
        """Make it: settings, an authority, the broker's certificate. Port 0 is a free one, for good."""
        folder = folder.absolute()
        if (folder / FOLDER).exists() or is_home(folder):
            raise ConfigError(f"{folder} holds a broker already; choose another directory")
        listen = listen or _listen_for(names)
        settings = Settings(names=tuple(names), listen=listen, port=port or reserve(listen, 0), engine=engine)
        authority = Authority.create(f"Ternbus broker {settings.names[0]}"[:64])
        home = cls(folder)
        try:
            (folder / FOLDER / ISSUED).mkdir(parents=True, mode=0o700)
            folder.chmod(0o700)
            home._write("ca", authority.pair)
            home._write("server", authority.server(settings.names))
            home._write("probe", authority.client(PROBE, ""))
            (folder / HOME).write_text(settings.dumps(), encoding="utf-8")  # last: with it the directory is whole
        except OSError as error:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
        return home

    def settings(self) -> Settings:
        """ConfigError where the directory is not such a broker's."""
        if not is_home(self.folder):
            raise ConfigError(
                f"{self.folder} holds no broker with TLS; make one with: ternbus broker init {self.folder}"
            )
        path = self.folder / HOME
        return Settings.from_table(load_toml(path), str(path))

    @property
    def url(self) -> str:
        settings = self.settings()
        return str(Endpoint(host=settings.names[0], port=settings.port, tls=True))

    @property
    def files(self) -> ServerTls:
        return ServerTls(
            authority=self._path("ca.pem"), certificate=self._path("server.pem"), key=self._path("server.key")
        )

    def secured(self) -> Secured:
        """What the broker is started with. ConfigError where a key is open to others."""
        files = self.files
        for name in ("ca.key", "server.key", "probe.key"):
            read_secret(self._path(name))
        probe = Tls(ca=files.authority, certificate=self._path("probe.pem"), key=self._path("probe.key"))
        return Secured(files=files, name=self.settings().names[0], probe=probe, names=self.names())

    def issue(self, name: str, federation: str) -> Credentials:
        """A certificate with a new key for a device, or for the federation's aggregator; in force at once."""
        check_federation(federation)
        if name != f"{AGGREGATOR}-{federation}":
            check_device(name)
        path = self._path(ISSUED, f"{name}.pem")
        if path.exists() and (other := self._read(path).federation) != federation:
            raise ConfigError(f"{name!r} is in federation {other!r} on this broker already; choose another name")
        authority = self._authority()
        pair = authority.client(name, federation)
        _replace(path, pair.certificate)
        self.write_access()
        return Credentials(authority=authority.pair.certificate, certificate=pair.certificate, key=pair.key)

    def issued(self, name: str) -> Path:
        """Where the newest certificate of a client is; no secret."""
        return self._path(ISSUED, f"{name}.pem")

    def names(self) -> dict[str, list[str]]:
        """Who has a certificate, by federation."""
        found: dict[str, list[str]] = {}
        for named in self._clients().values():
            found.setdefault(named.federation, []).append(named.name)
        return found

    def certificates(self) -> dict[str, Named]:
        """Every certificate in force, by its file's place in the directory."""
        own = [self._path(f"{name}.pem") for name in ("ca", "server")]
        found = {path: self._read(path) for path in own} | self._clients()
        return {str(path.relative_to(self.folder)): named for path, named in found.items()}

    def renew(self, *, everything: bool = False) -> list[Path]:
        """Renew the broker's certificate, and what else is near its end or ``everything``; the files that changed."""
        now = certificates.now()
        changed = self._renew_authority(now)
        self._write("server", self._authority().server(self.settings().names))
        self._write("probe", self._authority().client(PROBE, ""))
        changed.append(self._path("server.pem"))
        for path, named in self._clients().items():
            if everything or named.days_left(now) < RENEW_CLIENT_DAYS:
                _replace(path, self._authority().client_again(path.read_text()))
                changed.append(path)
        return changed

    def renew_if_due(self) -> bool:
        """Renew the broker's own certificate if it nears its end, so that nobody has to think of it."""
        if self._read(self._path("server.pem")).days_left(certificates.now()) > RENEW_SERVER_DAYS:
            return False
        self.renew()
        return True

    def _renew_authority(self, now: datetime) -> list[Path]:
        path = self._path("ca.pem")
        if self._read(path).days_left(now) > RENEW_AUTHORITY_DAYS:
            return []
        self._write("ca", self._authority().renewed().pair)
        return [path]

    def _authority(self) -> Authority:
        key = read_secret(self._path("ca.key")).decode("ascii", "replace")
        return Authority(Pair(certificate=self._path("ca.pem").read_text(), key=key))

    def _clients(self) -> dict[Path, Named]:
        return {path: self._read(path) for path in sorted(self._path(ISSUED).glob("*.pem"))}

    def write_access(self) -> None:
        """The access list, if it has changed; a running mosquitto is told of it by whoever runs it."""
        path, text = self.folder / ACCESS, mosquitto.separating_list(self.names())
        if not path.exists() or path.read_text() != text:
            _replace(path, text)

    def _write(self, name: str, pair: Pair) -> None:
        write_secret(self._path(f"{name}.key"), pair.key.encode())
        _replace(self._path(f"{name}.pem"), pair.certificate)

    def _read(self, path: Path) -> Named:
        return certificates.read(path.read_text(encoding="utf-8", errors="replace"), str(path))

    def _path(self, *names: str) -> Path:
        return self.folder.joinpath(FOLDER, *names)


def _replace(path: Path, text: str) -> None:
    with replacing(path, concurrent=True) as partial:  # several aggregators may invite at once
        partial.write_text(text, encoding="utf-8")


def _listen_for(names: Sequence[str]) -> str:
    """On all addresses, since a name of this machine may lead to another than devices use; unless it is its own."""
    first = names[0] if names else ""
    if is_loopback(first):
        return first
    try:
        return "::" if ip_address(first).version == 6 else "0.0.0.0"  # noqa: S104 - nobody comes in without a certificate
    except ValueError:
        return "0.0.0.0"  # noqa: S104 - as above
