"""The directory of a broker with TLS: broker.toml, the certificate authority and the certificates it issued."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Self

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import fault, load_toml, read_secret, replacing, write_secret, write_text
from ternbus.broker.link.tls import PROBE, ServerTls, Tls
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.endpoint import Endpoint, is_loopback
from ternbus.broker.protocol.identity import (
    AGGREGATOR,
    check_device,
    check_federation,
    check_reader,
    is_helper_user,
    is_reader_user,
    reader_user,
)
from ternbus.broker.server import certificates, mosquitto
from ternbus.broker.server.certificates import AUTHORITY, Authority, Named, Pair
from ternbus.broker.server.running import ACCESS, HOME, Engine, Secured, is_home, reserve

FOLDER: Final = "tls"
ISSUED: Final = "issued"
RENEW_SERVER_DAYS: Final = 60
RENEW_CLIENT_DAYS: Final = 365
RENEW_AUTHORITY_DAYS: Final = 3 * 365


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings in broker.toml."""

    names: tuple[str, ...]  # host names or addresses for clients; invitations contain the first
    listen: str  # address to listen on
    port: int  # to listen on
    engine: Engine = Engine.AUTO  # broker software: auto, mosquitto or nats

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("no broker name: give the host name or address that devices connect to, with --name HOST")
        for name in self.names:
            certificates.check_host(name)
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"invalid port {self.port}: use 1 to 65535")

    @classmethod
    def from_table(cls, table: dict[str, Any], source: str) -> Self:
        """Check a parsed TOML table; ConfigError names ``source``."""
        try:
            names, listen, port, engine = (table.pop(key) for key in ("names", "listen", "port", "engine"))
            if not isinstance(names, list) or not isinstance(port, int) or table:
                raise TypeError("names must be a list, port a number, and there must be no other keys")  # noqa: TRY301 - as the constructors below do
            return cls(names=tuple(map(str, names)), listen=str(listen), port=port, engine=Engine(engine))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{source} cannot be read: {error}") from error

    def dumps(self) -> str:
        """The TOML file's text."""
        comments = {
            (): "Settings of a Ternbus broker. After a change of names, run: ternbus broker renew DIR",
            ("names",): "host names or addresses for devices; invitations contain the first",
            ("listen",): "address to listen on",
            ("engine",): "broker software: auto, mosquitto or nats",
        }
        return toml.dumps(asdict(self), comments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The PEM texts that a client needs to connect: the authority's certificate, its own certificate and key."""

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
        """Make the directory: broker.toml, an authority, the broker's certificate. Port 0 chooses a free port for good.

        ConfigError if the directory already contains a broker or cannot be written.
        """
        folder = folder.absolute()
        if (folder / FOLDER).exists() or is_home(folder):
            raise ConfigError(f"{folder} already contains a broker; choose another directory")
        listen = listen or _listen_for(names)
        settings = Settings(names=tuple(names), listen=listen, port=port or reserve(listen, 0), engine=engine)
        authority = Authority.create(f"{AUTHORITY} {settings.names[0]}"[:64])
        home = cls(folder)
        try:
            (folder / FOLDER / ISSUED).mkdir(parents=True, mode=0o700)
            folder.chmod(0o700)
            home._write("ca", authority.pair)
            home._write("server", authority.server(settings.names))
            home._write("probe", authority.client(PROBE, ""))
            write_text(folder / HOME, settings.dumps())  # last: it marks the directory as complete
        except OSError as error:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            raise fault(error, folder, f"cannot make {folder}: ") from error
        return home

    def settings(self) -> Settings:
        """The settings in broker.toml; ConfigError if the directory has none or they are invalid."""
        if not is_home(self.folder):
            command = f"ternbus broker init {quoted(self.folder)} --name HOST"
            raise ConfigError(f"{self.folder} has no broker with TLS; make one with: {command}")
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
        """The certificates and names that the broker is started with; ConfigError if other users can read a key."""
        files = self.files
        for name in ("ca.key", "server.key", "probe.key"):
            read_secret(self._path(name))
        probe = Tls(ca=files.authority, certificate=self._path("probe.pem"), key=self._path("probe.key"))
        return Secured(files=files, name=self.settings().names[0], probe=probe, names=self.names())

    def issue(self, name: str, federation: str) -> Credentials:
        """A certificate with a new key for a device, helper, reader or the aggregator; a running broker accepts it.

        ConfigError for an invalid name, or one that another federation uses on this broker.
        """
        check_federation(federation)
        if name != f"{AGGREGATOR}-{federation}" and not (is_helper_user(name) or is_reader_user(name)):
            check_device(name)
        path = self._path(ISSUED, f"{name}.pem")
        if path.exists() and (other := self._read(path).federation) != federation:
            raise ConfigError(f"{name!r} is already in federation {other!r} on this broker; choose another name")
        authority = self._authority()
        pair = authority.client(name, federation)
        _replace(path, pair.certificate)
        self.write_access()
        return Credentials(authority=authority.pair.certificate, certificate=pair.certificate, key=pair.key)

    def admit(self, reader: str, federation: str | None) -> tuple[Credentials, str]:
        """A certificate for a reader of a federation, by default of the only one on this broker, and that one's name.

        ConfigError if there are several, or none.
        """
        known = sorted(self.names())
        if federation is None and len(known) != 1:
            which = f"it has {', '.join(known)}" if known else "make one with: ternbus aggregator init"
            raise ConfigError(f"which federation on {self.folder}? Add --federation NAME; {which}")
        chosen = known[0] if federation is None else federation
        if chosen not in known:
            raise ConfigError(f"{self.folder} has no federation {chosen!r}; it has {', '.join(known) or 'none'}")
        return self.issue(reader_user(check_reader(reader)), chosen), chosen

    def issued(self, name: str) -> Path:
        """The path of a client's newest certificate, which is not secret."""
        return self._path(ISSUED, f"{name}.pem")

    def names(self) -> dict[str, list[str]]:
        """The names of all clients with a certificate, by federation."""
        found: dict[str, list[str]] = {}
        for named in self._clients().values():
            found.setdefault(named.federation, []).append(named.name)
        return found

    def certificates(self) -> dict[str, Named]:
        """All certificates of the authority, the broker and its clients, by path relative to the directory."""
        own = [self._path(f"{name}.pem") for name in ("ca", "server")]
        found = {path: self._read(path) for path in own} | self._clients()
        return {str(path.relative_to(self.folder)): named for path, named in found.items()}

    def renew(self, *, everything: bool = False) -> list[Path]:
        """Renew the broker's certificate, and those of clients that expire soon (or all); return the changed files."""
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
        """Renew the broker's certificate if it expires within 60 days; return whether it was renewed."""
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
        """Write the access list if it has changed; `tls_service` lets a running mosquitto reload it."""
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
    with replacing(path, concurrent=True) as partial:  # several aggregators may invite at the same time
        write_text(partial, text)


def _listen_for(names: Sequence[str]) -> str:
    """The address to listen on: loopback if the first name is loopback, else all addresses of its family.

    Not the address of the name itself: this machine may resolve the name to another address than devices do.
    """
    first = names[0] if names else ""
    if is_loopback(first):
        return first
    try:
        return "::" if ip_address(first).version == 6 else "0.0.0.0"  # noqa: S104 - every client needs a certificate
    except ValueError:
        return "0.0.0.0"  # noqa: S104 - as above
