"""Markdown from plain values: tables, and paragraphs of at most 100 characters a line."""

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
PAGE = re.compile(r"(?<![\w/`])docs/([\w-]+\.md)")
_FIXED = re.compile(r"```|\||\d+\. |#|>|\s")  # a paragraph that begins so keeps its lines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar within a cell is escaped."""
    lines = [list(head), ["---"] * len(head), *([cell(each) for each in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cell(text: str) -> str:
    """A text on one line, for a cell of a table; a page of docs/ that it names becomes a link."""
    return PAGE.sub(r"[\1](../\1)", " ".join(text.split()).replace("|", "\\|"))


def number(value: float) -> str:
    """A number as one reads it: 10,000,000, 2^32 - 1, 0.001, 1e-09."""
    if isinstance(value, int) and abs(value) >= 2**31 and (abs(value) + (value > 0)).bit_count() == 1:
        power = (abs(value) + (value > 0)).bit_length() - 1
        return f"2^{power} - 1" if value > 0 else f"-2^{power}"
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:g}"


def interval(low: float | None, high: float | None) -> str:
    """A range in words; empty where there is no bound."""
    if high is None:
        return "" if low is None else f"at least {number(low)}"
    if 0 < 1 - high < 1e-6:
        return f"{number(low or 0)} to below 1"
    return f"at most {number(high)}" if low is None else f"{number(low)} to {number(high)}"


def code(text: str) -> str:
    """The text as code; nothing where there is none."""
    return f"`{text}`" if text else ""


def paragraphs(text: str) -> str:
    """The text of a docstring or a help, with paragraphs filled anew; blocks, tables and lists keep their lines."""
    plain = text.replace("``", "`").strip()
    return "\n\n".join(_fitted(each) for each in re.split(r"\n\s*\n", plain))


def _fitted(text: str) -> str:
    if re.match(r"[-*] ", text):
        return "\n".join(_filled(item, "  ") for item in re.split(r"\n(?=[-*] )", text))
    return text if _FIXED.match(text) else _filled(text)


def _filled(text: str, indent: str = "") -> str:
    plain = PAGE.sub(r"[\1](../\1)", " ".join(text.split()))
    return textwrap.fill(plain, WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
