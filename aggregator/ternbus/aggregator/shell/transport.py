"""The aggregator's access to its broker, by certificate or password, and the part of it in invitations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ternbus.aggregator.settings import Settings
from ternbus.aggregator.transport_settings import TransportSettings
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import expanded, read_password, read_secret, storing, write_secret
from ternbus.broker.link.link import Link, LinkEvent
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY, Tls
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.identity import AGGREGATOR

if TYPE_CHECKING:
    from ternbus.broker.server.directory import BrokerDirectory

FILES: Final = (CA, CERTIFICATE, TLS_KEY)
RECEIVE_MAXIMUM: Final = 256  # unacknowledged messages in flight to us: this bounds what waits in memory, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """PEM text for one client: whom to believe, and, where the broker wants to know, who it is."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)
    folder: Path | None = None  # that they are from


def client_name(federation: str) -> str:
    return f"{AGGREGATOR}-{federation}"


def equip(directory: Path, settings: Settings, given: Credentials | None, home: Path) -> None:
    """Write the aggregator's credentials into its directory: those given, or issued by its broker's authority."""
    name = client_name(settings.federation)
    if given is not None:
        if not Endpoint.parse(settings.broker).tls:
            raise ConfigError(f"certificates given for {settings.broker}, a URL without TLS: use mqtts://")
        _check_owner(given, name, settings.federation)
    credentials = given or _issued(settings, name, home)
    for file, pem in ((CA, credentials.ca), (CERTIFICATE, credentials.certificate), (TLS_KEY, credentials.key)):
        if pem is not None:
            write_secret(directory / file, pem.encode())


def for_device(directory: Path, settings: Settings, device: str, certificates: Path | None) -> Credentials:
    """A device's credentials; without an authority and a folder only the broker's CA, if there is one."""
    if certificates is not None:
        found = in_folder(certificates / device)
        _check_owner(found, device, settings.federation)
        return found
    if settings.transport.authority:
        return _issued(settings, device, directory)
    if (directory / CERTIFICATE).exists():
        raise ConfigError(
            f"the broker requires a certificate of {device}: ask its operator for one and add --certificates FOLDER"
        )
    return Credentials(ca=(directory / CA).read_text() if (directory / CA).exists() else None)


def connect(
    directory: Path,
    settings: Settings,
    deliver: Callable[[LinkEvent], None],
    transport: TransportSettings | None = None,
) -> Link:
    """A link to the broker, not connected yet. ``transport`` goes before what the settings say."""
    access = transport or settings.transport
    _refresh(directory, settings)
    return Link(
        settings.broker,
        client_id=client_name(settings.federation),
        deliver=deliver,
        frame_bytes=settings.limits.frame_bytes,
        receive_maximum=RECEIVE_MAXIMUM,
        qos_1_below=f"{topics.root(settings.federation)}/",
        username=access.username or client_name(settings.federation),
        password=read_password(directory / expanded(Path(access.password_file))) if access.password_file else None,
        no_tls=access.no_tls,
        tls=Tls.in_folder(directory),
    )


def _refresh(directory: Path, settings: Settings) -> None:
    """Take up what `broker renew` has renewed, if it is over the key that we have."""
    if not settings.transport.authority:
        return
    authority = _authority(settings, directory)
    newest = Tls(
        ca=authority.files.authority,
        certificate=authority.issued(client_name(settings.federation)),
        key=directory / TLS_KEY,
    )
    newest.context()
    for ours, theirs in ((CA, newest.ca), (CERTIFICATE, newest.certificate)):
        if theirs is not None and theirs.read_bytes() != (directory / ours).read_bytes():
            write_secret(directory / ours, theirs.read_bytes())


def in_folder(folder: Path) -> Credentials:
    """Those that `ternbus broker certificate` made. ConfigError where there are none, or this user cannot read them."""
    with storing(folder):
        ca, certificate, key = (_text(folder / each) if (folder / each).exists() else None for each in FILES)
    if ca is None and certificate is None:
        raise ConfigError(f"{folder} has neither {CA} nor {CERTIFICATE}; `ternbus broker certificate` makes both")
    for name, pem in ((CA, ca), (CERTIFICATE, certificate)):
        # root may read here, for another user who will have a copy, what a link of that user's points to
        if pem is not None and ("CERTIFICATE-----" not in pem or "PRIVATE KEY" in pem):
            raise ConfigError(
                f"{folder / name} is no certificate in PEM: name a folder of `ternbus broker certificate`"
            )
    return Credentials(ca=ca, certificate=certificate, key=key, folder=folder)


def _issued(settings: Settings, name: str, home: Path) -> Credentials:
    if settings.transport.authority:
        issued = _authority(settings, home).issue(name, settings.federation)
        return Credentials(ca=issued.authority, certificate=issued.certificate, key=issued.key)
    return Credentials()


def _check_owner(given: Credentials, name: str, federation: str) -> None:
    """ConfigError for a certificate of somebody else; what another authority than ours writes into one is not known."""
    if given.certificate is None:
        return
    try:
        from ternbus.broker.server import certificates  # noqa: PLC0415 - a library that only few need
    except ConfigError:  # it is not installed: nothing can be said
        return
    found = certificates.read(given.certificate, f"{given.folder}/{CERTIFICATE}")
    is_ours = found.issuer.startswith(f"{certificates.AUTHORITY} ")  # whatever else is in its ca.pem
    if is_ours and (found.name, found.federation) != (name, federation):
        raise ConfigError(
            f"{given.folder} has the certificate of {found.name} in federation {found.federation}, not that of {name} "
            f"in {federation}: name its folder, or have `ternbus broker certificate` make one"
        )


def _text(path: Path) -> str:
    secret = read_secret(path) if path.name == TLS_KEY else path.read_bytes()
    return secret.decode("ascii", "replace")


def _authority(settings: Settings, directory: Path) -> "BrokerDirectory":
    from ternbus.broker.server.directory import BrokerDirectory  # noqa: PLC0415 - certificates take a library that only few need

    home = BrokerDirectory(directory / expanded(Path(settings.transport.authority)))
    home.settings()
    return home
