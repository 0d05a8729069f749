"""Statistics at the aggregator: what is asked, what is taken of whom, how often, and what survives."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.small_world import LAB, Bench, Device, frames_of, receipts, refusals, saved
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.shell.statistics_command import lines, result
from ternbus.aggregator.store import control, membership, statistics_rows
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import seal
from ternbus.broker.protocol.statistics import HISTOGRAM, LABELS, MOMENTS, Measured, StatisticsRequest

Make = Callable[..., Bench]
DP = {"plan.dp": "sample", "plan.dp_clip": 1.0, "plan.dp_noise": 2.0, "plan.dp_epsilon": 3.0}


def settings(**more: Any) -> dict[str, Any]:
    return {name.replace(".", "__"): value for name, value in {**DP, **more}.items()}


def ask(bench: Bench, *kinds: str, **fields: Any) -> StatisticsRequest:
    """Ask, and read what devices read; refused: the reason is in the ledger's request."""
    bench.handle(events.StatisticsRequested(kinds=kinds or (MOMENTS,), **fields))
    return StatisticsRequest.from_meta(parse(bench.retained[topics.head(LAB)]).meta["statistics"])


def refusal(bench: Bench, *kinds: str, **fields: Any) -> str:
    done = saved(bench.handle(events.StatisticsRequested(kinds=kinds or (MOMENTS,), request=1, **fields)),
                 records.RequestDone)  # fmt: skip
    return done[0].error


def content(mean: float = 2.0, samples: int = 100) -> Measured:
    count = np.full(2, float(samples))
    return Measured(
        samples=samples, values=samples, features=("a", "b"), count=count, first=np.full(2, mean), second=count * 4
    )


def frame(bench: Bench, device: Device, request: int, found: Measured | bytes, **about: Any) -> bytes:
    seq = device.next_seq()
    plain = found if isinstance(found, bytes) else found.pack()
    body = seal(bench.identity.public, bytes(device.identity.key_id) + seq.to_bytes(8, "little") + plain)
    return device.frame("statistics", {"request": request}, seq=seq, body=body, **about)


def send(bench: Bench, device: Device, request: int, found: Measured | bytes, **about: Any) -> str:
    actions = bench.receive(device.topic("statistics"), frame(bench, device, request, found, **about))
    return receipts(actions)[-1].outcome if receipts(actions) else ""


def test_answers_are_added_up_once_for_each_device(make: Make) -> None:
    bench = make()
    one, two = bench.join("one"), bench.join("two")
    bench.join("three")
    request = ask(bench)
    assert send(bench, one, request.id, content(1.0)) == "accepted"
    assert result(bench.directory)["shown"] is False
    assert send(bench, one, request.id, content(9.0)) == "accepted"  # the same receipt, and nothing is added
    assert send(bench, two, request.id, content(3.0, 300)) == "accepted"
    found = result(bench.directory)  # or the difference to what a third answer makes of it would be that answer
    assert (found["devices"], found["open"], found["shown"], found["samples"]) == (2, True, False, None)
    assert "nothing is shown before the request has ended" in lines(found)
    bench.tick(61.0)
    found = result(bench.directory)
    assert (found["devices"], found["samples"], found["answered"], found["open"]) == (2, 400, ["one", "two"], False)
    assert found["features"][0]["mean"] == 2.5
    assert found["features"][0]["variance"] == pytest.approx(4 + 0.75)
    assert "2.5" in "\n".join(lines(found))


def test_a_request_goes_out_in_heads_until_it_ends(make: Make) -> None:
    bench = make()
    one = bench.join("one")
    bench.join("two")
    request = ask(bench, MOMENTS, LABELS, wait_s=50.0)
    bench.handle(events.StateRequested(state="paused"))
    assert "statistics" in parse(bench.retained[topics.head(LAB)]).meta
    bench.tick(49.0)
    assert statistics_rows.read(bench.ledger.db).is_open
    actions = bench.tick(2.0)
    assert "statistics" not in frames_of(actions, "head")[-1].meta
    assert not statistics_rows.read(bench.ledger.db).is_open
    assert send(bench, one, request.id, content()) == "stale"
    assert send(bench, one, request.id + 1, content()) == "stale"


def test_it_ends_when_all_devices_have_answered(make: Make) -> None:
    bench = make()
    one, two, three = (bench.join(name) for name in ("one", "two", "three"))
    bench.join("judge", evaluator=True)
    bench.revoke("three")
    request = ask(bench)
    send(bench, one, request.id, content())
    assert statistics_rows.read(bench.ledger.db).is_open
    assert membership.trainers(bench.ledger.db) == ["one", "two"]  # whom the command says that it asked
    send(bench, two, request.id, Measured(refusal="its owner says no"))
    state = statistics_rows.read(bench.ledger.db)
    assert (state.is_open, state.outcomes) == (False, {"one": "answered", "two": "refused: its owner says no"})
    assert send(bench, three, request.id, content()) == "revoked"
    assert send(bench, one, request.id, content()) == "accepted"  # the receipt again, also after the end


def test_who_has_not_answered_is_named_when_the_request_has_ended(make: Make) -> None:
    bench = make()
    one = bench.join("one")
    bench.join("two")
    request = ask(bench)
    assert send(bench, one, request.id, content()) == "accepted"
    assert "no answer" not in "\n".join(lines(result(bench.directory)))  # it may yet come
    bench.tick(120.0)
    found = result(bench.directory)
    assert (found["open"], found["unanswered"]) == (False, ["two"])
    assert "no answer: two: is offline, or its owner joined it without --statistics" in lines(found)


def test_a_restart_goes_on_and_a_new_request_replaces_the_old(make: Make) -> None:
    bench = make()
    one, two = bench.join("one"), bench.join("two")
    request = ask(bench, wait_s=30.0)
    send(bench, one, request.id, content(1.0))
    bench.restart()
    bench.start()
    assert parse(bench.retained[topics.head(LAB)]).meta["statistics"]["id"] == request.id
    assert send(bench, one, request.id, content(9.0)) == "accepted"
    send(bench, two, request.id, content(3.0))
    assert result(bench.directory)["features"][0]["mean"] == 2.0
    assert "--statistics" not in "\n".join(lines(result(bench.directory)))
    later = ask(bench)
    assert later.id > request.id
    assert result(bench.directory)["devices"] == 0
    assert send(bench, one, request.id, content()) == "stale"
    bench.restart()
    bench.start()
    bench.tick(61.0)
    assert not statistics_rows.read(bench.ledger.db).is_open
    assert lines(result(bench.directory))[1:] == [
        "no answer: one, two: each is offline, or its owner joined it without --statistics",
        "fewer than 2 devices have answered, so nothing is shown",
    ]


def test_what_is_no_answer_is_refused_once_and_counted(make: Make) -> None:
    bench = make()
    bad = [bench.join(f"bad-{number}") for number in range(5)]
    bench.join("other")
    judge = bench.join("judge", evaluator=True)
    request = ask(bench)
    nan = replace(content(), first=np.full(2, np.nan))
    negative = replace(content(), count=np.full(2, -1.0))
    wrong: list[Measured | bytes] = [nan, negative, b"\xc1", content().pack() + b"\0", b"x" * 60_000]
    for device, each in zip(bad, wrong, strict=True):
        assert send(bench, device, request.id, each) == "invalid"
        assert send(bench, device, request.id, content()) == "invalid"  # nothing is read a second time
    assert send(bench, judge, request.id, content()) == "invalid"
    found = result(bench.directory)
    assert (found["devices"], len(found["invalid"])) == (0, 6)
    assert refusals(bench.tick(2.0))["bad-statistics"] == 6
    assert "invalid: judge: an evaluator has no data of its own" in lines(found)


def test_a_box_of_another_message_or_key_and_a_giant_are_refused(make: Make) -> None:
    bench = make()
    one, two, three = (bench.join(name) for name in ("one", "two", "three"))
    request = ask(bench)
    stolen = parse(frame(bench, one, request.id, content())).body
    copied = two.frame("statistics", {"request": request.id}, body=stolen)
    assert receipts(bench.receive(two.topic("statistics"), copied))[-1].outcome == "invalid"
    unsealed = one.frame("statistics", {"request": request.id}, body=content().pack())
    assert receipts(bench.receive(one.topic("statistics"), unsealed))[-1].outcome == "invalid"
    giant = three.frame("statistics", {"request": request.id}, body=b"x" * 70_000)
    assert receipts(bench.receive(three.topic("statistics"), giant)) == []
    parts = three.frame("statistics", {"request": request.id}, body=b"x", part=0, parts=2)
    assert receipts(bench.receive(three.topic("statistics"), parts)) == []
    meta = three.frame("statistics", {"request": -1}, body=b"x")
    assert receipts(bench.receive(three.topic("statistics"), meta)) == []
    assert refusals(bench.tick(2.0)) == {"bad-statistics": 2, "bad-body": 2, "bad-meta": 1}


def test_nobody_is_asked_what_no_device_may_answer(make: Make) -> None:
    bench = make()
    assert "kinds" in refusal(bench, "rows")
    assert "needs bins and bounds" in refusal(bench, HISTOGRAM)
    assert "--noise" in refusal(bench, noise=3.0)
    assert "does not fit" in refusal(bench, features=tuple(f"{each:064}" for each in range(64)),
                                     labels=tuple(f"{each:064}" for each in range(64)))  # fmt: skip
    assert "not printable" in refusal(bench, features=("a\n",))
    small = make(frame_bytes=4096)
    assert "does not fit" in refusal(small, features=tuple(f"{each:064}" for each in range(60)))
    assert "statistics" not in parse(bench.retained[topics.head(LAB)]).meta


def test_with_dp_the_request_has_the_plans_noise_and_bounds_are_needed(make: Make) -> None:
    bench = make(**settings())
    assert "need bounds" in refusal(bench)
    assert "must be named" in refusal(bench, LABELS)
    request = ask(bench, low=(0.0,), high=(1.0,))
    assert (request.dp, request.noise) == ("sample", 2.0)
    assert ask(bench, low=(0.0,), high=(1.0,), noise=7.0).noise == 7.0


def test_results_with_noise_are_shown_with_it(make: Make) -> None:
    bench = make(**settings())
    one, two = bench.join("one"), bench.join("two")
    request = ask(bench, MOMENTS, HISTOGRAM, LABELS, low=(0.0,), high=(1.0,), bins=4, labels=("cat",))
    found = Measured(
        features=("a",), count=np.array([99.5]), first=np.array([3.0]), second=np.array([20.0]),
        histogram=np.array([-1.0, 30, 30, 20, 20, 0.5]), classes=("cat", "(others)"), labels=np.array([-0.5, 1]),
    )  # fmt: skip
    for device in (one, two):
        assert send(bench, device, request.id, found) == "accepted"
    shown = "\n".join(lines(result(bench.directory)))
    assert 'the noise of dp = "sample", multiplier 2; counts are in samples' in shown
    assert "mean_noise" in shown
    assert "cat" in shown


def test_private_sums_have_no_statistics(make: Make) -> None:
    bench = make()
    bench.core._versions.private = object()  # type: ignore[assignment]
    assert "private sums" in refusal(bench)


def test_a_command_writes_a_request_that_the_core_is_told_of(make: Make) -> None:
    bench = make()
    argument = json.dumps({"kinds": ["moments"], "features": ["a"], "low": [0.0], "high": [1.0], "wait_s": 5.0})
    event = control.event(bench.ledger, control.STATISTICS, argument, 3)
    assert event == events.StatisticsRequested(
        kinds=("moments",), features=("a",), low=(0.0,), high=(1.0,), wait_s=5.0, request=3
    )


def test_the_command_says_what_is_wrong(make: Make) -> None:
    bench = make()
    runner = CliRunner()

    def told(*arguments: str) -> str:
        ended = runner.invoke(app, ["statistics", str(bench.directory), *arguments])
        assert ended.exit_code != 0
        return str(ended.exception)

    assert "nobody was asked" in told("--last")
    assert "no aggregator runs" in told()
    assert "give bounds to all" in told("--feature", "a=0:1", "--feature", "b")
    assert "are no bounds" in told("--bounds", "0-1")
    assert "LOW must be below HIGH" in told("--bounds", "1:0")
    assert told("--kind", "rows") == "--kind is 'rows': give one of moments, histogram, labels"
    assert "add --bounds LOW:HIGH" in told("--kind", "histogram")
    missing = runner.invoke(app, ["statistics", str(bench.directory / "none")])
    assert "holds no aggregator" in str(missing.exception)
    ask(bench)
    ended = runner.invoke(app, ["statistics", str(bench.directory), "--last", "--json"])
    assert json.loads(ended.stdout)["shown"] is False
