"""Where the clients of a run train; a bug in a task's code ends the run, and says whose training it was."""

from collections.abc import Sequence
from functools import partial

from ternbus.broker.errors import FederationError
from ternbus.broker.own_code import own_part
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFailed
from ternbus.edge.shell.worker import TrainingResult
from ternbus.lab.virtual.training import Awaited, Place


class ClientError(FederationError):
    """The code of the task raised an exception in the training of `client` on `version`.

    The text names the batch, if training had begun; the traceback of the exception is a note.
    """

    def __init__(self, client: str, version: int, reason: str) -> None:
        super().__init__(f"{client}, training on version {version}: {reason}")
        self.client, self.version = client, version

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: of the traceback of the exception, too, the lines of the user's own code."""
        return [own_part(text) for text in super()._render_traceback_()]


class NamedPlace:
    """Another place, whose trainings of a task with a bug raise `ClientError`.

    What is no bug, as a training that diverged, stays a failure that the device reports and tries again after.
    """

    def __init__(self, place: Place, names: Sequence[str]) -> None:
        self._place, self._names = place, names

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:
        return partial(self._checked, device, self._place.begin(device, job, due_s))

    def _checked(self, device: int, awaited: Awaited) -> TrainingResult:
        result = awaited()
        if isinstance(result, TrainingFailed) and result.trace:
            error = ClientError(self._names[device], result.base, result.reason)
            error.add_note(result.trace)
            raise error
        return result
