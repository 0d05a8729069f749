"""What a helper has written down for good: the sets, the updates in them, and the keys of devices."""

from dataclasses import dataclass, field
from typing import Final, Protocol, assert_never

from ternbus.broker.sums.terms import OWN

PREPARED: Final = "prepared"
OPENED: Final = "opened"
ABANDONED: Final = "abandoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A set's updates are used up: the name of each device, and the public key that signed its update."""

    digest: bytes
    context: bytes
    base: int
    count: int
    unix_s: float
    members: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The sum of a prepared set's masks is about to leave; ``entry`` is that of the log, as packed."""

    digest: bytes
    count: int
    unix_s: float
    entry: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """A set will never be opened; its updates are free for another one."""

    digest: bytes
    count: int
    unix_s: float


Step = Prepared | Opened | Abandoned


class Records(Protocol):
    """Look-ups in what all saves so far have written."""

    def state_of(self, digest: bytes) -> str | None:
        """PREPARED, OPENED or ABANDONED; None for a set that is not known."""

    def used_in(self, device: str, base: int) -> bytes | None:
        """The digest of the set in which the device's update on this version is; None if it is in none."""

    def key_of(self, device: str) -> bytes | None:
        """The device's active public key; None for a device that is not on the roster."""

    def device_of(self, public: bytes) -> str | None:
        """The device that has, or had, this public key; None for a key that is not known."""


@dataclass(slots=True)
class MemoryRecords:
    """Records without a disk, of a helper in a simulation."""

    roster: str = OWN
    _states: dict[bytes, str] = field(default_factory=dict)
    _used: dict[tuple[str, int], bytes] = field(default_factory=dict)
    _keys: dict[str, bytes] = field(default_factory=dict)
    _devices: dict[bytes, str] = field(default_factory=dict)

    def state_of(self, digest: bytes) -> str | None:
        return self._states.get(digest)

    def used_in(self, device: str, base: int) -> bytes | None:
        return self._used.get((device, base))

    def key_of(self, device: str) -> bytes | None:
        return self._keys.get(device)

    def device_of(self, public: bytes) -> str | None:
        return self._devices.get(public)

    def admit(self, device: str, public: bytes) -> None:
        """Put the device on the roster, with this key in place of an earlier one."""
        self._keys[device] = public
        self._devices[public] = device

    def write(self, step: Step) -> None:
        """Do what a store does with the step of a `Save`."""
        match step:
            case Prepared():
                self._states[step.digest] = PREPARED
                self._used |= {(device, step.base): step.digest for device, _ in step.members}
                if self.roster != OWN:
                    for device, public in step.members:
                        self.admit(device, public)
            case Opened():
                self._states[step.digest] = OPENED
            case Abandoned():
                self._states[step.digest] = ABANDONED
                self._used = {name: digest for name, digest in self._used.items() if digest != step.digest}
            case _:
                assert_never(step)
