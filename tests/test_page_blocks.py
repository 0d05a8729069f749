"""Every shell block of a page is run by a test, or says why nobody runs it."""

from pathlib import Path

import pytest

from support.page_story import ROOT, Story, blocks

HIDDEN = {"build", "node_modules", "fixtures"}
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in HIDDEN for part in page.relative_to(ROOT).parts) and any(blocks(page))
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def told(page: Path) -> bool:
    """Whether a story of the page runs some of its blocks."""
    return any(not block.run_by and not block.not_run for block in blocks(page))


def test_the_pages_have_blocks_that_are_run() -> None:
    assert len(PAGES) > 15
    assert sum(map(told, PAGES)) > 10


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_who_runs_a_block_is_there_and_what_nobody_runs_has_one_reason(page: Path) -> None:
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert not (block.run_by and block.not_run), f"{where} is run and is not: remove one of the two comments"
        assert not block.run_by or (ROOT / block.run_by).exists(), f"{where}: {block.run_by} does not exist"
        told_of = block.not_run or block.run_by
        assert not (told_of and block.meanwhile), f"{where}: nothing runs what is between this block and the one before"
        assert "[-" not in block.text, f"{where}: brackets are no shell: write the command with the option, or without"


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("page", [page for page in PAGES if told(page)], ids=name_of)
def test_the_commands_of_a_page_work_in_their_order(page: Path, tmp_path: Path) -> None:
    with Story(page, tmp_path) as story:
        for block in blocks(page):
            if not block.run_by and not block.not_run:
                story.tell(block.meanwhile)
                story.tell(block.text)
