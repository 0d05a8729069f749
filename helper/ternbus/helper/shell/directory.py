"""A helper's directory: its key, helper.toml, card.toml, certificates, database and lock."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import (
    check_secret,
    expanded,
    fault,
    is_locked,
    load_toml,
    lock,
    read_key,
    storing,
    write_key,
    write_secret,
    write_text,
)
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY, Tls
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.identity import Identity, check_federation, check_helper, is_public_key
from ternbus.broker.protocol.invitation import Invitation, check_broker_url
from ternbus.broker.sums import bfv
from ternbus.broker.sums.terms import BFV, KINDS, MASK, ROSTERS
from ternbus.broker.sums.words import DEVICES_MAX
from ternbus.helper.store.tables import ASIDE, FILE

KEY: Final = "helper.key"
BFV_KEY: Final = "bfv.key"
TOML: Final = "helper.toml"
CARD: Final = "card.toml"
LOCK: Final = "lock"
YES: Final = "yes"
ABOUT: Final = """\
A Ternbus helper of private sums. Its key is in helper.key, its box keys and all that it has opened in helper.db.
Never restore helper.db from a backup: run `ternbus helper restored DIR` instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of helper.toml."""

    federation: str  # its name
    helper: str  # its name
    broker: str  # its URL
    roster: str  # who says which devices there are: own (`ternbus helper admit`) or aggregator
    min: int  # smallest number of devices in a sum that this helper opens
    aggregator_key: str = ""  # 64 hex digits; empty until the invitation
    username: str = ""  # at the broker; empty for aggregator_help_NAME
    password_file: str = ""  # with the broker's password in its first line, mode 0600
    no_tls: str = ""  # "yes" if the password may be sent unencrypted, on a network where you trust everyone
    kind: str = MASK  # of the sums that it opens: mask, or bfv
    code: str = field(default="", repr=False)  # of the invitation, until the helper has enrolled

    def __post_init__(self) -> None:
        check_federation(self.federation)
        check_helper(self.helper)
        check_broker_url(self.broker)
        if self.no_tls not in {"", YES}:
            raise ConfigError(f'no_tls is {self.no_tls!r}: give "{YES}", or leave it out')
        if self.password_file:
            Endpoint.parse(self.broker).check_password(no_tls=self.may_lack_tls, switch=f'no_tls = "{YES}" in {TOML}')
        if self.kind not in KINDS:
            raise ConfigError(f"kind = {self.kind!r}: write one of {', '.join(KINDS)}")
        if self.roster not in ROSTERS:
            raise ConfigError(f"roster is {self.roster!r}: use one of {', '.join(ROSTERS)}")
        if not 2 <= self.min <= DEVICES_MAX:
            raise ConfigError(f"min is {self.min}: use a number of devices from 2 to {DEVICES_MAX}")
        if self.aggregator_key and not is_public_key(self.aggregator_key):
            raise ConfigError("aggregator_key is not 64 hex digits: take it from an invitation")

    @property
    def password_path(self) -> Path | None:
        return expanded(Path(self.password_file)) if self.password_file else None

    @property
    def may_lack_tls(self) -> bool:
        """Whether the owner has said that the password may be sent unencrypted."""
        return self.no_tls == YES

    @classmethod
    def from_table(cls, table: Mapping[str, Any], source: str) -> Self:
        """Check the table of a TOML file. Raises `ConfigError` with ``source`` and the key."""
        kinds = {entry.name: int if entry.name == "min" else str for entry in fields(cls)}
        for name, value in table.items():
            if type(value) is not kinds.get(name):
                raise ConfigError(f"{source}: {name!r} is not a setting of a helper, or not of its type: correct it")
        if missing := {"federation", "helper", "broker", "roster", "min"} - set(table):
            raise ConfigError(f"{source} lacks {min(missing)!r}: add it, or make another helper")
        try:
            return cls(**table)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    def dumps(self) -> str:
        """The TOML file's text."""
        comments = {
            (): ABOUT,
            ("roster",): "who says which devices there are: own (`ternbus helper admit`) or aggregator",
            ("min",): "smallest number of devices in a sum that this helper opens",
            ("kind",): "mask, or bfv: only where all parties follow the protocol; it stays as it was made",
        }
        table = {name: value for name, value in asdict(self).items() if value and (name, value) != ("kind", MASK)}
        return toml.dumps(table, comments)

    def invited(self, invitation: Invitation) -> Self:
        """With what an invitation gives. Raises `ConfigError` if it is for another helper."""
        if (invitation.federation, invitation.device) != (self.federation, self.helper):
            raise ConfigError(
                f"the invitation is for {invitation.device} in {invitation.federation}, and this is helper "
                f"{self.helper} in {self.federation}: ask for one with `ternbus aggregator invite AGG --helper "
                f"{self.helper}`"
            )
        key = self.aggregator_key.lower()
        if key not in {"", invitation.aggregator_key.lower()}:
            raise ConfigError(
                "the invitation is from an aggregator with another key than this helper serves; if that is right, "
                "make another helper for it"
            )
        # no way back without the owner
        allowed = "" if Endpoint.parse(invitation.broker).tls else self.no_tls
        made = replace(self, broker=invitation.broker, no_tls=allowed)
        return replace(made, aggregator_key=invitation.aggregator_key, code=invitation.code)


@dataclass(frozen=True, slots=True)
class HelperDirectory:
    """The directory of one helper."""

    folder: Path

    @property
    def quoted(self) -> str:
        """The folder as a shell takes it, for the commands in errors."""
        return quoted(self.folder)

    @property
    def exists(self) -> bool:
        return (self.folder / TOML).exists()

    @property
    def is_running(self) -> bool:
        """Whether a process holds the directory."""
        return is_locked(self.folder / LOCK)

    def settings(self) -> Settings:
        """The settings. Raises `ConfigError` if there are none, or they are invalid."""
        path = self.folder / TOML
        if not self.exists:
            raise ConfigError(
                f"{path} does not exist: make a helper with `ternbus helper init {self.quoted} --federation NAME "
                "--broker URL`"
            )
        return Settings.from_table(load_toml(check_secret(path)), str(path))

    def identity(self) -> Identity:
        return Identity(read_key(self.folder / KEY))

    def bfv_key(self, settings: Settings) -> bfv.SecretKey | None:
        """The key that decrypts sums; None for a helper that opens masks. Raises `ConfigError` if it is missing."""
        if settings.kind != BFV:
            return None
        path = self.folder / BFV_KEY
        if not path.exists():
            raise ConfigError(f"{path} is missing, and nothing else opens these sums: make another helper")
        with storing(path):
            key = bfv.SecretKey(check_secret(path).read_bytes())
        key.check()
        return key

    def tls(self) -> Tls | None:
        return Tls.in_folder(self.folder)

    def make(self, kind: str = MASK) -> Identity:
        """The folder and the helper's keys; what an interrupted `init` made is used again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise fault(error, self.folder, "cannot create ") from error
        if not (self.folder / KEY).exists():
            write_key(self.folder / KEY, Identity.generate().seed)
        if kind == BFV and not (self.folder / BFV_KEY).exists():
            write_secret(self.folder / BFV_KEY, bfv.SecretKey.generate().content)
        return self.identity()

    def write(self, settings: Settings) -> None:
        write_secret(self.folder / TOML, settings.dumps().encode())

    def write_card(self, settings: Settings) -> Path:
        """The file that the aggregator's operator gets; nothing in it is secret."""
        about = "A Ternbus helper, for: ternbus aggregator init … --private --helper card.toml"
        key = self.identity().public.hex()
        table = {"name": settings.helper, "federation": settings.federation, "key": key}
        table |= {"kind": settings.kind} if settings.kind != MASK else {}
        write_text(self.folder / CARD, toml.dumps(table, {(): about}))
        return self.folder / CARD

    def write_certificates(self, invitation: Invitation) -> None:
        for name, pem in ((CA, invitation.ca), (CERTIFICATE, invitation.certificate), (TLS_KEY, invitation.key)):
            if pem is not None:
                write_secret(self.folder / name, pem.encode())

    def move_database_aside(self) -> Path:
        """Move a damaged database away; returns where it is."""
        number = 1
        while (aside := self.folder / f"{ASIDE}{number}").exists():
            number += 1
        aside.mkdir(mode=0o700)
        for path in self.folder.glob(f"{FILE}*"):
            shutil.move(path, aside / path.name)
        return aside

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory: two processes would each forget what the other one opened. Raises `ConfigError`."""
        with storing(self.folder / LOCK):
            taken = lock(self.folder / LOCK)
        if taken is None:
            raise ConfigError(f"another `ternbus helper` process runs in {self.folder}: stop it first")
        with taken:
            yield
