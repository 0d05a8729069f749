"""A command that keeps a folder may be killed at any moment: nothing is lost, and it is run again."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from crash.commands import BACKING_UP, PRUNING, REPAIRING, RESTORING, killed
from support.small_world import Bench, Device, make_directory, ternary_block
from ternbus.aggregator.shell import administration, backup, log, quickstart, restoring
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.shell.repairing import repair
from ternbus.aggregator.store import merge_log, revocations
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.errors import ConfigError
from ternbus.broker.server.running import Engine

VERSIONS, KEPT = 12, 10


def merge(bench: Bench, devices: list[Device], times: int) -> None:
    for number in range(times):
        for device in devices:
            bench.send(device, ternary_block(bench.schema, number), bench.version)


class World:
    """A stopped federation of two devices, with several versions."""

    def __init__(self, home: Path) -> None:
        bench = Bench(make_directory(home, merge__buffer_size=2, staleness__max=2, downlink__slots=2))
        self.devices = [bench.join(name) for name in ("pi", "other")]
        merge(bench, self.devices, VERSIONS)
        bench.close()
        self.home = home

    def check_that_it_goes_on(self, home: Path) -> None:
        """It is sound, and so is the next version."""
        assert check(home).faults == ()
        bench = Bench(home)
        bench.start()
        bench.tick(seconds=10.0)
        version = bench.version
        merge(bench, self.devices, 1)
        bench.close()
        assert (bench.version, check(home).faults) == (version + 1, ())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole") / "agg")


@pytest.fixture
def home(whole: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.home, tmp_path / "agg"))


@pytest.mark.slow
@pytest.mark.parametrize("point", PRUNING)
def test_a_prune_goes_on_when_it_is_run_again(whole: World, home: Path, point: str) -> None:
    before = statuses.read(home)["counts"]
    killed(point, "aggregator", "prune", home, "--keep-versions", KEPT)
    assert (check(home).faults, statuses.read(home)["counts"]) == ((), before)
    administration.prune(home, KEPT)
    assert (len(statuses.read(home)["versions"]), log.verify(home, None, None).faults) == (KEPT, [])
    assert [path.name for path in (home / merge_log.FOLDER).iterdir()] == ["1.sqlite"]
    assert statuses.read(home)["counts"] == before
    whole.check_that_it_goes_on(home)


@pytest.mark.slow
@pytest.mark.parametrize("point", BACKING_UP)
def test_a_backup_is_whole_or_not_there(home: Path, point: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(point, "aggregator", "backup", home, out)
    made = backup.found_in(out, "lab")
    assert [check(path).faults for path in made] == [()] * (point == "backup-renamed")
    shutil.rmtree(out / made[0].name) if made else None  # two of one second have one name
    again = backup.backup(home, out, None, "test")
    assert (backup.found_in(out, "lab"), list(out.glob("*.partial"))) == ([again.path], [])


def revoke(home: Path, whole: World) -> None:
    """A device that no backup knows to be revoked: in the ledger and in the list of the folder alone."""
    bench = Bench(home)
    bench.start()
    bench.revoke(whole.devices[1].name)
    bench.close()


def revoked(home: Path) -> list[str]:
    assert [device for device, _ in revocations.read(home / revocations.FILE).keys] == ["other"]
    return [name for name, row in statuses.read(home)["devices"].items() if row["key_state"] == "revoked"]


@pytest.mark.slow
@pytest.mark.parametrize("point", RESTORING)
def test_a_restore_that_is_killed_forgets_no_revocation(whole: World, home: Path, point: str, tmp_path: Path) -> None:
    made = backup.backup(home, tmp_path / "out", None, "test").path
    revoke(home, whole)
    before = (home / LEDGER).read_bytes()
    killed(point, "aggregator", "restore", made, home, "--force")
    if not (home / LEDGER).exists():
        first = quickstart.First(model=tmp_path / "m", federation="lab", host="127.0.0.1", port=0, tls=True)
        beginning = (
            lambda: administration.load_settings(home),
            lambda: administration.create(home, federation="lab", broker="mqtt://127.0.0.1:1", model={}),
            lambda: quickstart.start_broker(home, Engine.AUTO, first),
        )
        for begin in beginning:
            with pytest.raises(ConfigError, match="was cut short: run it again"):
                begin()
    if point.startswith("moved-aside"):
        restoring.restore(made, home, "test", force=True)
    else:
        with pytest.raises(ConfigError, match="was cut short, and has been ended now"):
            restoring.restore(made, home, "test")
    assert (check(home).faults, revoked(home), list(home.glob("*.partial"))) == ((), ["other"], [])
    (aside,) = home.glob("replaced-*")
    assert (aside / LEDGER).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("point", REPAIRING)
def test_a_repair_that_is_killed_is_ended_by_the_next(whole: World, home: Path, point: str) -> None:
    with closing(sqlite3.connect(home / LEDGER)) as db:
        ((segment,),) = db.execute("SELECT segment FROM server").fetchall()
    (home / "vectors" / f"{segment}-server.f32").unlink()
    killed(point, "aggregator", "repair", home)
    repair(home)
    assert (list(home.glob("*.partial")), len(list(home.glob("damaged-*")))) == ([], 1)
    whole.check_that_it_goes_on(home)


@pytest.mark.slow
def test_a_revocation_that_is_in_the_list_is_in_the_ledger_after_the_next_command(whole: World, home: Path) -> None:
    killed("file-renamed", "aggregator", "revoke", home, "other")
    assert statuses.read(home)["devices"]["other"]["key_state"] == "active"
    administration.change_state(home, "pause", "test")
    assert revoked(home) == ["other"]
