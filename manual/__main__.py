"""``python -m manual``: compare or write the generated pages, or build the site."""

import argparse
import sys
from pathlib import Path

from manual import api, commands, settings, site

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    ROOT / "docs" / "reference" / "cli.md": commands.page,
    ROOT / "docs" / "reference" / "settings.md": settings.page,
    ROOT / "docs" / "reference" / "api.md": api.page,
}


def main() -> None:
    """Exit with code 1 if a generated page differs from what the code says, or a link of the site leads nowhere."""
    parser = argparse.ArgumentParser(prog="python -m manual", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--write", action="store_true", help="write the generated pages into docs/reference")
    parser.add_argument("--site", action="store_true", help="build the site into build/site")
    chosen = parser.parse_args()
    for path, page in PAGES.items():
        name, text = path.relative_to(ROOT).as_posix(), page()
        if chosen.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{name} is not what the code says: run python -m manual --write")
    if chosen.site:
        print(f"the site: {site.build(ROOT, ROOT / 'build').relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
