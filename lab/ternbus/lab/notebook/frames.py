"""Tables and figures of results: pandas and matplotlib, which are loaded when they are asked for."""

import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ternbus.broker.errors import ConfigError


def library(module: str, package: str) -> Any:
    """The module. Raises `ConfigError`, which says what to install, if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        raise ConfigError(f"{module} is missing; run: pip install {package}") from None


def frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> Any:
    """A DataFrame with a row for each mapping; columns that are None or missing everywhere are left out."""
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    used = [name for name in names if name in columns or any(row.get(name) is not None for row in rows)]
    return library("pandas", "'ternbus[notebook]'").DataFrame(
        [{name: row.get(name) for name in used} for row in rows], columns=used
    )


def figure(panels: Sequence[Callable[[Any], None]], *, width: float = 5.0, height: float = 3.6) -> Any:
    """A matplotlib Figure with a panel for each function of its axes. It is none of pyplot's, so nothing is global."""
    library("matplotlib", "'ternbus[notebook]'")
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow, and an extra

    class Picture(Figure):
        """A figure that a notebook shows, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png", dpi=90)
            return content.getvalue()

    made = Picture(figsize=(width * len(panels), height), layout="constrained")
    for number, draw in enumerate(panels):
        axes = made.add_subplot(1, len(panels), number + 1)
        draw(axes)
        axes.grid(visible=True, alpha=0.3)
    return made
