"""What the page can do: each action is what a command does, by the same functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.shell import administration, membership_commands, rollback, version_commands
from ternbus.aggregator.store import control
from ternbus.broker.errors import ConfigError
from ternbus.broker.version import software

TEXT_CHARS_MAX: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What was done, in words, and a file to hand out once."""

    text: str
    file: str = ""  # its name
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Asked:
    """The fields of a request; ConfigError where one is missing or of another type."""

    fields: Mapping[str, Any]

    def text(self, name: str, default: str | None = None) -> str:
        value = self.fields.get(name, default)
        if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
            raise ConfigError(f"{name}: give a text of at most {TEXT_CHARS_MAX} characters")
        return value.strip()

    def number(self, name: str) -> int:
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= version_commands.VERSION_MAX:
            raise ConfigError(f"{name}: give the number of a version")
        return value

    def flag(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: give true or false")
        return value

    def about(self) -> str:
        """For the audit."""
        given = {name: value for name, value in self.fields.items() if value != "" and value is not False}
        return " ".join(f"{name}={value}" for name, value in given.items())[:TEXT_CHARS_MAX]


def _pause(directory: Path, _: Asked) -> Done:
    administration.change_state(directory, control.PAUSE, software())
    return Done(text="paused: devices follow the model and do not train")


def _resume(directory: Path, _: Asked) -> Done:
    administration.change_state(directory, control.RESUME, software())
    return Done(text="open: devices train")


def _tag(directory: Path, asked: Asked) -> Done:
    tag = version_commands.name_version(directory, asked.number("version"), asked.text("name"))
    return Done(text=f"version {tag.version} is named {asked.text('name')}, and kept")


def _roll_back(directory: Path, asked: Asked) -> Done:
    version = asked.number("version")
    return Done(text=f"version {rollback.to_version(directory, version)} is version {version} again")


def _invite(directory: Path, asked: Asked) -> Done:
    name, evaluates = asked.text("device"), asked.flag("evaluator")
    devices, evaluators = ([], [name]) if evaluates else ([name], [])
    expires_in = asked.text("expires_in", "")
    (invitation,) = administration.invite(
        directory,
        *devices,
        evaluators=evaluators,
        expires_in_s=membership_commands.seconds(expires_in) if expires_in else None,
    )
    text = f"{name} is invited{' as an evaluator' if evaluates else ''}; copy the file to it, and nowhere else"
    return Done(text=text, file=f"{invitation.device}.toml", content=invitation.dumps().encode())


def _revoke(directory: Path, asked: Asked) -> Done:
    device = asked.text("device")
    dropped, faults = membership_commands.put_out(
        directory, device, why=asked.text("reason", ""), keep=asked.flag("keep")
    )
    but = f"; but {faults}" if faults else ""
    return Done(text=f"{device} is revoked; {dropped} of its accepted updates will not be merged{but}")


ACTIONS: Final[Mapping[str, tuple[Callable[[Path, Asked], Done], frozenset[str]]]] = {
    "pause": (_pause, frozenset()),
    "resume": (_resume, frozenset()),
    "tag": (_tag, frozenset({"version", "name"})),
    "rollback": (_roll_back, frozenset({"version"})),
    "invite": (_invite, frozenset({"device", "evaluator", "expires_in"})),
    "revoke": (_revoke, frozenset({"device", "reason", "keep"})),
}


def perform(directory: Path, name: str, asked: Asked) -> Done:
    """Do it; it is done and on disk when this returns. FederationError says why it is not."""
    action, known = ACTIONS[name]
    if unknown := asked.fields.keys() - known:
        raise ConfigError(f"{name} takes no {min(unknown)[:TEXT_CHARS_MAX]}")
    return action(directory, asked)
