"""The helper's store: what a save wrote is there after any end, what is erased is gone, and damage is named."""

import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.private_sets import NOW_S, Asked, Helper, World, identity, terms_of
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.sums.sets import ABANDON, OPEN, PREPARE
from ternbus.broker.sums.terms import AGGREGATOR, OWN
from ternbus.helper.core import events
from ternbus.helper.core.actions import Action, Note, Save
from ternbus.helper.core.opening_log import checked
from ternbus.helper.core.state import MONTH_S, State
from ternbus.helper.store import store as stores
from ternbus.helper.store.store import HelperStore
from ternbus.helper.store.tables import FILE


class OnDisk(Helper):
    """A helper whose records are in a file."""

    store: HelperStore

    def on(self, folder: Path) -> "OnDisk":
        self.store = HelperStore(folder, self.roster)
        if self.store.state is None:
            self.store.save(self.disk)
        assert self.store.state is not None
        self.disk, self.records = self.store.state, self.store  # type: ignore[assignment]
        self.start()
        return self

    def handle(self, event: events.Event) -> list[Action]:
        if not hasattr(self, "store"):
            return super().handle(event)
        done = self.core.handle(event, self.now)
        for action in done:
            if isinstance(action, Save):
                self.store.save(action.state, action.step)
                self.disk = action.state
            if isinstance(action, Note):
                self.store.note(action)
        self.actions += done
        return done

    def again(self, folder: Path) -> "OnDisk":
        """Another process on this folder."""
        self.end()
        self.on(folder)
        self.wait(60.0)
        self.connect()
        return self

    def end(self) -> None:
        self.store.__exit__(None, None, None)


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[OnDisk]:
    made = OnDisk().on(tmp_path)
    made.connect()
    yield made
    made.end()


def set_of(helper: Helper, *devices: str, version: int = 4) -> Asked:
    made = World(terms_of(helper), version=version)
    return made.asked(*map(made.update, devices))


def test_a_set_is_known_to_the_next_process(helper: OnDisk, tmp_path: Path) -> None:
    one, two, three = set_of(helper, "a", "b"), set_of(helper, "c", "d"), set_of(helper, "e", "f")
    for each, step in ((one, PREPARE), (one, OPEN), (two, PREPARE), (two, ABANDON), (three, PREPARE)):
        helper.ask(each, step)
    body = helper.ask(one, OPEN), helper.last_sum
    before = helper.disk
    helper.again(tmp_path)
    assert (helper.disk.count, helper.disk.log_hash) == (before.count, before.log_hash)
    assert (helper.ask(one, OPEN), helper.last_sum) == body
    assert helper.ask(two, PREPARE).reason.startswith("abandoned")
    assert helper.ask(set_of(helper, "a", "g"), PREPARE).updates == ("a",)
    assert helper.ask(set_of(helper, "e", "g"), PREPARE).updates == ("e",)
    assert helper.ask(set_of(helper, "c", "d", "g"), PREPARE).outcome == "prepared"
    found = stores.summary(tmp_path)
    assert found.sets == {"opened": 1, "abandoned": 1, "prepared": 2}
    assert found.counters["answers.opened"] == 3
    assert found.counters["refused.repeated"] == 2
    assert found.devices == 7
    assert found.facts["answer"].startswith("prepared a set")
    assert [each.digest for each in checked(stores.log(tmp_path), helper.identity.public)] == [one.digest]


def test_an_unknown_set_that_is_abandoned_is_kept(helper: OnDisk, tmp_path: Path) -> None:
    asked = set_of(helper, "a", "b")
    helper.ask(asked, ABANDON)
    helper.again(tmp_path)
    assert helper.ask(asked, PREPARE).reason.startswith("abandoned")


STEPS = st.lists(
    st.tuples(st.sampled_from([PREPARE, OPEN, ABANDON]), st.sampled_from(["ab", "bc", "ac", "abc", "cd"])), max_size=12
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=STEPS)
def test_a_store_on_disk_answers_as_one_in_memory(
    steps: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    one, two = OnDisk().on(folder), Helper()
    one.connect()
    two.connect()
    for step, names in steps:
        asked = set_of(one, *names)
        assert one.ask(asked, step) == two.ask(asked, step)
        assert one.last_sum == two.last_sum
    one.again(folder)
    for names in ("ab", "bc", "ac", "abc", "cd"):
        asked = set_of(one, *names)
        assert one.ask(asked, OPEN) == two.ask(asked, OPEN)
    one.end()


def test_the_roster_has_each_key_once_and_one_active_key_for_each_name(helper: OnDisk, tmp_path: Path) -> None:
    keys = [identity(f"key {n}").public for n in range(3)]
    assert stores.admit(tmp_path, "pi-1", keys[0], NOW_S)
    assert not stores.admit(tmp_path, "pi-1", keys[0], NOW_S)
    assert stores.admit(tmp_path, "pi-1", keys[1], NOW_S + 1)
    with pytest.raises(ConfigError, match="is that of pi-1"):
        stores.admit(tmp_path, "pi-2", keys[0], NOW_S)
    assert helper.store.key_of("pi-1") == keys[1]
    assert helper.store.device_of(keys[0]) == "pi-1"
    stores.remove(tmp_path, "pi-1")
    assert helper.store.key_of("pi-1") is None
    with pytest.raises(ConfigError, match=f"is not on the roster: `ternbus helper roster {tmp_path}` lists"):
        stores.remove(tmp_path, "pi-1")
    assert stores.admit(tmp_path, "pi-1", keys[0], NOW_S + 2)
    shown = [(each.device, each.public, each.active, each.admitted_by) for each in stores.roster(tmp_path)]
    assert shown == [("pi-1", keys[0], True, OWN), ("pi-1", keys[1], False, OWN)]


def test_the_aggregator_s_roster_follows_the_asks(helper: OnDisk, tmp_path: Path) -> None:
    helper.ask(set_of(helper, "a", "b"), PREPARE)
    made = World(terms_of(helper), version=5)
    helper.ask(made.asked(made.update("a", identity=identity("a renewed")), made.update("b")), PREPARE)
    shown = [(each.device, each.active, each.admitted_by) for each in stores.roster(tmp_path)]
    assert shown == [("a", True, AGGREGATOR), ("a", False, AGGREGATOR), ("b", True, AGGREGATOR)]
    assert helper.store.key_of("a") == identity("a renewed").public


def test_an_erased_box_key_is_in_no_file(helper: OnDisk, tmp_path: Path) -> None:
    secret = helper.disk.box_key.secret
    assert any(secret in path.read_bytes() for path in tmp_path.iterdir())
    helper.wait(MONTH_S + 3600)
    helper.wait(MONTH_S + 3600)
    assert secret not in {key.secret for key in helper.disk.box_keys}
    assert not [path for path in tmp_path.iterdir() if secret in path.read_bytes()]


def test_a_reader_keeps_an_erased_box_key_no_longer_than_it_reads(helper: OnDisk, tmp_path: Path) -> None:
    secret = helper.disk.box_key.secret
    helper.wait(MONTH_S + 3600)
    helper.store._db.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(tmp_path / FILE)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM kept").fetchall()
        helper.wait(MONTH_S + 3600)
        assert secret not in {key.secret for key in helper.disk.box_keys}
        assert [path for path in tmp_path.iterdir() if secret in path.read_bytes()]
    helper.store.save(replace(helper.disk, session=helper.disk.session + 1))
    assert not [path for path in tmp_path.iterdir() if secret in path.read_bytes()]


def test_a_new_store_is_empty_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    with HelperStore(tmp_path, OWN) as store:
        assert store.state is None
        assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
        state = replace(State.new(bytes, NOW_S), seq_limit=2**62, count=2**62)
        store.save(state)
    with HelperStore(tmp_path, OWN) as store:
        assert store.state == state


def test_a_store_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    for use in (stores.check, stores.summary, stores.roster, lambda folder: list(stores.log(folder))):
        with pytest.raises(ConfigError, match="ternbus helper restored"):
            use(tmp_path)
    (tmp_path / FILE).touch()
    with pytest.raises(ConfigError, match="missing or empty"):
        stores.admit(tmp_path, "a", bytes(32), NOW_S)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE kept SET value = '0' WHERE name = 'count'", "a row of kept"),
        ("UPDATE sets SET state = 'prepared'", "a row of sets"),
        ("UPDATE used SET base = 9", "a row of used"),
        ("UPDATE box_keys SET number = 7", "a row of box_keys"),
        ("UPDATE roster SET active = 0", "a row of roster"),
        ("UPDATE log SET entry = x'00'", "a row of log"),
        ("DROP INDEX used_by_set", "the definition of a table"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(helper: OnDisk, tmp_path: Path, change: str, named: str) -> None:
    asked = set_of(helper, "a", "b")
    helper.ask(asked, PREPARE)
    helper.ask(asked, OPEN)
    helper.store.__exit__(None, None, None)
    with closing(sqlite3.connect(tmp_path / FILE)) as db, db:
        db.execute(change)
    with pytest.raises(CorruptError, match=f"{named}.*ternbus helper restored"):
        HelperStore(tmp_path, OWN)


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda path: path.write_bytes(b"no database" * 100), CorruptError, "put no copy back"),
        (lambda path: set_format(path, 9), ConfigError, "install a newer Ternbus"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    helper: OnDisk, tmp_path: Path, spoil: Callable[[Path], Any], error: type[Exception], text: str
) -> None:
    helper.store.__exit__(None, None, None)
    for path in tmp_path.glob(f"{FILE}-*"):
        path.unlink()
    spoil(tmp_path / FILE)
    for use in (lambda folder: HelperStore(folder, OWN), stores.summary):
        with pytest.raises(error, match=text):
            use(tmp_path)


def set_format(path: Path, number: int) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {number}")


def test_a_copy_of_the_file_that_is_put_back_opens_nothing(helper: OnDisk, tmp_path: Path) -> None:
    """The broker has retained the card with the count that the copy does not have."""
    asked = set_of(helper, "a", "b")
    helper.ask(asked, PREPARE)
    copy = tmp_path / "copy"
    with closing(sqlite3.connect(tmp_path / FILE)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    helper.ask(asked, OPEN)
    retained = [each for each in helper.actions if getattr(each, "retain", False) and each.topic.endswith("card")]  # type: ignore[union-attr]
    helper.store.__exit__(None, None, None)
    for path in tmp_path.glob(f"{FILE}*"):
        path.unlink()
    shutil.move(copy, tmp_path / FILE)
    helper.on(tmp_path)
    assert helper.disk.count == 1
    helper.wait(60.0)
    helper.connect((retained[-1].topic, retained[-1].payload))  # type: ignore[union-attr]
    assert not helper.core.is_ready
    assert helper.core.due_s() is None


def test_keys_that_the_aggregator_put_on_the_roster_are_not_on_the_helper_s_own(tmp_path: Path) -> None:
    """Else one that lies invents devices before the operator turns to a roster of the helper's own."""
    helper = OnDisk().on(tmp_path)
    helper.connect()
    assert helper.ask(set_of(helper, "ghost-1", "ghost-2", "pi-2"), PREPARE).outcome == "prepared"
    helper.roster = OWN
    assert stores.admit(tmp_path, "pi-2", identity("pi-2").public, NOW_S)  # before the next start
    helper.again(tmp_path)
    assert [each.device for each in stores.roster(tmp_path)] == ["pi-2"]
    assert stores.admit(tmp_path, "pi-1", identity("ghost-1").public, NOW_S)  # a key has the name that the owner says
    assert stores.admit(tmp_path, "pi-1", identity("pi-1").public, NOW_S)
    answer = helper.ask(set_of(helper, "ghost-1", "ghost-2", "pi-1", version=5), PREPARE)
    assert (answer.outcome, answer.updates) == ("refused", ("ghost-1", "ghost-2"))
    assert helper.ask(set_of(helper, "pi-1", "pi-2", version=5), PREPARE).outcome == "prepared"
    helper.end()
