"""A device's directory: its key, edge.toml, certificates and lock. `join` creates it, `leave` empties it."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from ternbus.broker import toml
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import (
    check_secret,
    expanded,
    fault,
    load_toml,
    lock,
    read_key,
    storing,
    write_key,
    write_secret,
)
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY, Tls
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol.arms import WIDTH_MIN
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_RANGE
from ternbus.broker.protocol.identity import Identity, check_device, check_federation, is_public_key
from ternbus.broker.protocol.invitation import Invitation, check_broker_url
from ternbus.broker.store_format import copies
from ternbus.broker.sums.terms import AGGREGATOR, MASK
from ternbus.edge.learn.partition_spec import Partition
from ternbus.edge.learn.subnetwork import check_width
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.shell.statistics_limit import check_setting
from ternbus.edge.store.outbox import FILE as OUTBOX

KEY: Final = "device.key"
TOML: Final = "edge.toml"
LOCK: Final = "lock"
YES: Final = "yes"
RENEWAL: Final = "renewal"  # folder in which a new key is enrolled


def check_frame_bytes(text: str) -> None:
    """Raises `ConfigError` for a limit below the smallest frame or above the largest MQTT packet."""
    low, high = FRAME_BYTES_RANGE
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise ConfigError(f"edge.toml: frame_bytes is {text!r}: give a number from {low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of edge.toml: the federation's address, and the task, data and privacy of this device."""

    federation: str  # its name
    device: str  # the name of this device
    broker: str  # its URL
    aggregator_key: str  # 64 hex digits
    task: str  # as `--task` takes it; the user's own with the folder of its module: /home/pi/my_task:TASK
    data: str = ""  # a folder; empty if the task needs none
    partition: str = "all"  # of the data, as `edge join --partition` takes it
    hold_out: str = ""  # the share of the device's data that is never trained on
    processor: str = ""  # that trains, as `edge join --device` takes it; empty for the plan's choice
    width: str = ""  # the share of each layer's channels that the device trains; empty for all
    seed: str = ""  # of the task's initial model
    username: str = ""  # at the broker; empty for the device's name
    password_file: str = ""  # with the broker's password in its first line, mode 0600
    no_tls: str = ""  # "yes" if the password may be sent unencrypted, on a network where you trust everyone
    frame_bytes: str = ""  # the largest MQTT payload to send; empty for what the aggregator takes
    dp: str = ""  # the kind of differential privacy that the plan must have; see docs/privacy.md
    max_epsilon: str = ""  # with dp: the largest epsilon to spend, whatever the plan allows
    max_delta: str = ""  # with dp: the largest delta of a plan to accept
    helpers: str = ""  # of private sums: keys that the owner trusts, 64 hex digits each, separated by spaces
    private_min: str = ""  # with helpers: the smallest number of devices in a sum
    private_roster: str = ""  # with helpers: "own" if they must not leave the list of devices to the aggregator
    private_colluding: str = ""  # with helpers: devices of a sum whose draws are no noise under dp = "sum"
    private_kind: str = ""  # with helpers: "bfv" for encrypted sums, where all parties follow the protocol
    max_seconds: str = ""  # time limit of one training; empty for none
    max_steps: str = ""  # step limit of one training; empty for none
    statistics: str = ""  # requests for statistics of its data that the device answers a day; empty for none
    rejoin: str = ""  # of a renewal only, "yes": the counters start anew with the new key
    code: str = field(default="", repr=False)  # of the invitation, until the device has joined

    def __post_init__(self) -> None:
        check_federation(self.federation)
        _ = self.policy, self.limits, self.sums, self.statistics_per_day  # raise ConfigError if one is invalid
        check_device(self.device)
        check_broker_url(self.broker)
        if self.no_tls not in {"", YES}:
            raise ConfigError(f'edge.toml: no_tls is {self.no_tls!r}: give "{YES}", or leave it out')
        if self.password_file:
            Endpoint.parse(self.broker).check_password(no_tls=self.may_lack_tls, switch=f'no_tls = "{YES}" in {TOML}')
        if self.seed and not (self.seed.isascii() and self.seed.isdecimal()):
            raise ConfigError(f"edge.toml: seed is {self.seed!r}: give the number that `ternbus edge init-model` got")
        if self.frame_bytes:
            check_frame_bytes(self.frame_bytes)
        if self.hold_out:
            Partition.parse(f"all;test:{self.hold_out}")
        try:
            check_width(self.share_of_channels)
        except ValueError:
            raise ConfigError(f"edge.toml: width is {self.width!r}: give a number from {WIDTH_MIN:g} to 1") from None
        if self.sums is not None and self.share_of_channels < 1:
            raise ConfigError(
                "--width does not go with --private: a narrow device sends 0 for what it does not train, so there a "
                "sum shows the devices of full width, or the only one; leave one of both out"
            )

    @property
    def share_of_channels(self) -> float:
        return float(self.width or 1)

    @property
    def held_share(self) -> float:
        return float(self.hold_out or 0)

    @property
    def frame_limit(self) -> int:
        return int(self.frame_bytes or FRAME_BYTES)

    @property
    def policy(self) -> PrivacyPolicy | None:
        """The owner's privacy policy. Raises `ConfigError` for an invalid number or kind."""
        if not (self.dp or self.max_epsilon or self.max_delta):
            return None
        try:
            return PrivacyPolicy(kind=self.dp, epsilon=float(self.max_epsilon), delta=float(self.max_delta))
        except ValueError:
            raise ConfigError(
                f"edge.toml: max_epsilon is {self.max_epsilon!r} and max_delta is {self.max_delta!r}: "
                "with dp both must be numbers"
            ) from None

    @property
    def sums(self) -> SumPolicy | None:
        """What the owner pins of private sums. Raises `ConfigError` for what is no key or no number."""
        if not any((self.helpers, self.private_min, self.private_roster, self.private_colluding, self.private_kind)):
            return None
        if not (self.private_min.isascii() and self.private_min.isdecimal()):
            raise ConfigError(f'edge.toml: private_min is {self.private_min!r}: give a number of devices, as in "5"')
        colluding = self.private_colluding or "0"
        if not (colluding.isascii() and colluding.isdecimal()):
            raise ConfigError(f'edge.toml: private_colluding is {colluding!r}: give a number of devices, as in "1"')
        roster, kind = self.private_roster or AGGREGATOR, self.private_kind or MASK
        return SumPolicy.of(self.helpers.split(), int(self.private_min), roster, int(colluding), kind=kind)

    @property
    def statistics_per_day(self) -> int | None:
        """Requests for statistics a day; None for none at all. Raises `ConfigError` for what is no such number."""
        return check_setting(self.statistics)

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
        return expanded(Path(self.password_file)) if self.password_file else None

    @property
    def may_lack_tls(self) -> bool:
        """Whether the owner has said that the password may be sent unencrypted."""
        return self.no_tls == YES

    @classmethod
    def from_table(cls, table: Mapping[str, Any], source: str) -> Self:
        """Check the table of a TOML file. Raises `ConfigError` with ``source`` and the key."""
        known = {entry.name for entry in fields(cls)}
        wrong = [name for name, value in table.items() if name not in known or not isinstance(value, str)]
        if wrong:
            raise ConfigError(f"{source}: {wrong[0]!r} is not a device setting or not a string: remove or quote it")
        missing = {"federation", "device", "broker", "aggregator_key", "task"} - set(table)
        if missing:
            raise ConfigError(f"{source}: {min(missing)!r} is missing: run `ternbus edge join` again")
        settings = cls(**table)
        if not is_public_key(settings.aggregator_key):
            raise ConfigError(f"{source}: aggregator_key is not 64 hex digits: copy it from the invitation")
        return settings

    def dumps(self) -> str:
        """The TOML file's text."""
        about = "A Ternbus device. Its state is in outbox.db, its key in device.key."
        return toml.dumps({name: value for name, value in asdict(self).items() if value}, {(): about})


def _privacy(policy: PrivacyPolicy) -> dict[str, str]:
    """The settings of the owner's privacy policy."""
    return {"dp": policy.kind, "max_epsilon": str(policy.epsilon), "max_delta": str(policy.delta)}


def _pins(sums: SumPolicy) -> dict[str, str]:
    """The settings of what the owner pins of private sums."""
    roster = {"private_roster": sums.roster} if sums.roster != AGGREGATOR else {}
    colluding = {"private_colluding": str(sums.colluding)} if sums.colluding else {}
    kind = {"private_kind": sums.kind} if sums.kind != MASK else {}
    helpers = " ".join(key.hex() for key in sums.helpers)
    return {"helpers": helpers, "private_min": str(sums.min), **roster, **colluding, **kind}


def _bounds(limits: TrainingLimits) -> dict[str, str]:
    """The settings of the owner's limits of a training."""
    seconds = {"max_seconds": repr(limits.seconds)} if limits.seconds is not None else {}
    return seconds | ({"max_steps": str(limits.steps)} if limits.steps is not None else {})


@dataclass(frozen=True, slots=True)
class DeviceDirectory:
    """The directory of one device."""

    folder: Path

    def renewal(self) -> "DeviceDirectory":
        """The directory in which this device's next key is enrolled."""
        return DeviceDirectory(self.folder / RENEWAL)

    def exists(self) -> bool:
        return (self.folder / TOML).exists()

    def discard(self) -> None:
        """Remove the directory; renamed first, so that a crash leaves no half of a device."""
        gone = self.folder.with_name(f"{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        reached("folder-renamed")
        shutil.rmtree(gone)

    @property
    def quoted(self) -> str:
        """The folder as a shell takes it, for the commands in errors."""
        return quoted(self.folder)

    def settings(self) -> Settings:
        """The settings. Raises `ConfigError` if there are none, or they are invalid."""
        path = self.folder / TOML
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist: join a federation with `ternbus edge join INVITATION.toml {self.quoted}`"
            )
        return Settings.from_table(load_toml(check_secret(path)), str(path))

    def joined(self) -> Settings:
        """The settings of a device that has joined. Raises `ConfigError` for any other."""
        settings = self.settings()
        if settings.code:
            raise ConfigError(f"{self.folder} has not finished joining: run `ternbus edge join` again")
        return settings

    def has_joined(self, invitation: Invitation) -> bool:
        """Whether the directory's device has joined, and is the one that is invited."""
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
        processor: str = "",
        frame_bytes: int | None = None,
        username: str = "",
        password_file: Path | None = None,
        no_tls: bool = False,
        policy: PrivacyPolicy | None = None,
        limits: TrainingLimits | None = None,
        sums: SumPolicy | None = None,
        statistics: int | None = None,
    ) -> Settings:
        """Write key, certificates and settings for `join`; the key of an interrupted `join` is used again.

        Another code gets another key: the broker may still hold the answer to the last code, for the last key.
        """
        before = self.settings().code if (self.folder / TOML).exists() else None
        if before == "":
            raise self._joined_already()
        settings = Settings(
            federation=invitation.federation,
            device=invitation.device,
            broker=invitation.broker,
            aggregator_key=invitation.aggregator_key,
            task=task,
            data=str(expanded(data).resolve()) if data is not None else "",
            partition=partition,
            width=repr(width) if width != 1 else "",
            processor=processor,
            hold_out=repr(hold_out) if hold_out else "",
            seed=str(seed) if seed else "",
            frame_bytes=str(frame_bytes or ""),
            username=username,
            password_file=str(expanded(password_file).resolve()) if password_file is not None else "",
            no_tls=YES if no_tls else "",
            **(_privacy(policy) if policy is not None else {}),
            **(_pins(sums) if sums is not None else {}),
            **(_bounds(limits) if limits is not None else {}),
            statistics=str(statistics or ""),
            code=invitation.code,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise fault(error, self.folder, "cannot create ") from error
        if before not in {None, invitation.code} or not (self.folder / KEY).exists():
            write_key(self.folder / KEY, Identity.generate().seed)
        for name, pem in ((CA, invitation.ca), (CERTIFICATE, invitation.certificate), (TLS_KEY, invitation.key)):
            if pem is not None:
                write_secret(self.folder / name, pem.encode())
        self.write(settings)
        return settings

    def _joined_already(self) -> ConfigError:
        return ConfigError(
            f"{self.folder} has joined already: to train, run `ternbus edge run {self.quoted}`; for another device, "
            f"choose another directory; `ternbus edge leave {self.quoted}` removes this device with its key"
        )

    def write(self, settings: Settings) -> None:
        write_secret(self.folder / TOML, settings.dumps().encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory, so that no two processes use the same sequence numbers. Raises `ConfigError`."""
        with storing(self.folder / LOCK):
            taken = lock(self.folder / LOCK)
        if taken is None:
            raise ConfigError(f"another `ternbus edge` process runs in {self.folder}: stop it first")
        with taken:
            yield

    def erase(self, parents: Iterable[Path] = ()) -> None:
        """Remove key, settings and outbox; and the directory, then these parents, if they are empty."""
        damaged = self.folder.glob("outbox-*")  # what a damaged outbox was, and what came in its place
        for folder in (self.folder / RENEWAL, self.folder / f"{RENEWAL}.gone", *copies(self.folder), *damaged):
            shutil.rmtree(folder, ignore_errors=True)
        names = [KEY, TOML, CA, CERTIFICATE, TLS_KEY, OUTBOX, f"{OUTBOX}-wal", f"{OUTBOX}-shm", LOCK]
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # there is more in one of them
            for folder in (self.folder, *parents):
                folder.rmdir()
