"""A headless Chromium for tests of the dashboard, and what a page did there."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH: Final = next((found for name in NAMES if (found := shutil.which(name))), None)
DESKTOP: Final = {"width": 1280, "height": 900}
PHONE: Final = {"width": 390, "height": 844}
OPTIONS: Final = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """The machine's own; the test is skipped where there is none."""
    if PATH is None:
        pytest.skip("no chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own refuses root
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=[*OPTIONS, *sandbox])
        try:
            yield browser
        finally:
            browser.close()


@dataclass(slots=True)
class Seen:
    """A page, and what went wrong in it."""

    page: "Page"
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def check(self, authority: str) -> None:
        """Nothing failed, nothing was refused by the content policy, nothing came from elsewhere."""
        assert self.errors == []
        assert self.hosts <= {authority}


@contextmanager
def opened(browser: "Browser", url: str, *, viewport: dict[str, int] | None = None, **about: Any) -> Iterator[Seen]:
    """The page at an address, in a profile of its own."""
    context = browser.new_context(viewport=viewport or DESKTOP, **about)  # type: ignore[arg-type]
    page = context.new_page()
    seen = Seen(page)

    def note(text: str) -> None:
        # what a test provokes: an answer that refuses, a server that has ended
        if not re.search(r"status of 4\d\d|ERR_(CONNECTION|EMPTY_RESPONSE|INCOMPLETE|ABORTED)", text):
            seen.errors.append(text)

    def refuse(dialog: "Dialog") -> None:
        seen.errors.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda message: note(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: note(str(error)))
    page.on("dialog", refuse)
    page.on("request", lambda request: seen.hosts.add(request.url.partition("://")[2].partition("/")[0]))
    try:
        page.goto(url)
        yield seen
    finally:
        context.close()
