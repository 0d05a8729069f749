"""Text tables for terminals, with columns as wide as their content."""

from collections.abc import Iterable, Mapping, Sequence


def text_table(columns: Mapping[str, str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table. ``columns`` maps each heading to its alignment, "<" or ">". A cell of None is empty."""
    table = [[*columns], *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = [*columns.values()]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in table
    ]
