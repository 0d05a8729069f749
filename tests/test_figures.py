"""The figures in README.md and docs/figures.md are those of the runs that ``benchmarks/results`` holds."""

from pathlib import Path

import pytest

from benchmarks.figures import PAGES, SECTIONS, SUMMARY, between_markers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_was_measured(page: Path) -> None:
    shown = between_markers(page.read_text(encoding="utf-8"))
    assert shown == PAGES[page](), "run: python -m benchmarks.figures --write"


def test_readme_shows_five_of_the_figures() -> None:
    assert len(SUMMARY) == 5
    assert SUMMARY.keys() <= SECTIONS.keys()
