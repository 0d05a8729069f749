"""The generated pages are what the code says, every page is in the navigation, and the site needs no network."""

import re
from pathlib import Path

import pytest

from manual import api, commands, markdown, settings, site, source
from manual.__main__ import PAGES
from manual.errors import ManualError
from ternbus.broker import exit_codes
from ternbus.broker.protocol import plan_keys
from ternbus.command import COMMANDS
from ternbus.lab.scenario import simulated

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page](), "run: python -m manual --write"


def test_the_commands_have_each_command_its_options_and_their_defaults() -> None:
    page = commands.page()
    assert all(f"## ternbus {name}\n" in page for name in COMMANDS)
    assert "| `--partition TEXT` | Part of the data that this device trains on: all, iid:I/N" in page
    assert "| `--federation TEXT` | Name of the federation, for the first start. | home |" in page
    assert "| 4 | device: its owner's privacy budget is spent |" in page
    assert "ternbus edge join INVITATION.toml DIR [OPTIONS]" in page


def test_the_settings_have_each_key_with_type_default_range_and_unit() -> None:
    page = settings.page()
    assert "| `max_wait_s` | number | `30` | 0.01 to 10,000,000 | s |" in page
    assert '| `rule` | text | `"mean"` | mean, median, trimmed-mean, krum, multi-krum, norm-clip |' in page
    assert "| `latency_s` | number | `0.02` | 0 to 3,600 | s | one way |" in page
    assert all(f"| `{name}`" in page for name in plan_keys.KEYS)


def test_the_python_page_has_each_public_name_with_its_signature() -> None:
    page = api.page()
    assert "### ternbus.lab.Federation\n" in page
    assert "dirichlet(alpha: float, devices: int = partitions.DEVICES) -> Parts" in page
    assert "### ternbus.edge.adapters.SklearnTask\n" in page


def test_a_comment_behind_a_key_is_read_and_a_missing_one_is_an_error() -> None:
    assert source.comments(exit_codes)["EXIT_DONE"] == "done"
    assert source.bounds(simulated)["simulate.latency_s"] == (0, 3600)
    with pytest.raises(ManualError, match=r"Simulated\.jitter has no comment behind it"):
        source.field_comments(simulated.Simulated)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (None, None, ""),
        (0, None, "at least 0"),
        (None, 5, "at most 5"),
        (0, 2**32 - 1, "0 to 2^32 - 1"),
        (-(2**63), 2**64 - 1, "-2^63 to 2^64 - 1"),
        (0, 1 - 1e-9, "0 to below 1"),
        (1e-9, 1e7, "1e-09 to 10,000,000"),
    ],
)
def test_a_range_is_one_that_people_read(low: float | None, high: float | None, text: str) -> None:
    assert markdown.interval(low, high) == text


def test_every_page_of_the_manual_is_in_the_navigation_once() -> None:
    missing = site.unlisted(ROOT)
    assert not missing, f"add a line for {missing[0]} to one section of {site.INDEX}"


def test_every_page_of_the_manual_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"]({site.INDEX})" in text
    assert "](docs/tutorial.md)" in text


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    made = site.build(ROOT, tmp_path)
    pages = sorted(made.rglob("*.html"))
    assert {"index.html", "docs/tutorial.html", "docs/reference/api.html"} <= {
        page.relative_to(made).as_posix() for page in pages
    }
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?(https?:)?//""")
    assert [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
    sheets = [sheet.read_text(encoding="utf-8") for sheet in made.rglob("*.css")]
    assert sheets
    assert not any(re.search(r"""url\(["']?(?:https?:)?//""", sheet) for sheet in sheets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("[gone](gone.md)", "docs/page.md: the link to gone.md leads to no file"),
        ("[gone](README.md#gone)", "anchor does not exist"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(broken: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Home\n")
    (tmp_path / "docs" / "README.md").write_text("# All\n\n## Begin\n\n- [Page](page.md): one\n")
    (tmp_path / "docs" / "page.md").write_text(f"# Page\n\n{broken}\n")
    with pytest.raises(ManualError, match=text):
        site.build(tmp_path, tmp_path / "build")


def test_a_page_that_is_not_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("# All\n\n## Begin\n\n- [Page](page.md): one\n")
    for name in ("page.md", "new.md"):
        (tmp_path / "docs" / name).write_text("# Page\n")
    with pytest.raises(ManualError, match=r"docs/new\.md is not in the navigation: add a line for it"):
        site.build(tmp_path, tmp_path / "build")
