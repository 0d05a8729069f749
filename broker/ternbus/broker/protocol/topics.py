"""MQTT topics of each kind of message: build and parse them, and compare them with a frame's header."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import AGGREGATOR, is_device, is_federation

UP_KINDS: Final = frozenset({"status", "offer", "update", "metrics", "enroll", "statistics"})
CANDIDATE: Final = "candidate"
DOWN_KINDS: Final = frozenset({"receipt", "grant", CANDIDATE})
WHOLE_KINDS: Final = frozenset({"status", "head"})  # under all/, one topic for each kind
PART_KINDS: Final = frozenset({"snapshot", "delta"})  # under all/, one topic for each part
PAGE_KINDS: Final = frozenset({"revocations"})  # under all/, one topic for each page
TERMS: Final = "terms"  # under all/, one topic for each part
CARD: Final = "card"
HELPER_KINDS: Final = frozenset({"status", CARD, "enroll", "answer"})  # under help/, by a helper
TO_HELPER_KINDS: Final = frozenset({"ask", "receipt"})  # under help/, by the aggregator
DISCOVERY: Final = "homeassistant"  # below it Home Assistant looks for devices, unless it is told another prefix
DISCOVERY_PREFIX: Final = re.compile(r"(?!ternbus(/|\Z))(?=.{1,64}\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+){0,3}")


def root(federation: str) -> str:
    return f"ternbus/1/{federation}"


def status(federation: str) -> str:
    return f"{root(federation)}/all/status"


def head(federation: str) -> str:
    return f"{root(federation)}/all/head"


def snapshot(federation: str, place: int, part: int) -> str:
    return f"{root(federation)}/all/snapshot/{place}/{part}"


def delta(federation: str, slot: int, part: int) -> str:
    return f"{root(federation)}/all/delta/{slot}/{part}"


def revocations(federation: str, page: int) -> str:
    return f"{root(federation)}/all/revocations/{page}"


def terms(federation: str, part: int) -> str:
    return f"{root(federation)}/all/{TERMS}/{part}"


def view(federation: str, name: str) -> str:
    """What others than members are shown of a device, or of the aggregator by its name: JSON, and no frame."""
    return f"{root(federation)}/view/{name}"


def is_discovery_prefix(text: str) -> bool:
    """Whether it may be a prefix of `discovery`."""
    return DISCOVERY_PREFIX.fullmatch(text) is not None


def discovery(prefix: str, federation: str, name: str) -> str:
    """Where Home Assistant reads what there is to show of a device, or of the aggregator."""
    return f"{prefix}/device/{federation}/{name}/config"


def help_of(federation: str, helper: str, kind: str) -> str:
    """A topic between a helper and the aggregator."""
    return f"{root(federation)}/help/{helper}/{kind}"


def up(federation: str, device: str, kind: str) -> str:
    return f"{root(federation)}/up/{device}/{kind}"


def down(federation: str, device: str, kind: str) -> str:
    return f"{root(federation)}/down/{device}/{kind}"


def of_device(federation: str, device: str) -> tuple[str, ...]:
    """All topics that a device may write, which an access list names: below them it could retain what it likes."""
    return tuple(up(federation, device, kind) for kind in sorted(UP_KINDS))


def of_helper(federation: str, helper: str) -> tuple[str, ...]:
    """All topics that a helper may write."""
    return tuple(help_of(federation, helper, kind) for kind in sorted(HELPER_KINDS))


def of_reader(federation: str) -> tuple[str, ...]:
    """All topics that a reader may read, as filters; Home Assistant subscribes to more than there is of devices."""
    return view(federation, "#"), f"{DISCOVERY}/#"


def of_aggregator(federation: str) -> tuple[str, ...]:
    """All topics that a federation's aggregator may write, as filters."""
    prefix = f"{root(federation)}/all"
    whole = [f"{prefix}/{kind}" for kind in sorted(WHOLE_KINDS)]
    parts = [f"{prefix}/{kind}/+/+" for kind in sorted(PART_KINDS)]
    pages = [f"{prefix}/{kind}/+" for kind in (*sorted(PAGE_KINDS), TERMS)]
    devices = [down(federation, "+", kind) for kind in sorted(DOWN_KINDS)]
    helpers = [help_of(federation, "+", kind) for kind in sorted(TO_HELPER_KINDS)]
    shown = [view(federation, "+"), discovery(DISCOVERY, federation, "+")]
    return (*whole, *parts, *pages, *devices, *helpers, *shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A parsed topic: ``group`` is all, up, down or help; ``slot`` is a delta's slot or a snapshot's place.

    ``device`` is the helper's name under help/.
    """

    federation: str
    group: str
    kind: str
    device: str | None = None
    slot: int | None = None
    part: int | None = None
    page: int | None = None


@lru_cache(maxsize=1024)
def parse(topic: str) -> Address:
    """Parse a topic; ProtocolError for one that the protocol does not have.

    Each part of a message comes on the topic of the one before. What is no topic is not kept.
    """
    match topic.split("/"):
        case ["ternbus", "1", federation, "all", kind] if is_federation(federation) and kind in WHOLE_KINDS:
            return Address(federation=federation, group="all", kind=kind)
        case ["ternbus", "1", federation, "all", kind, slot, part] if is_federation(federation) and kind in PART_KINDS:
            return Address(federation=federation, group="all", kind=kind, slot=_number(slot), part=_number(part))
        case ["ternbus", "1", federation, "all", kind, page] if is_federation(federation) and kind in PAGE_KINDS:
            return Address(federation=federation, group="all", kind=kind, page=_number(page))
        case ["ternbus", "1", federation, "all", kind, part] if is_federation(federation) and kind == TERMS:
            return Address(federation=federation, group="all", kind=kind, part=_number(part))
        case ["ternbus", "1", federation, "help", helper, kind] if (
            is_federation(federation) and is_device(helper) and kind in HELPER_KINDS | TO_HELPER_KINDS
        ):
            return Address(federation=federation, group="help", kind=kind, device=helper)
        case ["ternbus", "1", federation, ("up" | "down") as group, device, kind] if (
            is_federation(federation) and is_device(device) and kind in (UP_KINDS if group == "up" else DOWN_KINDS)
        ):
            return Address(federation=federation, group=group, kind=kind, device=device)
    raise ProtocolError("unknown-topic", topic[:80])


def check(frame: Frame, address: Address) -> None:
    """Raise ProtocolError unless the frame's header agrees with the topic on which the frame arrived."""
    if frame.federation != address.federation:
        raise ProtocolError("wrong-federation", f"frame of {frame.federation!r} on a topic of {address.federation!r}")
    if frame.kind != address.kind:
        raise ProtocolError("wrong-topic", f"frame of kind {frame.kind!r} on a topic for {address.kind!r}")
    is_up = address.group == "up" or (address.group == "help" and address.kind in HELPER_KINDS)
    sender = address.device if is_up else AGGREGATOR
    if frame.sender != sender:
        raise ProtocolError("wrong-sender", f"frame of {frame.sender!r} on a topic of {sender!r}")
    if address.part is not None and frame.part != address.part:
        raise ProtocolError("wrong-topic", f"part {frame.part} on the topic of part {address.part}")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or (text[0] == "0" and text != "0"):
        raise ProtocolError("unknown-topic", "the slot or part is not a number")
    return int(text)
