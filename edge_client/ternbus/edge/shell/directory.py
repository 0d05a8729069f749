"""A device's folder: its key, edge.toml, and who holds it; made by `join`, emptied by `leave`."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import check_secret, load_toml, lock, read_key, write_key, write_secret
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY, Tls
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_RANGE
from ternbus.broker.protocol.identity import Identity, check_device, check_federation, is_public_key
from ternbus.broker.protocol.invitation import Invitation, check_broker_url
from ternbus.edge.learn.loader import expanded
from ternbus.edge.learn.partition import Partition
from ternbus.edge.learn.subnetwork import check_width
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.shell.outbox import FILE as OUTBOX

KEY: Final = "device.key"
TOML: Final = "edge.toml"
LOCK: Final = "lock"
BESIDE: Final = "renewal"  # where a new key is enrolled


def check_frame_bytes(text: str) -> None:
    """Raises `ConfigError` for a limit in which no frame fits, or which no MQTT packet can reach."""
    low, high = FRAME_BYTES_RANGE
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise ConfigError(f"edge.toml: frame_bytes is {text!r}, but must be a number within {low} and {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """edge.toml: where the federation is, and what this device trains."""

    federation: str
    device: str
    broker: str
    aggregator_key: str  # 64 hex digits
    task: str  # as `--task` takes it; one's own with the folder of its module, /home/pi/my_task:TASK
    data: str = ""  # a folder; empty where the task brings its own data
    partition: str = "all"
    hold_out: str = ""  # the share of its data that is never trained on
    width: str = ""  # the share of each layer's channels that it trains; empty for all
    seed: str = ""  # of the task's initial model
    username: str = ""  # at a broker that others run; else the device's name
    password_file: str = ""
    frame_bytes: str = ""  # the largest MQTT payload that it sends; empty for the protocol's 120 KiB
    dp: str = ""  # the kind of differential privacy without which this device does not train; see docs/privacy.md
    max_epsilon: str = ""
    max_delta: str = ""
    max_seconds: str = ""  # of one training; empty for as long as the plan says
    max_steps: str = ""
    code: str = field(default="", repr=False)  # the invitation's, until the device has joined

    def __post_init__(self) -> None:
        check_federation(self.federation)
        _ = self.promise, self.limits  # both refuse nonsense
        check_device(self.device)
        check_broker_url(self.broker)
        if self.seed and not (self.seed.isascii() and self.seed.isdecimal()):
            raise ConfigError(f"edge.toml: seed is {self.seed!r}, not a number; it is that of `edge init-model`")
        if self.frame_bytes:
            check_frame_bytes(self.frame_bytes)
        if self.hold_out:
            Partition.parse(f"all;test:{self.hold_out}")
        try:
            check_width(self.share_of_channels)
        except ValueError:
            raise ConfigError(f"edge.toml: width is {self.width!r}, not a number") from None

    @property
    def share_of_channels(self) -> float:
        return float(self.width or 1)

    @property
    def frame_limit(self) -> int:
        return int(self.frame_bytes or FRAME_BYTES)

    @property
    def promise(self) -> PrivacyPolicy | None:
        """What the owner insists on. Raises `ConfigError` for what is no number, or no kind of privacy."""
        if not (self.dp or self.max_epsilon or self.max_delta):
            return None
        try:
            return PrivacyPolicy(kind=self.dp, epsilon=float(self.max_epsilon), delta=float(self.max_delta))
        except ValueError:
            raise ConfigError("edge.toml: dp needs numbers for max_epsilon and max_delta beside it") from None

    @property
    def limits(self) -> TrainingLimits:
        """Of one training, by the owner. Raises `ConfigError` for what is no number."""
        try:
            seconds = float(self.max_seconds) if self.max_seconds else None
            return TrainingLimits(seconds=seconds, steps=int(self.max_steps) if self.max_steps else None)
        except ValueError:
            raise ConfigError("edge.toml: max_seconds must be a number, max_steps a whole number") from None

    @property
    def data_folder(self) -> Path | None:
        return expanded(Path(self.data)) if self.data else None

    @property
    def password_path(self) -> Path | None:
        return Path(self.password_file) if self.password_file else None

    @classmethod
    def from_table(cls, table: Mapping[str, Any], source: str) -> Self:
        """Check a table as TOML gives it; ConfigError names ``source`` and the key."""
        known = {entry.name for entry in fields(cls)}
        wrong = [name for name, value in table.items() if name not in known or not isinstance(value, str)]
        if wrong:
            raise ConfigError(f"{source} has {wrong[0]!r}, which is no setting of a device, or no string")
        missing = {"federation", "device", "broker", "aggregator_key", "task"} - set(table)
        if missing:
            raise ConfigError(f"{source} lacks {min(missing)!r}; run `ternbus edge join` again")
        settings = cls(**table)
        if not is_public_key(settings.aggregator_key):
            raise ConfigError(f"{source}: aggregator_key is not 64 hex digits; copy it from the invitation")
        return settings

    def dumps(self) -> str:
        """The TOML file's text."""
        about = "A Ternbus device. What it keeps is in outbox.db, its key in device.key."
        return toml.dumps({name: value for name, value in asdict(self).items() if value}, {(): about})


@dataclass(frozen=True, slots=True)
class DeviceDirectory:
    """The folder of one device."""

    folder: Path

    def beside(self) -> "DeviceDirectory":
        """Where this device's next key is enrolled."""
        return DeviceDirectory(self.folder / BESIDE)

    def exists(self) -> bool:
        return (self.folder / TOML).exists()

    def discard(self) -> None:
        """Remove the folder: at once it is no device's, in the end there is nothing left of it."""
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone)

    def settings(self) -> Settings:
        """ConfigError where the folder is not a device's."""
        path = self.folder / TOML
        if not path.exists():
            raise ConfigError(
                f"{self.folder} has not joined a federation: run `ternbus edge join INVITATION {self.folder}`"
            )
        return Settings.from_table(load_toml(check_secret(path)), str(path))

    def joined(self) -> Settings:
        """The settings of a device whose `join` came to its end."""
        settings = self.settings()
        if settings.code:
            raise ConfigError(f"{self.folder} has not finished joining; run `ternbus edge join` again")
        return settings

    def has_joined(self, invitation: Invitation) -> bool:
        """Whether `join` with an invitation of this federation and device came to its end here."""
        if not (self.folder / TOML).exists():
            return False
        settings = self.settings()
        same = (settings.federation, settings.device) == (invitation.federation, invitation.device)
        return same and not settings.code

    def identity(self) -> Identity:
        return Identity(read_key(self.folder / KEY))

    def tls(self) -> Tls | None:
        return Tls.in_folder(self.folder)

    def prepare(
        self,
        invitation: Invitation,
        *,
        task: str,
        data: Path | None,
        partition: str,
        seed: int = 0,
        hold_out: float = 0.0,
        width: float = 1.0,
        frame_bytes: int = FRAME_BYTES,
        username: str = "",
        password_file: Path | None = None,
        promise: PrivacyPolicy | None = None,
        limits: TrainingLimits | None = None,
    ) -> Settings:
        """Write what `join` needs; what an interrupted one left is used again, its key above all.

        Not so under another code: the broker may still hold the answer to the last one, for the last key.
        """
        before = self.settings().code if (self.folder / TOML).exists() else None
        if before == "":
            raise ConfigError(
                f"{self.folder} has joined already; choose another folder, or `ternbus edge leave` it first"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot make {self.folder}: {error.strerror}") from error
        settings = Settings(
            federation=invitation.federation,
            device=invitation.device,
            broker=invitation.broker,
            aggregator_key=invitation.aggregator_key,
            task=task,
            data=str(expanded(data).resolve()) if data is not None else "",
            partition=partition,
            width=repr(width) if width != 1 else "",
            hold_out=repr(hold_out) if hold_out else "",
            seed=str(seed) if seed else "",
            frame_bytes=str(frame_bytes) if frame_bytes != FRAME_BYTES else "",
            username=username,
            password_file=str(password_file.resolve()) if password_file is not None else "",
            dp=promise.kind if promise is not None else "",
            max_epsilon=str(promise.epsilon) if promise is not None else "",
            max_delta=str(promise.delta) if promise is not None else "",
            max_seconds=repr(limits.seconds) if limits is not None and limits.seconds is not None else "",
            max_steps=str(limits.steps) if limits is not None and limits.steps is not None else "",
            code=invitation.code,
        )
        if before not in {None, invitation.code} or not (self.folder / KEY).exists():
            write_key(self.folder / KEY, Identity.generate().seed)
        for name, pem in ((CA, invitation.ca), (CERTIFICATE, invitation.certificate), (TLS_KEY, invitation.key)):
            if pem is not None:
                write_secret(self.folder / name, pem.encode())
        self.write(settings)
        return settings

    def write(self, settings: Settings) -> None:
        write_secret(self.folder / TOML, settings.dumps().encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time: two would use each other's sequence numbers."""
        try:
            held = lock(self.folder / LOCK)
        except OSError as error:
            raise ConfigError(f"cannot use {self.folder}: {error.strerror}") from error
        if held is None:
            raise ConfigError(f"another `ternbus edge` runs in {self.folder}; stop it first")
        with held:
            yield

    def erase(self) -> None:
        """Remove key, settings and store, and the folder if nothing else is in it."""
        for folder in (self.folder / BESIDE, self.folder / f"{BESIDE}.gone"):
            shutil.rmtree(folder, ignore_errors=True)
        names = [KEY, TOML, CA, CERTIFICATE, TLS_KEY, OUTBOX, f"{OUTBOX}-wal", f"{OUTBOX}-shm", LOCK]
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
