"""Callbacks that send a run's metrics to TensorBoard or MLflow; each imports its library when a run begins."""

from pathlib import Path
from typing import Any

from ternbus.broker.files import fault
from ternbus.lab.notebook.callbacks import State
from ternbus.lab.notebook.frames import library


class TensorBoard:
    """Write the metrics of each version, by its number, to a folder for `tensorboard --logdir`.

    Raises `ConfigError` if tensorboard is missing, or the folder cannot be made.
    """

    def __init__(self, folder: Path | str = "runs") -> None:
        self.folder = Path(folder)
        self._writer: Any = None

    def on_version(self, state: State) -> None:
        if self._writer is None:
            library("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow, and its library is the user's

            try:
                self._writer = SummaryWriter(str(self.folder))
            except OSError as error:
                raise fault(error, self.folder, "TensorBoard: cannot write ") from error
        for name, value in measures(state).items():
            self._writer.add_scalar(name, value, state.version)

    def on_end(self, _: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MLflow:
    """Log the metrics of each version, by its number, to the active run of MLflow, or else to a new one.

    At the end it logs the settings of the run as parameters. Raises `ConfigError` if mlflow is missing.
    """

    def __init__(self, run_name: str | None = None) -> None:
        self.run_name = run_name
        self._mlflow: Any = None
        self._own = False

    def on_version(self, state: State) -> None:
        if self._mlflow is None:
            self._mlflow = library("mlflow", "mlflow-skinny")
            self._own = self._mlflow.active_run() is None
            if self._own:
                self._mlflow.start_run(run_name=self.run_name)
        self._mlflow.log_metrics(measures(state), step=state.version)

    def on_end(self, run: Any) -> None:
        if self._mlflow is None:
            return
        if run is not None:
            self._mlflow.log_params({name: str(value) for name, value in run.settings.items()})
        if self._own:
            self._mlflow.end_run()
        self._mlflow = None


def measures(state: State) -> dict[str, float]:
    """The numbers of a version: its metrics, and what it cost."""
    cost = {"seconds": state.seconds, "updates": state.updates, "bytes_up": state.bytes_up,
            "bytes_down": state.bytes_down}  # fmt: skip
    return {**state.metrics, **cost}
