"""The site: all documents of the repository, built by Zensical into one folder that needs no network.

The navigation is that of docs/README.md. Zensical wants all pages below one folder, so the documents are copied there,
at the same places, with the files that they link to.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from manual.errors import ManualError

INDEX = "docs/README.md"
HOME = "README.md"
LINK = re.compile(r"(\]\()([^()\s#]+)((?:#[^()\s]*)?\))")
BLOCK = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)
ENTRY = re.compile(r"^- \[([^]]+)\]\(([^)]+)\)", flags=re.MULTILINE)
# No fonts, icons or scripts of others' hosts; plain Markdown, as other readers of it have.
CONFIG = """\
[project]
site_name = "Ternbus"
site_description = "Asynchronous federated learning over MQTT, with signed, ternary-compressed updates"
docs_dir = "pages"
site_dir = "site"
use_directory_urls = false
nav = {nav}

[project.theme]
font = false
language = "en"
features = ["navigation.top", "toc.follow", "content.code.copy", "search.highlight"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"

[project.validation]
invalid_links = true
invalid_link_anchors = true

[project.markdown_extensions.tables]

[project.markdown_extensions.toc]
permalink = true
slugify = {{ object = "pymdownx.slugs.slugify", kwds = {{ case = "lower" }} }}

[project.markdown_extensions.pymdownx.highlight]

[project.markdown_extensions.pymdownx.superfences]
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A page in the navigation: its section, its title, and its path from the repository's root."""

    section: str
    title: str
    path: str


def navigation(root: Path) -> list[Entry]:
    """The entries of docs/README.md, in order."""
    text = (root / INDEX).read_text(encoding="utf-8")
    entries = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        for title, target in ENTRY.findall(body):
            path = ((root / INDEX).parent / target).resolve()
            entries.append(Entry(heading.strip(), title, path.relative_to(root.resolve()).as_posix()))
    return entries


def unlisted(root: Path) -> list[str]:
    """The pages below docs/ that docs/README.md does not list, or lists twice."""
    listed = [entry.path for entry in navigation(root)]
    pages = [path.relative_to(root).as_posix() for path in sorted((root / "docs").rglob("*.md"))]
    return [page for page in pages if page != INDEX and listed.count(page) != 1]


def build(root: Path, folder: Path) -> Path:
    """Build the site into ``folder``/site, which is replaced; a link that leads nowhere is an error."""
    if missing := unlisted(root):
        raise ManualError(f"{missing[0]} is not in the navigation: add a line for it to one section of {INDEX}")
    pages, made = folder / "pages", folder / "site"
    for old in (pages, made):
        shutil.rmtree(old, ignore_errors=True)
    _stage(root.resolve(), pages)
    (folder / "zensical.toml").write_text(CONFIG.format(nav=_nav(root)), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(folder / "zensical.toml")]
    plain = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)
    if done.returncode or not (made / "index.html").exists():
        raise ManualError(f"the site was not built: {(done.stdout + done.stderr).partition('Traceback')[0]}".rstrip())
    return made


def _nav(root: Path) -> str:
    """The value of `nav`, as TOML."""
    sections: dict[str, list[str]] = {}
    for entry in navigation(root):
        sections.setdefault(entry.section, []).append(f"{{ {_text(entry.title)} = {_text(entry.path)} }}")
    top = [f'{{ "Ternbus" = {_text(HOME)} }}', f'{{ "All pages" = {_text(INDEX)} }}']
    top += [f"{{ {_text(name)} = [{', '.join(entries)}] }}" for name, entries in sections.items()]
    return f"[{', '.join(top)}]"


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _stage(root: Path, pages: Path) -> None:
    """Copy the pages of the navigation, and whatever they link to, from page to page."""
    waiting, done = [HOME, INDEX, *(entry.path for entry in navigation(root))], set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        source, target = root / name, pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text, linked = _linked(root, source) if source.exists() else _listed(root, source.parent)
            target.write_text(text, encoding="utf-8")
            waiting += linked
        else:
            shutil.copyfile(source, f"{target}{_ending(source)}")


def _linked(root: Path, page: Path) -> tuple[str, list[str]]:
    """The page's text with links that work on the site, and the files of ours that it links to."""
    linked: list[str] = []

    def changed(found: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", found[2]):
            return found[0]
        target = (page.parent / found[2]).resolve()
        if target.is_dir():
            target /= "README.md"
        if not target.is_file() and not (page.parent / found[2]).is_dir():
            raise ManualError(f"{page.relative_to(root)}: the link to {found[2]} leads to no file: correct it")
        linked.append(target.relative_to(root.resolve()).as_posix())
        return f"{found[1]}{os.path.relpath(target, page.parent.resolve())}{_ending(target)}{found[3]}"

    parts = BLOCK.split(page.read_text(encoding="utf-8"))
    return "".join(part if number % 2 else LINK.sub(changed, part) for number, part in enumerate(parts)), linked


def _listed(root: Path, folder: Path) -> tuple[str, list[str]]:
    """A page for a folder that has none: its files, each with the first sentence in it; and these files."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix == ".py"]
    lines = [f"# {folder.relative_to(root).as_posix()}/", ""]
    for path in files:
        about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        lines.append(f"- [{path.name}]({path.name}{_ending(path)}): {' '.join(about.split())}")
    return "\n".join([*lines, ""]), [path.relative_to(root).as_posix() for path in files]


def _ending(path: Path) -> str:
    """A file of source is shown as text, not downloaded."""
    return "" if path.suffix in {".md", ".png", ".svg", ".html", ".txt"} else ".txt"
