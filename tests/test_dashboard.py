"""The dashboard over a directory: what it shows, and what it does; by HTTP, as the page does."""

import json
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from support.dashboards import Log, Site, next_state, serving
from support.small_world import LAB, Bench, make_directory, scratch, ternary_block
from ternbus.aggregator.core import records
from ternbus.aggregator.dashboard import history as history_module
from ternbus.aggregator.dashboard.devices import LIMIT, Devices
from ternbus.aggregator.dashboard.history import KEPT, History
from ternbus.aggregator.shell import administration, dashboard_token, examination, rollback, version_commands
from ternbus.aggregator.store import status, version_traffic
from ternbus.aggregator.store.ledger import LEDGER, Ledger, reading
from ternbus.aggregator.store.version_traffic import Traffic
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.merge_log import Entry, unpack
from ternbus.broker.protocol.messages import Metrics

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=alert(1)>"


def filled(folder: Path) -> Bench:
    """A federation with four versions, a stale and a refused update, an evaluation, and a device that fails."""
    bench = Bench(make_directory(folder / "aggregator", merge__buffer_size=1, staleness__max=1))
    bench.start()
    pi, slow, judge = bench.join("pi"), bench.join("slow"), bench.join("judge", evaluator=True)
    for base in range(4):
        assert bench.send(pi, ternary_block(bench.schema, base), base)[0].outcome == "accepted"
    assert bench.send(slow, ternary_block(bench.schema, 9), 0)[0].outcome == "stale"
    assert bench.send(slow, b"nonsense", 4)[0].outcome == "invalid"
    meta = Metrics(version=3, samples=100, split="test", values={"accuracy": 0.75, HOSTILE: 1.0}).meta()
    bench.receive(judge.topic("metrics"), judge.frame("metrics", meta))
    bench.receive(slow.topic("status"), slow.frame("status", {**STATUS, "failing": HOSTILE}))
    bench.tick(1.0)
    return bench


STATUS = {"state": "idle", "session": 1, "base": -1, "software": ""}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Logged in."""
    bench = filled(scratch())
    bench.close()
    with serving(bench.directory) as site:
        site.log_in()
        yield site


def test_a_page_that_is_open_gets_the_state(site: Site) -> None:
    with site.events() as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        state = next_state(stream)
    assert (state["federation"], state["head"]["version"], state["head"]["state"]) == (LAB, 4, "open")
    assert state["health"]["state"] == "down"  # no process serves the directory
    assert state["health"]["findings"][0]["kind"] == "not-running"
    assert state["staleness"]["updates"] == [[0, 4]]
    assert (state["work"]["accepted"], state["work"]["stale"], state["work"]["invalid"]) == (4, 1, 1)
    assert state["work"]["share"] == pytest.approx(2 / 6)
    assert dict(state["rejections"])["stale"] == 1
    assert state["buffer"] == {"updates": 0, "size": 1}
    recent = state["recent"]
    assert recent["version"] == [0, 1, 2, 3, 4]
    assert recent["metrics"]["accuracy"] == [None, None, None, 0.75, None]
    assert all(size > 0 for size in recent["up_bytes"][1:])
    assert all(size > 0 for size in recent["down_bytes"][1:])


def test_all_viewers_share_one_look_a_second(site: Site) -> None:
    began = time.monotonic()
    with site.events() as first, site.events() as second:
        looks = [{next_state(stream)["at"] for _ in range(3)} for stream in (first, second)]
    assert looks[0] & looks[1]  # the same look, not one each
    assert len(looks[0] | looks[1]) <= time.monotonic() - began + 2


def test_the_history_is_given_from_any_version_on(site: Site) -> None:
    whole = site.get("/history").json
    assert whole["version"] == [0, 1, 2, 3, 4]
    assert site.get("/history?after=2").json["version"] == [3, 4]
    assert site.get("/history?after=x").json["version"] == whole["version"]


def test_a_version_s_merge_log_is_shown(site: Site) -> None:
    entry = site.get("/versions/2").json
    assert [row[0] for row in entry["updates"]] == ["pi"]
    with reading(site.directory) as ledger:
        signed = Entry.parse(unpack(ledger.db.execute("SELECT entry FROM log WHERE version = 2").fetchone()[0]).content)
    assert (entry["digest"], entry["previous"]) == (signed.digest.hex(), signed.previous.hex())
    assert entry["same_in_ledger"] is True
    assert site.get("/versions/99").status == 409
    assert "has no version 99" in site.get("/versions/99").json["error"]


def test_the_table_of_devices_has_what_is_wrong_first(site: Site) -> None:
    page = site.get("/devices").json
    assert (page["total"], page["matching"]) == (3, 3)
    assert page["rows"][0]["name"] == "slow"
    assert HOSTILE in page["rows"][0]["findings"][0]  # as it is: the page sets it as text
    assert [row["name"] for row in site.get("/devices?sort=name&descending=yes").json["rows"]] == [
        "slow",
        "pi",
        "judge",
    ]
    assert [row["name"] for row in site.get("/devices?search=JUD").json["rows"]] == ["judge"]
    assert site.get("/devices?sort=key").status == 409


def test_health_is_core_health_as_json(site: Site) -> None:
    answer = site.get("/health")
    assert answer.status == 503  # down
    assert answer.json["state"] == "down"
    expected = examination.look(site.directory).health.as_json()
    assert answer.json.keys() == expected.keys()
    assert answer.json["findings"] == expected["findings"]


def test_metrics_are_beside_the_page(site: Site) -> None:
    answer = site.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert b"ternbus_" in answer.body


def test_the_page_and_its_files_come_from_here_alone(site: Site) -> None:
    page = site.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name in ("app.js", "style.css", "uPlot.iife.min.js", "uPlot.min.css", "icon.svg"):
        found = site.get(f"/static/{name}")
        assert found.status == 200
        assert site.get(f"/static/{name}", If_None_Match=found.headers["etag"]).status == 304
    folder = Path(history_module.__file__).parent / "static"
    own = [each for each in folder.iterdir() if each.suffix in {".js", ".css", ".html", ".svg"}]
    assert len(own) >= 8
    for each in own:
        text = each.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text


def test_pause_and_resume_are_what_the_commands_do(site: Site) -> None:
    assert site.post("/actions/pause").json["text"].startswith("paused")
    assert status.read(site.directory)["state"] == "paused"
    assert site.post("/actions/resume").status == 200
    assert status.read(site.directory)["state"] == "open"


def test_a_version_is_tagged_and_rolled_back_to(site: Site) -> None:
    assert site.post("/actions/tag", {"version": 2, "name": "good"}).status == 200
    with reading(site.directory) as ledger:
        assert version_traffic.kept(ledger).tags == {"good": 2}
    before = administration.tensors_of(site.directory, 2)
    assert "is version 2 again" in site.post("/actions/rollback", {"version": 2}).json["text"]
    after = administration.tensors_of(site.directory, None)
    assert after[0] > 4
    assert after[1] == before[1]
    refused = site.post("/actions/tag", {"version": 2, "name": "no good"})
    assert refused.status == 409
    assert "invalid tag" in refused.json["error"]
    assert site.post("/actions/rollback", {"version": 999_999}).status == 409
    assert site.post("/actions/rollback", {"version": -1}).status == 409
    assert site.post("/actions/rollback", {"version": "2"}).status == 409


def test_an_invitation_is_handed_out_once_and_is_nowhere_else(site: Site) -> None:
    done = site.post("/actions/invite", {"device": "new-one", "expires_in": "1h"}).json
    invitation = Invitation.loads(done["content"], "the answer")
    assert (invitation.device, invitation.federation, done["file"]) == ("new-one", LAB, "new-one.toml")
    assert invitation.code not in json.dumps(site.get("/audit").json)
    for path in site.directory.rglob("*"):
        if path.is_file() and not path.name.startswith(LEDGER):  # which has the code, to compare
            assert invitation.code.encode() not in path.read_bytes()
    assert site.post("/actions/invite", {"device": "Not A Name"}).status == 409
    assert site.post("/actions/invite", {"device": "a", "expires_in": "soon"}).status == 409


def test_a_device_is_revoked_with_a_reason(site: Site) -> None:
    answer = site.post("/actions/revoke", {"device": "slow", "reason": "stolen"})
    assert answer.json["text"].startswith("slow is revoked")
    row = status.read(site.directory)["devices"]["slow"]
    assert (row["key_state"], row["revoked_why"]) == ("revoked", "stolen")
    assert site.post("/actions/revoke", {"device": "nobody"}).status == 409


def test_what_an_action_does_not_take_is_refused(site: Site) -> None:
    assert site.post("/actions/close").status == 404
    assert "takes no directory" in site.post("/actions/pause", {"directory": "/"}).json["error"]
    assert site.post("/actions/invite", {"device": 7}).status == 409
    assert site.post("/actions/invite", {"device": "a", "evaluator": "yes"}).status == 409
    assert site.request("POST", "/actions/pause", b"[]").status == 400
    assert site.request("POST", "/actions/pause", b"{").status == 400
    assert site.request("POST", "/actions/pause", b"[" * 4000).status == 400


def test_a_file_that_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    bench = Bench(make_directory(tmp_path / "aggregator"))
    bench.close()
    (bench.directory / "tagged").write_text("in the way")
    with serving(bench.directory) as site:
        site.log_in()
        answer = site.post("/actions/tag", {"version": 0, "name": "good"})
        row = site.get("/audit").json["records"][0]
    words = f"cannot use {bench.directory / 'tagged'}: it is a file, not a folder; give another path"
    assert (answer.status, answer.json["error"], row["result"]) == (503, words, f"refused: {words}")


def test_actions_are_written_down_for_good(site: Site) -> None:
    site.post("/actions/tag", {"version": 0, "name": "first"})
    site.post("/actions/tag", {"version": 0, "name": "Bad"})
    rows = site.get("/audit").json["records"]
    assert [row["what"] for row in rows[:2]] == ["tag", "tag"]
    assert rows[0]["result"].startswith("refused: invalid tag")
    assert rows[1]["about"] == "version=0 name=first"
    assert rows[1]["who"].startswith("127.0.0.1, session ")
    file = site.directory / "dashboard-audit.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text().splitlines()[-2])["about"] == "version=0 name=first"
    log = Log()
    with serving(site.directory, log=log) as again:  # another process reads them
        again.log_in()
        assert [row["about"] for row in again.get("/audit").json["records"]][1:3] == [row["about"] for row in rows[:2]]


def test_without_logging_in_one_reads_and_does_nothing(site: Site) -> None:
    stranger = Site(site.directory, site.host, site.port)
    assert stranger.get("/history").status == 200
    session = stranger.get("/session").json
    assert (session["logged_in"], session["csrf"], session["may_read"]) == (False, None, True)
    assert stranger.get("/audit").status == 401
    before = status.read(site.directory)["state"]
    assert stranger.post("/actions/pause").status == 401
    assert status.read(site.directory)["state"] == before


def test_logging_out_ends_the_session(site: Site) -> None:
    with serving(site.directory) as other:
        other.log_in()
        assert other.get("/session").json["logged_in"] is True
        assert other.post("/logout").status == 200
        assert other.get("/session").json["logged_in"] is False
        assert other.post("/actions/pause").status == 401


def test_a_damaged_ledger_is_said_and_is_no_old_figure() -> None:
    bench = filled(scratch())
    bench.close()
    with serving(bench.directory) as site, site.events() as stream:
        assert next_state(stream)["head"]["version"] == 4
        content = (bench.directory / LEDGER).read_bytes()
        for beside in ("-wal", "-shm"):
            bench.directory.joinpath(LEDGER + beside).unlink(missing_ok=True)
        (bench.directory / LEDGER).write_bytes(b"x" * len(content))
        while not (state := next_state(stream)).get("fault"):
            pass
        assert "cannot be read" in state["fault"]
        assert state["head"] is None
        unknown = site.get("/health")
        assert (unknown.status, unknown.json["state"], unknown.json["code"]) == (503, "unknown", 3)
        assert site.get("/metrics").status in {409, 503}
        (bench.directory / LEDGER).write_bytes(content)
        while next_state(stream).get("fault"):
            pass


def test_a_ledger_that_another_process_locks_holds_nothing_up() -> None:
    bench = filled(scratch())
    bench.close()
    with serving(bench.directory) as site, closing(Ledger(bench.directory / LEDGER)) as writer:
        writer.db.execute("BEGIN EXCLUSIVE")
        with site.events() as stream:
            assert next_state(stream)["head"]["version"] == 4
        assert site.get("/devices").json["total"] == 3
        writer.db.execute("ROLLBACK")


def test_ten_thousand_devices_are_searched_and_sorted_quickly() -> None:
    directory = make_directory(scratch() / "aggregator")
    ledger = Ledger(directory / LEDGER)
    names = [f"d{number:05}" for number in range(10_000)]
    ledger.write(records.DeviceEnrolled(device=name, public=bytes(32), proof=bytes(32)) for name in names)
    ledger.close()
    devices = Devices(examination.look(directory))
    assert devices.page(search="", sort="name", descending=True, offset=0, limit=9)["rows"][0]["name"] == "d09999"
    last = devices.page(search="", sort="wrong", descending=False, offset=9_990, limit=LIMIT)
    assert (len(last["rows"]), last["matching"]) == (10, 10_000)
    assert devices.page(search="d0123", sort="updates", descending=True, offset=0, limit=LIMIT)["matching"] == 10
    with pytest.raises(ConfigError, match="no such order"):
        devices.page(search="", sort="x", descending=False, offset=0, limit=1)
    with serving(directory) as site:
        page = site.get("/devices?search=d0999&sort=name").json
        assert [row["name"] for row in page["rows"]] == [f"d{number:05}" for number in range(9990, 10_000)]
        with site.events() as stream:
            state = next_state(stream)
        assert state["devices"] == 10_000
        assert len(json.dumps(state)) < 100_000  # the table does not come with each look


def test_the_history_keeps_the_last_versions_and_counts_each_update_once() -> None:
    kept = History()

    def rows(first: int, last: int) -> list[dict[str, object]]:
        about = {"updates": 2, "staleness_mean": 0.0, "staleness_max": 0, "digest": "0" * 64, "metrics": {}}
        return [{"version": number, "time": float(number), **about} for number in range(first, last + 1)]

    traffic = Traffic()
    traffic.up_bytes.update({1: 10, 2: 20})
    traffic.staleness.update({0: 3, 4: 1})
    kept.take(rows(0, 2), traffic)
    assert kept.counted_to == 2
    assert not kept.lacks(rows(3, 4))
    assert kept.lacks(rows(4, 5))
    kept.take(rows(3, KEPT + 10), Traffic())
    assert len(kept.rows) == KEPT
    assert min(kept.rows) == 11
    assert kept.staleness == {0: 3, 4: 1}
    assert kept.rate_per_s(KEPT + 10.0) == pytest.approx(2.0)
    assert kept.rate_per_s(KEPT + 10.0 + 30.0) == pytest.approx(20 / 40)  # it falls while no version comes
    assert History().rate_per_s(1.0) is None


def test_the_token_is_made_once_and_a_new_one_ends_sessions(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "aggregator")
    with pytest.raises(ConfigError):
        dashboard_token.read(directory)
    token = dashboard_token.ensure(directory)
    assert dashboard_token.ensure(directory) == token
    assert stat.S_IMODE((directory / dashboard_token.FILE).stat().st_mode) == 0o600
    with serving(directory) as site:
        site.log_in()
        assert dashboard_token.make(directory) != token
        assert site.get("/session").json["logged_in"] is False
        assert site.post("/login", {"token": token}).status == 403
        site.cookie = site.csrf = ""
        site.log_in()
        (directory / dashboard_token.FILE).chmod(0o644)
        assert "chmod 600" in site.post("/login", {"token": token}).json["error"]
    (directory / dashboard_token.FILE).chmod(0o600)
    (directory / dashboard_token.FILE).write_text("short\n")
    with pytest.raises(ConfigError, match="is no token"):
        dashboard_token.read(directory)


def test_an_action_of_many_at_once_is_done_once_each(site: Site) -> None:
    before = administration.tensors_of(site.directory, None)[0]
    answers: list[int] = []

    def tag(number: int) -> None:
        answers.append(site.post("/actions/tag", {"version": before, "name": f"at-once-{number}"}).status)

    threads = [threading.Thread(target=tag, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 6
    with reading(site.directory) as ledger:
        named = {name for name, version in version_traffic.kept(ledger).tags.items() if version == before}
    assert {f"at-once-{number}" for number in range(6)} <= named


def test_the_commands_share_these_functions(tmp_path: Path) -> None:
    bench = filled(tmp_path)
    bench.close()
    assert version_commands.name_version(bench.directory, 3, "third").version == 3
    assert rollback.to_version(bench.directory, 3) > 4
    vectors = [administration.tensors_of(bench.directory, version)[2] for version in (3, None)]
    assert all(np.array_equal(vectors[0][name], vectors[1][name]) for name in vectors[0])
