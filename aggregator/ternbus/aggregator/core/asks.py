"""The open requests to helpers, one step of a set at a time; each is repeated until the helper answers.

A helper answers the same request in the same way, so repeating it is safe. Until a helper has abandoned a set that it
is to abandon, it is asked nothing else: it could find an update of that set in another one, and refuse that one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core.events import Action, Publish
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.sums.helper import Helper
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.parts import Collector, Whole, encoded_bytes_max
from ternbus.broker.sums.sets import ABANDON, AskStep

FIRST_WAIT_S: Final = 5.0  # until an ask is repeated, doubled each time
LONGEST_WAIT_S: Final = 300.0
ANSWERS_MAX: Final = 4  # of one helper that are incomplete


@dataclass(slots=True)
class _Line:
    """One helper: the steps that it has not answered to, by set, oldest first."""

    steps: dict[bytes, str] = field(default_factory=dict)
    due: float | None = None  # when they are asked again
    wait_s: float = FIRST_WAIT_S
    collector: Collector | None = None


@dataclass(slots=True, kw_only=True)
class Asks:
    """``body_of`` makes the body of an ask for the set of a digest."""

    helpers: dict[str, Helper]
    frames: FrameWriter
    answer_bytes_max: int
    body_of: Callable[[bytes], bytes]
    _lines: dict[str, _Line] = field(default_factory=dict)
    _connected: bool = False

    @property
    def due(self) -> float | None:
        """When ``on_time`` has something to repeat."""
        return min((line.due for line in self._lines.values() if line.due is not None), default=None)

    def unanswered(self) -> dict[str, tuple[bytes, ...]]:
        """The sets that each helper has not answered for."""
        return {name: tuple(line.steps) for name, line in self._lines.items() if line.steps}

    def want(self, helper: str, digest: bytes, step: str, now: float) -> list[Action]:
        """Ask for a step of a set, in place of the step before."""
        line = self._lines.setdefault(helper, _Line())
        line.steps.pop(digest, None)
        line.steps[digest] = step
        return self._send(helper, [digest], now)

    def done(self, helper: str, digest: bytes, now: float) -> list[Action]:
        """It has answered; what had to wait for that is asked now."""
        line = self._lines.get(helper, _Line())
        was_abandoning = line.steps.pop(digest, None) == ABANDON
        line.wait_s = FIRST_WAIT_S
        if not line.steps:
            line.due = None
        return self._send(helper, list(line.steps), now) if was_abandoning and not _abandoning(line) else []

    def forget(self, digest: bytes) -> None:
        """Nobody is asked for this set any more."""
        for line in self._lines.values():
            line.steps.pop(digest, None)
            line.due = line.due if line.steps else None

    def is_wanted(self, digest: bytes) -> bool:
        """Whether a helper has not answered for it."""
        return any(digest in line.steps for line in self._lines.values())

    def connected(self, now: float) -> list[Action]:
        """Ask everything again: what was asked without a connection was asked nobody."""
        self._connected = True
        return [action for name in self._lines for action in self.again(name, now)]

    def disconnected(self) -> None:
        self._connected = False
        for line in self._lines.values():
            line.due = None

    def again(self, helper: str, now: float) -> list[Action]:
        """A helper has come online: ask it everything again."""
        line = self._lines.get(helper)
        if line is None:
            return []
        line.wait_s = FIRST_WAIT_S
        return self._send(helper, list(line.steps), now)

    def on_time(self, now: float) -> list[Action]:
        """Repeat what has waited for an answer too long."""
        actions: list[Action] = []
        for name, line in self._lines.items():
            if line.due is not None and line.due <= now:
                line.wait_s = min(2 * line.wait_s, LONGEST_WAIT_S)
                line.due = None
                actions += self._send(name, list(line.steps), now)
        return actions

    def collect(self, helper: str, frame: Frame) -> Whole | None:
        """Take in a part of an answer; None while parts are missing. ProtocolError for one that cannot be."""
        line = self._lines.setdefault(helper, _Line())
        if line.collector is None:
            bytes_max = encoded_bytes_max(self.answer_bytes_max)
            line.collector = Collector(ANSWERS_MAX, ANSWERS_MAX * bytes_max)
        return line.collector.add(frame)

    def _send(self, helper: str, digests: list[bytes], now: float) -> list[Action]:
        line = self._lines[helper]
        if not self._connected or not digests:
            return []
        actions: list[Action] = []
        only_abandon = _abandoning(line)
        for digest in digests:
            step = line.steps[digest]
            if step == ABANDON or not only_abandon:
                asked = AskStep(step=step, set=digest, count=max(0, self.helpers[helper].count))
                reserved, messages = self.frames.ask(helper, asked, b"" if step == ABANDON else self.body_of(digest))
                actions += [*reserved, *(Publish(topic=topic, payload=payload) for topic, payload in messages)]
        line.due = line.due or now + line.wait_s
        return actions


def _abandoning(line: _Line) -> bool:
    return ABANDON in line.steps.values()
