"""The progress of a simulation, seen by callbacks; and the best version so far."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from ternbus.broker.protocol.direction import LOSS, direction_of, primary_of, sign_of
from ternbus.broker.protocol.schema import Vector, to_tensors, vector_digest
from ternbus.broker.protocol.tensor_kinds import version_metadata
from ternbus.edge.plan.tensors import Tensors
from ternbus.lab.notebook.callbacks import AnyCallback, State, asked_to_stop
from ternbus.lab.report.observation import Observation
from ternbus.lab.virtual.simulate import Simulation

_said: set[str] = set()


class Watch:
    """A `Progress` that calls callbacks after each version that is evaluated. `simulation` is set before it runs.

    The best version is the first with the best value of the primary metric of the test data.
    """

    def __init__(
        self, callbacks: Sequence[AnyCallback], versions: int | None, module: Callable[[Tensors], Any]
    ) -> None:
        self.simulation: Simulation | None = None
        self.lines: list[str] = []
        self.best: tuple[int, Vector] | None = None
        self.ended = "limit"
        self._best_value, self._shown = 0.0, -1
        self._callbacks, self._versions, self._module = callbacks, versions, module

    def say(self, line: str) -> None:
        self.lines.append(line)
        for callback in self._callbacks:
            if callable(say := getattr(callback, "say", None)):
                say(line)

    def say_once(self, line: str) -> None:
        """Say what this process has not said yet; every run keeps it."""
        if line in _said:
            self.lines.append(line)
        else:
            _said.add(line)
            self.say(line)

    def show(self, moment: Observation, seconds: float) -> None:
        simulation = self.simulation
        if simulation is None or simulation.evaluated is None:
            return
        version, vector = simulation.evaluated
        row = moment.versions[version]
        self._shown = version
        self._rank(version, vector, row.metrics, moment.better)
        state = State(
            version=version,
            versions=self._versions,
            seconds=seconds,
            updates=row.updates,
            staleness=row.staleness if row.updates else None,
            accepted=moment.accepted,
            bytes_up=moment.bytes_up,
            bytes_down=moment.bytes_down,
            metrics=row.metrics,
            better=moment.better,
            read=lambda: to_tensors(simulation.schema, vector),
            module=self._module,
            metadata=lambda: simulation.kinds.metadata() | version_metadata(version, vector_digest(vector)),
        )
        for callback in self._callbacks:
            if asked_to_stop(callback, state):
                self.ended = "stopped"
                simulation.stop()

    def finish(self) -> None:
        """Show a last version that the simulation evaluated only at its end."""
        simulation = self.simulation
        if simulation is not None and simulation.evaluated is not None and simulation.evaluated[0] != self._shown:
            self.show(simulation.moment(), simulation.clock.now)

    def end(self, run: object) -> None:
        """Tell all callbacks that the run has ended; None if an exception ended it."""
        for callback in self._callbacks:
            if callable(end := getattr(callback, "on_end", None)):
                end(run)

    def _rank(self, version: int, vector: Vector, metrics: Mapping[str, float], better: Mapping[str, Any]) -> None:
        if (name := primary_of(metrics) or (LOSS if LOSS in metrics else None)) is None:
            return
        value = sign_of(direction_of(name, better)) * metrics[name]
        if self.best is None or value > self._best_value:
            self.best, self._best_value = (version, vector), value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
