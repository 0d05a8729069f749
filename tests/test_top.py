"""`ternbus top` by textual's pilot, on a real directory."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from typer.testing import CliRunner

from support.commands import typed
from support.small_world import Bench, ternary_block
from ternbus.aggregator.shell import examination
from ternbus.aggregator.shell.examination import Examination
from ternbus.aggregator.store.ledger import blaming
from ternbus.broker.errors import ConfigError
from ternbus.command import app

top = pytest.importorskip("ternbus.aggregator.shell.top", exc_type=ImportError)
Make = Callable[..., Bench]


def shown(screen: "top.Top") -> tuple[str, list[list[str]], list[list[str]]]:  # type: ignore[name-defined]
    """The text of the health, and the rows of both tables."""
    tables = [screen.query_one(name) for name in ("#devices", "#versions")]
    rows = [[[str(cell) for cell in table.get_row_at(index)] for index in range(table.row_count)] for table in tables]
    return str(screen.query_one("#health").render()), rows[0], rows[1]


async def _looked(look: Callable[[], Examination], *keys: str) -> tuple[str, list[list[str]], list[list[str]]]:
    screen = top.Top(look, broker="mqtt://broker", every_s=3600.0)
    async with screen.run_test(size=(140, 50)) as pilot:
        await screen.workers.wait_for_complete()
        for key in keys:
            await pilot.press(key)
            await screen.workers.wait_for_complete()
        await pilot.pause()
        found = shown(screen)
        await pilot.press("q")
    assert screen.return_code == 0
    return found


def test_health_devices_and_versions_are_shown_and_q_ends_it(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.join("a-quiet-one")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    for _ in range(3):
        bench.send(pi, b"nonsense", 1)
    bench.tick(1.0)  # counters are written once a second
    health, devices, versions = asyncio.run(_looked(lambda: examination.look(bench.directory)))
    assert health.startswith("health: down: no process serves this directory")
    assert [row[0] for row in devices] == ["pi", "a-quiet-one"]  # what is wrong comes first
    assert (devices[0][2], devices[0][4], devices[0][-1]) == ("1", "invalid", "refused")
    assert [row[:2] for row in versions] == [["1", "1"], ["0", "0"]]


def test_r_looks_again_and_an_error_is_shown_and_ends_nothing(make: Make) -> None:
    bench = make()
    looks: list[int] = []

    def look() -> Examination:
        looks.append(1)
        if len(looks) == 1:
            raise ConfigError("the directory is away")
        return examination.look(bench.directory)

    assert asyncio.run(_looked(look))[0] == "cannot be read: the directory is away"
    assert asyncio.run(_looked(look, "r"))[0].startswith("health: down")
    assert len(looks) == 3


def test_a_damaged_row_is_named_and_ends_nothing(make: Make) -> None:
    bench = make()
    bench.join("pi")
    bench.ledger.db.execute("UPDATE devices SET seen_at = 'x'")

    async def looked() -> str:
        look, blame = partial(examination.look, bench.directory), partial(blaming, bench.directory)
        screen = top.Top(look, broker="mqtt://broker", every_s=3600.0, blaming=blame)
        async with screen.run_test(size=(140, 50)) as pilot:
            await screen.workers.wait_for_complete()
            await pilot.pause()
            return shown(screen)[0]

    assert "devices pi is not as it was written" in asyncio.run(looked())


def test_the_command_has_help_and_wants_a_directory() -> None:
    done = CliRunner().invoke(app, ["top", "--help"])
    assert done.exit_code == 0
    assert "ternbus top agg" in done.output


def test_without_a_terminal_the_command_names_the_one_that_needs_none(make: Make) -> None:
    directory = make().directory
    said = typed(directory, "top", directory, code=2)
    assert said == f"ternbus: `ternbus top` needs a terminal: use `ternbus aggregator status {directory}`\n"
