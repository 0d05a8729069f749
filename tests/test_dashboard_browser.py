"""The dashboard in a headless Chromium: against a real federation, by keyboard, on a phone, by axe."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.browser import PHONE, Seen, chromium, opened
from support.dashboards import Site, serving
from support.small_world import Bench, make_directory, scratch, ternary_block
from ternbus.aggregator.core import records
from ternbus.aggregator.shell import dashboard_token
from ternbus.aggregator.store import status
from ternbus.aggregator.store.ledger import LEDGER, Ledger, reading
from ternbus.aggregator.store.version_traffic import kept
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Metrics

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
WITHIN_MS = 60_000
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
SCENARIO = """
task = "digits-numpy"
devices = 4
[speeds]
median_s = 0.2
[aggregator.merge]
buffer_size = 2
[end]
versions = 100000
"""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def federation() -> Iterator[Site]:
    """A federation of processes that runs, as `make demo` starts it."""
    folder = scratch()
    (folder / "scenario.toml").write_text(SCENARIO)
    command = [
        sys.executable,
        "-m",
        "ternbus",
        "lab",
        "run",
        str(folder / "scenario.toml"),
        "--out",
        str(folder / "out"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as lab:
        assert lab.stdout is not None
        try:
            for line in lab.stdout:
                if found := re.match(r"dashboard while it runs: http://([\d.]+):(\d+)/", line):
                    break
            else:
                raise AssertionError("no address was shown")
            yield Site(folder / "out" / "aggregator", found[1], int(found[2]))
        finally:
            os.kill(lab.pid, signal.SIGINT)
            lab.stdout.read()
            assert lab.wait(60) == 130


@pytest.fixture
def federation_page(browser: "Browser", federation: Site) -> Iterator[Seen]:
    with opened(browser, f"http://{federation.authority}/") as seen:
        wait_for_figures(seen.page)
        yield seen
        seen.check(federation.authority)


def until(page: "Page", holds: str) -> None:
    """Wait until an expression holds; Playwright's own way needs `eval` in the page, which its policy forbids."""
    deadline = time.monotonic() + WITHIN_MS / 1000
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, holds
        page.wait_for_timeout(50)


def wait_for_figures(page: "Page") -> None:
    page.wait_for_selector("#tiles dd", timeout=WITHIN_MS)
    page.wait_for_selector("#devices tbody tr", timeout=WITHIN_MS)


def log_in(page: "Page", site: Site) -> None:
    page.click("#login")
    page.fill("[name=token]", dashboard_token.read(site.directory))
    page.click("#dialog-do")
    page.wait_for_selector("#logout:visible")


def violations(browser: "Browser", site: Site, prepare: Any, **about: Any) -> list[str]:
    """What axe finds; it is injected, which the content policy of the page would not let happen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with opened(browser, f"http://{site.authority}/", bypass_csp=True, **about) as seen:
        wait_for_figures(seen.page)
        if prepare is not None:
            prepare(seen.page, site)
        found = axe.run(seen.page).response["violations"]
    return [f"{each['id']}: {[node['html'][:200] for node in each['nodes']]}" for each in found]


def test_health_comes_first_and_figures_follow_the_federation(federation_page: Seen) -> None:
    page = federation_page.page
    assert page.text_content("#federation") == "lab"
    first = page.evaluate("document.querySelector('main section:not([hidden])').id")
    assert first == "health"
    assert page.text_content("#verdict") in {"Fine", "Degraded"}
    before = page.text_content("#tiles .value")
    assert before is not None
    until(page, f"document.querySelector('#tiles .value').textContent !== {before!r}")
    page.wait_for_selector("#metric-chart canvas", timeout=WITHIN_MS)
    page.wait_for_selector("#rate-chart canvas", timeout=WITHIN_MS)
    page.wait_for_selector("#bytes-chart canvas", timeout=WITHIN_MS)
    until(page, "document.querySelector('#metric-chart').ariaLabel.includes('between')")
    page.check("[name=across][value=time]")
    until(page, "document.querySelector('#metric-chart').ariaLabel.includes(' at ')")
    page.select_option("#metric", "loss")
    until(page, "document.querySelector('#metric-caption').textContent.startsWith('loss')")
    assert page.locator("#devices tbody tr").count() == 5  # four and an evaluator
    assert page.locator("#login").is_visible()
    for name in ("#pause", "#invite", "#logout", "#audit-section"):
        assert page.locator(name).is_hidden()


def entered(page: "Page", site: Site) -> None:
    log_in(page, site)
    page.wait_for_selector("#audit tbody tr")


def asked(page: "Page", _: Site) -> None:
    page.click("#login")


def entry(page: "Page", _: Site) -> None:
    page.click("#versions tbody tr:first-child button")
    page.wait_for_selector("#entry-content table")


@pytest.mark.parametrize(
    ("prepare", "about"),
    [
        (None, {}),
        (None, {"color_scheme": "dark"}),
        (entered, {"color_scheme": "dark", "viewport": PHONE}),
        (asked, {}),
        (entry, {"color_scheme": "dark"}),
    ],
    ids=["light", "dark", "phone, logged in", "dialog", "merge log"],
)
def test_axe_finds_nothing(browser: "Browser", federation: Site, prepare: Any, about: dict[str, Any]) -> None:
    assert violations(browser, federation, prepare, **about) == []


def test_everything_works_by_keyboard(federation_page: Seen, federation: Site) -> None:
    page = federation_page.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "login"
    page.keyboard.press("Enter")
    page.wait_for_selector("#dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#dialog", state="hidden")
    assert page.evaluate("document.activeElement.id") == "login"
    page.keyboard.press("Enter")
    page.keyboard.type(dashboard_token.read(federation.directory))
    page.keyboard.press("Enter")
    page.wait_for_selector("#logout:visible")
    page.focus("#devices thead th:first-child button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#devices thead th:first-child[aria-sort=ascending]")
    assert page.evaluate("document.activeElement.textContent").startswith("device")
    page.keyboard.press("Space")
    page.wait_for_selector("#devices thead th:first-child[aria-sort=descending]")
    until(page, "document.querySelector('#devices tbody th').textContent === 'evaluator'")


def test_a_person_pauses_tags_invites_revokes_and_rolls_back(federation_page: Seen, federation: Site) -> None:
    page, directory = federation_page.page, federation.directory
    log_in(page, federation)

    page.click("#pause")
    page.click("#dialog-do")
    until(page, "document.querySelector('#state').textContent === 'paused'")
    assert status.read(directory)["state"] == "paused"
    page.click("#pause")
    page.click("#dialog-do")
    until(page, "document.querySelector('#state').textContent === 'open'")

    page.click("text=Tag … >> nth=0")
    page.fill("[name=name]", "Not Good")
    page.click("#dialog-do")
    until(page, "document.querySelector('#dialog-fault').textContent.includes('invalid tag')")
    page.fill("[name=name]", "good")
    page.click("#dialog-do")
    page.wait_for_selector("#dialog", state="hidden")
    with reading(directory) as ledger:
        version = kept(ledger).tags["good"]

    page.click("#invite")
    page.fill("[name=device]", "newcomer")
    with page.expect_download() as downloading:
        page.click("#dialog-do")
    path = downloading.value.path()
    assert Invitation.loads(Path(path).read_text(), "download").device == "newcomer"
    assert downloading.value.suggested_filename == "newcomer.toml"

    page.click("[aria-label='Revoke device-3 …']")
    page.fill("[name=reason]", "a test")
    page.fill("[name=confirm]", "device-2")
    page.click("#dialog-do")
    until(page, "document.querySelector('#dialog-fault').textContent.includes('type device-3')")
    assert status.read(directory)["devices"]["device-3"]["key_state"] == "active"
    page.fill("[name=confirm]", "device-3")
    page.click("#dialog-do")
    page.wait_for_selector("#dialog", state="hidden", timeout=WITHIN_MS)
    assert status.read(directory)["devices"]["device-3"]["revoked_why"] == "a test"

    while not page.locator(f"[aria-label='Roll back … version {version}']").count():
        page.click("#versions-more")
    page.click(f"[aria-label='Roll back … version {version}']")
    page.fill("[name=confirm]", str(version))
    page.click("#dialog-do")
    until(page, f"document.querySelector('#said').textContent.includes('is version {version} again')")

    # the page reads it now and then; there may be any number of logins
    until(page, "document.querySelector('#audit tbody').textContent.includes('rollback')")
    audit = page.text_content("#audit tbody")
    assert audit is not None
    for what in ("login", "pause", "resume", "tag", "invite", "revoke", "rollback"):
        assert what in audit
    page.click("#logout")
    page.wait_for_selector("#login:visible")
    assert page.locator("#audit-section").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(browser: "Browser", federation: Site, scheme: Any) -> None:
    url = f"http://{federation.authority}/"
    with opened(browser, url, viewport=PHONE, color_scheme=scheme, is_mobile=True, has_touch=True) as seen:
        wait_for_figures(seen.page)
        log_in(seen.page, federation)
        width, ground = seen.page.evaluate(
            "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
        )
        assert width <= PHONE["width"]
        light = sum(int(part) for part in re.findall(r"\d+", ground)[:3])
        assert (light > 600) == (scheme == "light")
        seen.check(federation.authority)


def test_what_devices_say_is_text(browser: "Browser") -> None:
    bench = Bench(make_directory(scratch() / "aggregator", merge__buffer_size=1))
    bench.start()
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    about = {"state": "idle", "session": 1, "base": 0, "software": HOSTILE[:30], "failing": HOSTILE}
    bench.receive(pi.topic("status"), pi.frame("status", about))
    meta = Metrics(version=1, samples=100, split="test", values={HOSTILE: 0.5}).meta()
    bench.receive(judge.topic("metrics"), judge.frame("metrics", meta))
    bench.tick(1.0)
    bench.close()
    with serving(bench.directory) as site, opened(browser, f"http://{site.authority}/") as seen:
        page = seen.page
        wait_for_figures(page)
        page.wait_for_selector("#metric-chart canvas", timeout=WITHIN_MS)
        assert HOSTILE in (page.text_content("#findings") or "")
        assert HOSTILE in (page.text_content("#devices tbody") or "")
        assert page.locator("main img").count() == 0
        assert page.locator("main script").count() == 0
        seen.check(site.authority)


def test_ten_thousand_devices_are_searched_sorted_and_paged(browser: "Browser") -> None:
    directory = make_directory(scratch() / "aggregator")
    ledger = Ledger(directory / LEDGER)
    names = [f"d{number:05}" for number in range(10_000)]
    ledger.write(records.DeviceEnrolled(device=name, public=bytes(32), proof=bytes(32)) for name in names)
    ledger.close()

    def first(page: "Page", name: str) -> None:
        expression = f"document.querySelector('#devices tbody th').textContent === '{name}'"
        until(page, expression)

    with serving(directory) as site, opened(browser, f"http://{site.authority}/") as seen:
        page = seen.page
        wait_for_figures(page)
        assert page.locator("#devices tbody tr").count() == 50
        assert "1 to 50 of 10,000 devices" in (page.text_content("#devices-about") or "")
        page.click("#devices-on")
        first(page, "d00050")
        page.click("#devices thead th:first-child button")
        page.click("#devices thead th:first-child button")
        first(page, "d09999")
        page.fill("#search", "d0123")
        first(page, "d01239")
        until(page, "document.querySelector('#devices-about').textContent.includes('that match, of 10,000')")
        assert page.locator("#devices tbody tr").count() == 10
        seen.check(site.authority)


def test_a_page_whose_aggregator_has_ended_says_so(browser: "Browser") -> None:
    with serving(make_directory(scratch() / "aggregator")) as site:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{site.authority}/")
        page.wait_for_selector("#tiles dd", timeout=WITHIN_MS)
    until(page, "document.querySelector('#verdict').textContent === 'Unknown'")
    assert "does not answer" in (page.text_content("#why") or "")
    assert "What stands below is of" in (page.text_content("#why") or "")
    assert page.title().startswith("?")
    context.close()


def test_beyond_this_machine_the_page_asks_for_the_token_first(browser: "Browser") -> None:
    directory = make_directory(scratch() / "aggregator")
    with (
        serving(directory, "127.0.0.1:0", "fl.example") as site,
        opened(browser, f"http://{site.authority}/") as seen,
    ):
        page = seen.page
        page.wait_for_selector("#locked:visible", timeout=WITHIN_MS)
        assert page.locator("#figures").is_hidden()
        log_in(page, site)
        page.wait_for_selector("#tiles dd", timeout=WITHIN_MS)
        assert page.locator("#locked").is_hidden()
        page.click("#logout")
        page.wait_for_selector("#locked:visible")
        seen.check(site.authority)


@pytest.mark.parametrize("names", [("fl.example",), ()], ids=["private", "public"])
def test_after_a_restart_the_page_says_that_its_login_has_ended(browser: "Browser", names: tuple[str, ...]) -> None:
    directory = make_directory(scratch() / "aggregator")
    context = browser.new_context()
    page = context.new_page()
    with serving(directory, "127.0.0.1:0", *names) as site:
        page.goto(f"http://{site.authority}/")
        log_in(page, site)
        page.wait_for_selector("#tiles dd", timeout=WITHIN_MS)
    with serving(directory, site.authority, *names) as again:
        page.wait_for_selector("#login:visible", timeout=WITHIN_MS)
        assert page.locator("#pause").is_hidden()
        if names:
            assert page.locator("#locked").is_visible()
            assert page.locator("#figures").is_hidden()
            assert page.text_content("#live") == "log in to read"
            assert page.title() == "Ternbus: log in"
        log_in(page, again)
        until(page, "document.querySelector('#live').textContent.startsWith('live')")
        assert page.locator("#figures").is_visible()
    context.close()


def test_the_tabs_of_a_browser_share_the_login(browser: "Browser") -> None:
    with serving(make_directory(scratch() / "aggregator")) as site:
        context = browser.new_context()
        first, second = context.new_page(), context.new_page()
        for page in (first, second):
            page.goto(f"http://{site.authority}/")
            page.wait_for_selector("#login:visible", timeout=WITHIN_MS)
        log_in(first, site)
        second.wait_for_selector("#logout:visible", timeout=WITHIN_MS)
        second.click("#logout")
        first.wait_for_selector("#login:visible", timeout=WITHIN_MS)
        log_in(second, site)
        first.click("#pause")
        first.click("#dialog-do")
        until(first, "document.querySelector('#said').textContent.startsWith('paused')")
        context.close()


def test_without_network_an_action_says_so_in_words(browser: "Browser") -> None:
    with (
        serving(make_directory(scratch() / "aggregator")) as site,
        opened(browser, f"http://{site.authority}/") as seen,
    ):
        page = seen.page
        log_in(page, site)
        page.wait_for_selector("#versions tbody button", timeout=WITHIN_MS)
        page.route("**/*", lambda route: route.abort("internetdisconnected"))
        page.click("#pause")
        page.click("#dialog-do")
        until(page, "document.querySelector('#dialog-fault').textContent.startsWith('No answer')")
        page.click("#dialog-cancel")
        page.click("#logout")
        until(page, "document.querySelector('#said').textContent.startsWith('No answer')")
        page.locator("#versions tbody button").first.click()
        until(page, "document.querySelector('#entry-content').textContent.startsWith('No answer')")


def test_an_answer_that_does_not_say_who_is_logged_in_is_told_in_words(browser: "Browser") -> None:
    """As a proxy gives it before the dashboard answers; then the page goes on."""
    with serving(make_directory(scratch() / "aggregator")) as site:
        context = browser.new_context()
        page = context.new_page()
        page.route("**/session", lambda route: route.fulfill(status=502, body="{}", content_type="application/json"))
        page.goto(f"http://{site.authority}/")
        until(page, "document.querySelector('#why').textContent.includes('its answer was 502')")
        page.unroute("**/session")
        page.wait_for_selector("#tiles dd", timeout=WITHIN_MS)
        until(page, "!document.querySelector('#why').textContent.includes('its answer was')")
        context.close()


def test_without_javascript_the_page_names_the_command_and_shows_no_empty_table(browser: "Browser") -> None:
    with (
        serving(make_directory(scratch() / "aggregator")) as site,
        opened(browser, f"http://{site.authority}/", java_script_enabled=False) as seen,
    ):
        assert "ternbus aggregator status DIR" in seen.page.inner_text("main")
        assert seen.page.locator("button:visible, table:visible").count() == 0


def test_a_long_name_leaves_a_phone_room_for_what_is_wrong(browser: "Browser") -> None:
    directory = make_directory(scratch() / "aggregator")
    ledger = Ledger(directory / LEDGER)
    ledger.write([records.DeviceEnrolled(device="w" * 64, public=bytes(32), proof=bytes(32))])
    ledger.close()
    with serving(directory) as site, opened(browser, f"http://{site.authority}/", viewport=PHONE) as seen:
        wait_for_figures(seen.page)
        box = seen.page.locator("#devices thead th >> nth=2").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= PHONE["width"]
