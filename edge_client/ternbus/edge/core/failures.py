"""Failures of the task's code in a row, for one kind of work: when to try again, and what the device says of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ternbus.broker.backoff import Retry
from ternbus.broker.protocol.messages import FAILING_BYTES_MAX
from ternbus.edge.core.actions import Log
from ternbus.edge.core.events import EvaluationFailed, FineTuningFailed, TrainingFailed

HIDDEN: Final = "the device's log says why"  # where the plan seals updates: an error's text may quote data
Failed = TrainingFailed | EvaluationFailed | FineTuningFailed


@dataclass(slots=True, kw_only=True)
class Failures:
    """The last failure, until the work succeeds."""

    work: str  # for the owner: "a training"
    retry: Retry
    reason: str = ""  # empty if the last attempt did not fail
    version: int = -1  # of the model, at the last failure
    _logged: str = ""  # the last traceback

    def failed(self, version: int, reason: str, now: float) -> None:
        self.retry.failed(now)
        self.version, self.reason = version, reason

    def succeeded(self) -> None:
        self.retry.succeeded()
        self.version, self.reason = -1, ""

    def log(self, event: str, what: str, failed: Failed, fields: Mapping[str, object]) -> Log:
        """The log of a failure: the reason in one line and, the first time, the traceback of a bug of the task."""
        text = f"{what}: {failed.reason}"
        if failed.trace and failed.trace != self._logged:
            self._logged = failed.trace
            text = f"{text}\n{failed.trace}"
        return Log(event=event, text=text, fields={**fields, "reason": failed.reason})


def shown(reason: str, *, private: bool, sealed: bool) -> str:
    """What others may know of the reason: at most `FAILING_BYTES_MAX` bytes, and nothing of private data."""
    if private:
        return ""
    encoded = (HIDDEN if reason and sealed else reason).encode("utf-8", "replace")
    if len(encoded) <= FAILING_BYTES_MAX:
        return encoded.decode()
    return encoded[: FAILING_BYTES_MAX - 3].decode("utf-8", "ignore") + "…"
