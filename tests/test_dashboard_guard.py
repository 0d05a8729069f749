"""The dashboard and people with bad intentions: foreign hosts and pages, guesses, floods, odd paths."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.dashboards import WITHIN_S, Log, Site, next_state, serving
from support.small_world import make_directory, scratch
from ternbus.aggregator.dashboard.app import VIEWERS_MAX
from ternbus.aggregator.dashboard.audit import Audit
from ternbus.aggregator.dashboard.connections import CONNECTIONS_MAX, SILENT_S
from ternbus.aggregator.dashboard.guard import BODY_BYTES_MAX
from ternbus.aggregator.dashboard.sessions import ALL_TRIES, LIFE_S, SESSIONS_MAX, TRIES, Sessions, TooManyError
from ternbus.aggregator.shell import dashboard_token
from ternbus.aggregator.store import status
from ternbus.broker.errors import ConfigError

pytestmark = pytest.mark.slow
READS = ("/history", "/devices", "/versions/0", "/health", "/metrics", "/events")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Logged in."""
    with serving(make_directory(scratch() / "aggregator")) as site:
        site.log_in()
        yield site


@pytest.fixture(scope="module")
def private() -> Iterator[Site]:
    """One that other machines could reach by a proxy's name; nobody is logged in."""
    with serving(make_directory(scratch() / "aggregator"), "127.0.0.1:0", "fl.example") as site:
        yield site


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "10.1.2.3", "a@127.0.0.1",
     "127.0.0.1/", "[::2]", "[", "", "x" * 5000],
)  # fmt: skip
def test_another_host_is_refused(site: Site, host: str) -> None:
    for path in ("/", "/events", "/session"):
        answer = site.request("GET", path, headers={"Host": host})
        assert answer.status == 421, host
    assert site.request("POST", "/login", b"{}", {"Host": host, "Origin": f"http://{host}"}).status == 421


def test_no_host_at_all_is_refused(site: Site) -> None:
    with socket.create_connection((site.host, site.port), timeout=WITHIN_S) as line:
        line.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 421 " in line.recv(1000)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8080", "localhost."])
def test_names_of_this_machine_are_taken(site: Site, host: str) -> None:
    assert site.request("GET", "/", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "http://127.0.0.1", "http://127.0.0.1:1", "file://", "https://localhost"],
)
def test_a_request_from_another_origin_does_nothing(site: Site, origin: str | None) -> None:
    for path in ("/login", "/logout", "/actions/pause"):
        assert site.request("POST", path, b"{}", {"Origin": origin}).status == 403
    assert status.read(site.directory)["state"] == "open"


def test_another_site_s_form_does_nothing(site: Site) -> None:
    assert site.post("/actions/pause", Sec_Fetch_Site="cross-site").status == 403
    assert site.post("/actions/pause", Sec_Fetch_Site="same-site").status == 403  # another port of this host
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
        assert site.request("POST", "/actions/pause", b"{}", {"Content-Type": kind}).status == 415
    assert status.read(site.directory)["state"] == "open"


def test_an_action_needs_the_session_and_the_page_s_token(site: Site) -> None:
    assert site.post("/actions/pause", X_CSRF_Token=None).status == 403
    assert site.post("/actions/pause", X_CSRF_Token="guess").status == 403
    assert site.post("/actions/pause", Cookie=None).status == 401
    assert site.post("/actions/pause", Cookie=f"ternbus-{site.port}=guess").status == 401
    assert site.get("/actions/pause").status == 405
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        assert site.request(method, "/actions/pause").status == 405
    assert status.read(site.directory)["state"] == "open"


def test_the_cookie_and_all_answers_are_marked(site: Site) -> None:
    answer = site.post("/login", {"token": dashboard_token.read(site.directory)})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie
    for found in (answer, site.get("/"), site.get("/nothing"), site.get("/", Host="evil.example")):
        policy = found.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in found.headers
    assert site.get("/session").headers["cache-control"] == "no-store"


def test_tokens_are_not_guessed() -> None:
    directory = make_directory(scratch() / "aggregator")
    with serving(directory) as site:
        codes = [site.post("/login", {"token": f"guess-{number}"}).status for number in range(TRIES + 3)]
        assert codes == [403] * TRIES + [429] * 3
        right = site.post("/login", {"token": dashboard_token.read(directory)})
        assert (right.status, right.headers["retry-after"]) == (429, "60")
        assert not (directory / "dashboard-audit.jsonl").exists()  # what strangers do pushes no action out


def test_refused_logins_are_counted_and_push_no_action_out(tmp_path: Path) -> None:
    log = Log()
    audit = Audit.open(tmp_path, log)
    audit.note("127.0.0.1, session a", "pause", "", "paused")
    for number in range(500):
        audit.refused_login(f"10.0.0.{number % 256}", "a wrong token")
    first, second = audit.records()
    assert first.result == "refused, 500 times since the dashboard started: a wrong token"
    assert (second.what, first.done, second.done) == ("pause", False, True)
    assert 2 <= len(log.lines) < 20
    again = Audit.open(tmp_path, log)
    assert [each.what for each in again.records()] == ["pause"]


def test_guesses_of_many_addresses_are_counted_together(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "aggregator")
    dashboard_token.make(directory)
    now = [0.0]
    sessions = Sessions(directory, clock=lambda: now[0])
    for number in range(ALL_TRIES):
        assert not sessions.is_token("guess", f"10.0.0.{number}")
    with pytest.raises(TooManyError):
        sessions.is_token("guess", "10.0.1.1")
    now[0] += 60
    assert sessions.is_token(dashboard_token.read(directory), "10.0.1.1")
    for number in range(3000):
        now[0] += 10
        sessions.is_token("guess", f"peer-{number}")
    assert len(sessions._peers) <= 1000


def test_a_session_ends_by_itself_and_there_are_not_many(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "aggregator")
    dashboard_token.make(directory)
    now = [0.0]
    sessions = Sessions(directory, clock=lambda: now[0])
    first, session = sessions.begin()
    assert sessions.find(first) == session
    assert sessions.find("") is None
    now[0] = LIFE_S
    assert sessions.find(first) is None
    cookies = [sessions.begin()[0] for _ in range(SESSIONS_MAX + 1)]
    assert sessions.find(cookies[0]) is None
    assert sessions.find(cookies[-1]) is not None


def test_a_giant_body_is_not_read(site: Site) -> None:
    assert site.request("POST", "/login", b" " * (BODY_BYTES_MAX + 1)).status == 413
    assert site.request("POST", "/login", b"", {"Content-Length": None, "Transfer-Encoding": "chunked"}).status == 413
    head = (
        f"POST /login HTTP/1.1\r\nHost: {site.authority}\r\nOrigin: http://{site.authority}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {10**12}\r\n\r\n"
    )
    with socket.create_connection((site.host, site.port), timeout=WITHIN_S) as line:
        line.sendall(head.encode())
        assert b" 413 " in _rest(line)  # the end comes without the body
    with socket.create_connection((site.host, site.port), timeout=WITHIN_S) as line:
        line.sendall(f"GET / HTTP/1.1\r\nHost: {site.authority}\r\nX: ".encode())
        with suppress(ConnectionError):
            for _ in range(100):
                line.sendall(b"x" * 100_000)
            line.sendall(b"\r\n\r\n")
        assert b" 200 " not in _rest(line)
    assert site.get("/session").status == 200


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/%2e%2e/dashboard.token", "/static//etc/passwd",
     "/static/uPlot.LICENSE", "/static/vendor/uPlot.min.css", "/static/", "/static/app.js%00", "/dashboard.token",
     "/static/..\\app.py", "//etc/passwd", "/versions/-1", "/versions/x", "/versions/99999999999999999999999"],
)  # fmt: skip
def test_no_path_leads_to_a_file(site: Site, path: str) -> None:
    assert site.get(path).status in {404, 409}


def test_a_path_is_not_long(private: Site) -> None:
    """A number of thousands of digits is an error of Python's own: lines of a log for whoever asks for it."""
    for path in (f"/versions/{'9' * 5000}", f"/static/{'x' * 1000}"):
        assert private.get(path).status == 414


def test_a_link_in_place_of_the_token_or_the_audit_is_not_followed(tmp_path: Path) -> None:
    directory, other = make_directory(tmp_path / "aggregator"), tmp_path / "other"
    other.write_text("mine")
    (directory / "dashboard-audit.jsonl").symlink_to(other)
    with serving(directory) as site:
        site.log_in()  # is written to the log, and to no file
        assert other.read_text() == "mine"
    (directory / dashboard_token.FILE).unlink()
    (directory / dashboard_token.FILE).symlink_to(other)
    dashboard_token.make(directory)
    assert other.read_text() == "mine"
    assert not (directory / dashboard_token.FILE).is_symlink()


def test_beyond_this_machine_reading_needs_the_token(private: Site) -> None:
    for path in READS:
        assert private.get(path).status == 401, path
        assert private.get(path, Host="fl.example").status == 401
    assert private.get("/").status == 200  # which holds nothing
    session = private.get("/session").json
    assert session["may_read"] is False
    assert str(private.directory) not in json.dumps(session)
    token = dashboard_token.read(private.directory)
    assert private.get("/metrics", Authorization=f"Bearer {token}").status == 200
    assert private.get("/health", Authorization=f"Bearer {token}x").status == 403
    assert private.post("/actions/pause", Authorization=f"Bearer {token}").status == 401  # a page acts, or a command
    with private.events(Authorization=f"Bearer {token}") as stream:
        assert next_state(stream)["head"]["version"] == 0
    inside = Site(private.directory, private.host, private.port)
    inside.log_in()
    assert inside.get("/history").status == 200
    with inside.events() as stream:
        assert next_state(stream)["head"]["version"] == 0
        inside.post("/logout")
        while not (line := stream.readline()).startswith(b"event: logout"):
            assert line  # what is left of a look
    secure = private.request(
        "POST",
        "/login",
        json.dumps({"token": token}).encode(),
        {"Host": "fl.example", "Origin": "https://fl.example"},
    )
    assert "secure" in secure.headers["set-cookie"].lower()


def test_an_address_for_all_machines_is_private_and_said_to_be_open() -> None:
    log = Log()
    with serving(make_directory(scratch() / "aggregator"), "0.0.0.0:0", log=log) as site:  # reached by 127.0.0.1
        assert any("open to the network" in line for line in log.lines)
        assert site.get("/history").status == 401
        assert site.get("/", Host="0.0.0.0").status == 200
        assert site.get("/", Host="evil.example").status == 421


def test_a_loopback_address_behind_a_proxy_is_private_and_not_said_to_be_open() -> None:
    log = Log()
    with serving(make_directory(scratch() / "aggregator"), "127.0.0.1:0", "fl.example", log=log) as site:
        assert site.get("/history", Host="fl.example").status == 401
        assert not any("open to the network" in line for line in log.lines)


def test_fifty_viewers_are_served_and_too_many_are_refused(site: Site) -> None:
    with ExitStack() as stack:
        began = time.monotonic()
        streams = [stack.enter_context(site.events()) for _ in range(50)]
        looks = [next_state(stream)["at"] for stream in streams]
        assert len(set(looks)) <= time.monotonic() - began + 2  # shared, one a second
        while len(streams) <= VIEWERS_MAX:
            streams.append(stack.enter_context(site.events()))
            if streams[-1].status != 200:
                break
            next_state(streams[-1])
        assert streams[-1].status == 503
        assert site.get("/session").status == 200
    deadline = time.monotonic() + WITHIN_S
    while True:  # the places are free again
        with site.events() as stream:
            if stream.status == 200:
                break
        assert time.monotonic() < deadline


def test_a_viewer_that_reads_nothing_holds_nobody_up_and_gets_the_newest(site: Site) -> None:
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((site.host, site.port))
        slow.sendall(f"GET /events HTTP/1.1\r\nHost: {site.authority}\r\n\r\n".encode())
        with site.events() as stream:
            for _ in range(5):
                next_state(stream)
        assert site.get("/session").status == 200


def test_silent_connections_end_and_there_are_not_too_many() -> None:
    with serving(make_directory(scratch() / "aggregator")) as site:
        assert site.get("/session").status == 200
        lines = []
        try:
            for number in range(CONNECTIONS_MAX + 20):
                lines.append(socket.create_connection((site.host, site.port), timeout=SILENT_S + WITHIN_S))
                if number % 2:
                    lines[-1].sendall(b"GET / HTTP/1.1\r\nX-Slow: ")  # and never an end
            for line in lines[-10:]:
                assert _ended(line)  # beyond the limit: at once
            assert _ended(lines[0])
            assert _ended(lines[1])
        finally:
            for line in lines:
                line.close()
        assert site.get("/session").status == 200


def _rest(line: socket.socket) -> bytes:
    """All that comes until the end."""
    found = b""
    with suppress(ConnectionError):
        while content := line.recv(100_000):
            found += content
    return found


def _ended(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_body_that_comes_slowly_is_not_waited_for_long(site: Site) -> None:
    head = (
        f"POST /login HTTP/1.1\r\nHost: {site.authority}\r\nOrigin: http://{site.authority}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with socket.create_connection((site.host, site.port), timeout=WITHIN_S) as line:
        line.sendall(head.encode())
        assert b" 408 " in line.recv(1000)


def test_garbage_is_answered_and_ends_nothing(site: Site) -> None:
    for content in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"\xff" * 300 + b"\r\n\r\n",
    ):
        with socket.create_connection((site.host, site.port), timeout=WITHIN_S) as line:
            line.sendall(content)
            line.shutdown(socket.SHUT_WR)
            line.recv(1000)
    assert site.get("/session").status == 200


def test_there_is_no_token_without_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        dashboard_token.ensure(tmp_path / "nothing")
