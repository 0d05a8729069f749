"""The commands `ternbus helper`: what they make, what they say, and what they refuse in words."""

import json
import sqlite3
import stat
import tomllib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.private_sets import SERVER, Asked, Helper, World, identity, terms_of
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.sums.sets import OPEN, PREPARE
from ternbus.broker.sums.terms import OWN
from ternbus.command import main
from ternbus.helper.core.actions import Note, Save, Stop
from ternbus.helper.core.opening_log import checked
from ternbus.helper.shell.directory import HelperDirectory, Settings
from ternbus.helper.shell.service import Service
from ternbus.helper.store.store import HelperStore, summary
from ternbus.helper.store.tables import FILE

URL = "mqtt://127.0.0.1:1"


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def helper(capfd: pytest.CaptureFixture[str]) -> Any:
    def ran(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(["helper", *map(str, arguments)])
        return Ran(int(ended.value.code or 0), *capfd.readouterr())

    return ran


def invitation(folder: Path, **changes: str | None) -> Path:
    values = {
        "federation": "lab",
        "device": "h-1",
        "broker": URL,
        "aggregator_key": SERVER.public.hex(),
        "code": "c",
        "role": "helper",
    }
    path = folder / "invitation.toml"
    path.write_text(Invitation(**{**values, **changes}).dumps())  # type: ignore[arg-type]
    path.chmod(0o600)
    return path


def init(helper: Any, folder: Path, *options: object) -> Ran:
    ran: Ran = helper("init", folder, "--federation", "lab", "--broker", URL, "--name", "h-1", *options)
    assert ran.code == 0, ran.err
    return ran


def test_init_makes_a_key_a_card_and_says_what_comes_next(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    said = init(helper, folder, "--roster", "own", "--min", 7).out
    key = Identity(bytes.fromhex((folder / "helper.key").read_text())).public.hex()
    assert tomllib.loads((folder / "card.toml").read_text()) == {"name": "h-1", "federation": "lab", "key": key}
    settings = HelperDirectory(folder).settings()
    assert (settings.roster, settings.min, settings.broker) == ("own", 7, URL)
    assert f"--private --helper {key}" in said
    assert f"ternbus helper init {folder} --invitation FILE" in said
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("helper.key", "helper.toml", FILE):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    shown = helper("status", folder, "--json").json
    assert (shown["box_key"], shown["count"], shown["running"], shown["enrolled"]) == (1, 0, False, False)
    assert shown["waits_for"] == "an invitation: `ternbus aggregator invite AGG --helper h-1`"
    assert "waits_for                    an invitation" in helper("status", folder).out
    ran = helper("run", folder)
    assert (ran.code, "has no invitation yet" in ran.err) == (2, True)


def test_an_invitation_is_taken_at_once_or_later(helper: Any, tmp_path: Path) -> None:
    file = invitation(tmp_path)
    init(helper, tmp_path / "later")
    taken = helper("init", tmp_path / "later", "--invitation", file)
    assert (taken.code, taken.err) == (0, "")
    made = helper("init", tmp_path / "once", "--invitation", file, "--min", 2)
    assert (made.code, "once held no helper: the one made now has a new key" in made.err) == (0, True)
    for name in ("later", "once"):
        settings = HelperDirectory(tmp_path / name).settings()
        assert (settings.helper, settings.code, settings.aggregator_key) == ("h-1", "c", SERVER.public.hex())
    shown = helper("status", tmp_path / "once", "--json").json
    assert shown["waits_for"] == f"you: run `ternbus helper run {tmp_path / 'once'}`"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": "h-2"}, "the invitation is for h-2 in lab, and this is helper h-1 in lab"),
        ({"federation": "other"}, "the invitation is for h-1 in other"),
        ({"aggregator_key": "ab" * 32}, "from an aggregator with another key"),
    ],
)
def test_an_invitation_of_another_is_refused(changes: dict[str, str], text: str, helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--invitation", invitation(tmp_path))
    ran = helper("init", folder, "--invitation", invitation(tmp_path, **changes))
    assert (ran.code, text in ran.err) == (2, True)


def test_an_invitation_of_a_device_makes_no_helper_and_a_helper_s_no_device(
    helper: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bureau"
    ran = helper("init", folder, "--invitation", invitation(tmp_path, role=None))
    assert (ran.code, folder.exists()) == (2, False)
    assert "is the invitation of the device h-1" in ran.err
    path = invitation(tmp_path)
    for words in (["join", path, tmp_path / "pi", "--task", "digits-numpy"], ["rejoin", path, tmp_path / "pi"]):
        with pytest.raises(SystemExit) as ended:
            main(["edge", *map(str, words)])
        said = capfd.readouterr().err
        assert (ended.value.code, (tmp_path / "pi").exists()) == (2, False)
        assert "is the invitation of the helper h-1, and `ternbus helper init DIR --invitation FILE` takes it" in said
    path.write_text(path.read_text().replace('role = "helper"', 'role = "judge"'))
    assert "role in the invitation is 'judge'" in helper("init", folder, "--invitation", path).err


def test_a_helper_that_is_there_is_not_made_again(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder)
    ran = helper("init", folder)
    assert (ran.code, "has a helper already" in ran.err) == (2, True)
    ran = helper("init", folder, "--invitation", invitation(tmp_path), "--min", 9)
    assert (ran.code, "another min" in ran.err) == (2, True)
    ran = helper("init", tmp_path / "new")
    assert (ran.code, "--federation and --broker is missing" in ran.err) == (2, True)
    ran = helper("init", tmp_path / "new", "--federation", "lab", "--broker", URL, "--name", "x" * 49)
    assert (ran.code, "invalid helper name" in ran.err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_invitations_that_others_can_read_are_warned_of(helper: Any, tmp_path: Path) -> None:
    file = invitation(tmp_path)
    file.chmod(0o644)
    said = helper("init", tmp_path / "bureau", "--invitation", file).err
    assert said.startswith(f"ternbus: warning: other users can read {file}")


def test_an_empty_log_has_no_line_for_scripts(helper: Any, tmp_path: Path) -> None:
    init(helper, tmp_path / "bureau")
    assert helper("log", tmp_path / "bureau", "--json").out == ""


def test_devices_are_admitted_listed_and_removed(helper: Any, tmp_path: Path) -> None:
    folder, key = tmp_path / "bureau", identity("pi-1").public.hex()
    init(helper, folder, "--roster", "own")
    assert helper("admit", folder, "pi-1", key).out == "pi-1 is on the roster\n"
    assert "already" in helper("admit", folder, "pi-1", key).out
    assert [each["device"] for each in helper("roster", folder, "--json").json] == ["pi-1"]
    assert key in helper("roster", folder).out
    for wrong in (("PI", key), ("pi-1", "abc"), ("pi-2", key)):
        assert helper("admit", folder, *wrong).code == 2
    assert key not in helper("roster", folder, "--remove", "pi-1").out
    assert helper("roster", folder, "--remove", "pi-1").code == 2
    assert [each["active"] for each in helper("roster", folder, "--json").json] == [False]


def test_a_helper_with_the_aggregator_s_roster_admits_nobody(helper: Any, tmp_path: Path) -> None:
    init(helper, tmp_path / "bureau")
    ran = helper("admit", tmp_path / "bureau", "pi-1", identity("pi-1").public.hex())
    assert (ran.code, 'set roster = "own"' in ran.err) == (2, True)


def worked(folder: Path) -> Asked:
    """Let the helper in a folder open a set and refuse one."""
    made = Helper()
    made.connect()
    world = World(terms_of(made))
    asked = world.asked(world.update("pi-1"), world.update("pi-2"))
    other = world.asked(world.update("pi-2"), world.update("pi-3"))
    for each, step in ((asked, PREPARE), (asked, OPEN), (other, PREPARE)):
        made.ask(each, step)
    (folder / "helper.key").write_text(made.identity.seed.hex())
    with HelperStore(folder, OWN) as store:
        for action in made.actions:
            if isinstance(action, Save):
                store.save(action.state, action.step)
            elif isinstance(action, Note):
                store.note(action)
    return asked


def test_status_and_log_show_what_the_helper_did(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder)
    asked = worked(folder)
    shown = helper("status", folder, "--json").json
    assert shown["sets"] == {"opened": 1}
    assert shown["counters"] == {
        "answers.opened": 1, "answers.prepared": 1, "answers.refused": 1, "refused.repeated": 1,
    }  # fmt: skip
    assert shown["last_answer"].endswith("repeated: the update of pi-2")
    assert isinstance(shown["last_answer_s_ago"], int)
    assert "refused.repeated" in helper("status", folder).out
    (entry,) = helper("log", folder, "--json").out.splitlines()
    assert json.loads(entry)["set"] == asked.digest.hex()
    assert "pi-1 pi-2" in helper("log", folder).out
    assert helper("log", folder, "--out", tmp_path / "out").out.endswith("out: 1 set\n")
    line = json.loads((tmp_path / "out").read_text())
    public = HelperDirectory(folder).identity().public
    assert [each.base for each in checked([bytes.fromhex(line["signed"])], public)] == [line["base"]]
    (folder / "helper.key").write_text(bytes(32).hex())
    ran = helper("log", folder)
    assert (ran.code, "not as it was written" in ran.err) == (2, True)


def test_a_roster_with_too_few_devices_for_a_sum_is_waited_for(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--invitation", invitation(tmp_path), "--roster", "own", "--min", 2)
    with HelperStore(folder, OWN) as store:
        assert store.state is not None
        store.save(replace(store.state, enrolled=True))
        store.note(Note(facts={"broker": "connected", "aggregator": "online"}))
    with HelperDirectory(folder).locked():
        few = "since a sum has 2 devices or more, and the roster 0"
        waited = f"you: run `ternbus helper admit {folder} NAME KEY` for each device, {few}"
        assert helper("status", folder, "--json").json["waits_for"] == waited
        for number in (1, 2):
            assert helper("admit", folder, f"pi-{number}", f"{number}" * 64).code == 0
        assert helper("status", folder, "--json").json["waits_for"] is None


def test_restored_makes_a_new_box_key_and_keeps_what_is_known(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--roster", "own")
    helper("admit", folder, "pi-1", identity("pi-1").public.hex())
    before = summary(folder).state
    said = helper("restored", folder)
    after = summary(folder).state
    assert (said.code, "devices on the roster: 1" in said.out) == (0, True)
    assert (before.box_key.number, after.box_key.number > 10**9) == (1, True)
    assert before.box_key.secret not in {key.secret for key in after.box_keys}
    assert after.count > before.count + 2**31


@pytest.mark.parametrize("spoil", ["missing", "damaged"])
def test_restored_replaces_a_database_that_is_lost(spoil: str, helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--invitation", invitation(tmp_path))
    settings = HelperDirectory(folder).settings()
    table = {**tomllib.loads(settings.dumps()), "code": ""}  # it has enrolled
    HelperDirectory(folder).write(Settings.from_table(table, "test"))
    if spoil == "missing":
        (folder / FILE).unlink()
    else:
        with closing(sqlite3.connect(folder / FILE)) as db, db:
            db.execute("UPDATE box_keys SET number = 9")
    for command in ("run", "status"):
        ran = helper(command, folder)
        assert (ran.code, "ternbus helper restored" in ran.err) == (2, True)
    ran = helper("restored", folder)
    assert ran.code == 0
    assert ("damaged-1" in ran.err) == (spoil == "damaged")
    assert summary(folder).state.enrolled
    assert (folder / "damaged-1").exists() == (spoil == "damaged")
    assert helper("restored", folder).code == 0
    assert not (folder / "damaged-1").exists()  # the lost box keys were in it


def test_a_database_from_before_the_enrollment_is_an_old_copy(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--invitation", invitation(tmp_path))
    table = {**tomllib.loads(HelperDirectory(folder).settings().dumps()), "code": ""}
    HelperDirectory(folder).write(Settings.from_table(table, "test"))
    ran = helper("run", folder)
    assert (ran.code, "it is an old copy" in ran.err) == (2, True)


def test_a_code_that_a_killed_process_left_is_removed(
    helper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--invitation", invitation(tmp_path))
    with HelperStore(folder, OWN) as store:
        assert store.state is not None
        store.save(replace(store.state, enrolled=True))
    monkeypatch.setattr(Service, "run", lambda _: Stop(code=0, reason="at once"))
    assert helper("run", folder).out.endswith("stopped: at once\n")
    assert HelperDirectory(folder).settings().code == ""


def test_one_process_has_a_directory(helper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init(helper, folder, "--invitation", invitation(tmp_path))
    with HelperDirectory(folder).locked():
        for arguments in (
            ("run", folder),
            ("restored", folder),
            ("init", folder, "--invitation", invitation(tmp_path)),
        ):
            ran = helper(*arguments)
            assert (ran.code, "another `ternbus helper` process runs" in ran.err) == (2, True)
        shown = helper("status", folder, "--json").json
        assert (shown["running"], shown["waits_for"]) == (True, "the aggregator, which is not online")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"min": 1}, "min is 1"),
        ({"min": "5"}, "'min' is not a setting of a helper, or not of its type"),
        ({"roster": "nobody"}, "roster is 'nobody'"),
        ({"aggregator_key": "ab"}, "aggregator_key is not 64 hex digits"),
        ({"colour": "red"}, "'colour' is not a setting"),
        ({"federation": None}, "lacks 'federation'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_file(change: dict[str, Any], text: str) -> None:
    table = {"federation": "lab", "helper": "h-1", "broker": URL, "roster": "own", "min": 5}
    changed = {key: value for key, value in {**table, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=f"^helper.toml.*{text}"):
        Settings.from_table(changed, "helper.toml")


def test_a_folder_without_a_helper_is_told_how_to_make_one(helper: Any, tmp_path: Path) -> None:
    for command in ("run", "status", "log", "roster", "restored"):
        ran = helper(command, tmp_path)
        assert (ran.code, "ternbus helper init" in ran.err) == (2, True)
