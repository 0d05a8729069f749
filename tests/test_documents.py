"""What the documents name exists: paths, relative links, anchors."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOTS = ("broker", "edge_client", "aggregator", "helper", "lab")
COMPONENTS = (
    "broker/ternbus/broker", "edge_client/ternbus/edge", "aggregator/ternbus/aggregator", "helper/ternbus/helper",
    "lab/ternbus/lab",
)  # fmt: skip
TOPS = (*ROOTS, "tests", "benchmarks", "fuzz", "docs", "deploy", "examples", "manual")
# These name rooms too, so all that has a slash; other documents have topics and files of a user's as well.
OF_ROOMS = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *(ROOT / root / "README.md" for root in ROOTS)]
# Hidden and built folders are none of ours.
DOCUMENTS = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in {"build", "node_modules"} for part in page.relative_to(ROOT).parts)
]
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
ENDINGS = {".py", ".md"}
# What a reader fills in, and files of the reader's own.
NOT_OURS = re.compile(r"\b(?:DIR|NAME|TARGET|DEVICE|ROOT)\b|^(?:broker|first|my_task|queue|use)\.py$")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def paths(page: Path) -> Iterator[str]:
    """Each path of ours that the page has in backticks."""
    for name in re.findall(r"`([^`\s]+)`", prose(page)):
        of_ours = Path(name).suffix in ENDINGS or name.startswith(tuple(f"{top}/" for top in TOPS))
        of_rooms = page in OF_ROOMS and "/" in name
        if PATH.fullmatch(name) and (of_ours or of_rooms) and not NOT_OURS.search(name):
            yield name


def exists(name: str, page: Path) -> bool:
    """Whether the repository has it: from its root, from a component's folder, beside the page, or by its bare name."""
    bases = [ROOT, page.parent, *(ROOT / component for component in COMPONENTS)]
    if "/" not in name:
        return (ROOT / name).exists() or any(next((ROOT / top).rglob(name), None) for top in TOPS)
    return any(next(base.glob(name.rstrip("/")), None) for base in bases)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """The relative links of a page: file and anchor, either of them perhaps empty."""
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_a_path_that_a_document_names_exists(page: Path) -> None:
    named = set(paths(page))
    assert len(named) > 4 or page not in OF_ROOMS
    assert {name for name in named if not exists(name, page)} == set()


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_a_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    wrong = {
        f"{file}#{anchor}"
        for file, anchor in links(page)
        if not (target := (page.parent / file if file else page)).exists()
        or (anchor and anchor not in anchors(target.resolve()))
    }
    assert wrong == set()


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_lines_of_text_are_at_most_100_characters(page: Path) -> None:
    long = [line for line in prose(page).splitlines() if len(line) > 100 and not line.lstrip().startswith("|")]
    assert long == []
