"""How a device answers requests for statistics: once each, by its owner's limits and budget, until a receipt comes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    FRAME_BYTES,
    Device,
    aggregator,
    following,
    logged,
    of,
    only,
    published,
    trained,
)
from support.scripted_aggregator import ScriptedAggregator
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.statistics import Measured, StatisticsRequest
from ternbus.edge.core import events
from ternbus.edge.core.actions import Save, StartStatistics, StartTraining
from ternbus.edge.core.measuring import ASKED_MAX, ENVELOPE_BYTES, SETTLE_S
from ternbus.edge.core.state import Asked, State, Statistics
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import SAMPLE, Account, Cost, PrivacyPolicy
from ternbus.edge.shell import measuring
from ternbus.edge.shell.statistics_limit import PER_DAY, allowed, check_setting
from ternbus.edge.shell.worker import Worker
from ternbus.edge.store.outbox import Outbox, summary

REQUEST = StatisticsRequest(id=5, kinds=("moments",))
NOISY = StatisticsRequest(id=5, kinds=("moments",), low=(0.0,), high=(1.0,), dp="device", noise=5.0)
DP: dict[str, Any] = {"dp": "device", "dp_clip": 1.0, "dp_noise": 5.0, "dp_epsilon": 3.0}
NOW = 1_000_000.0  # Unix seconds


class Data:
    samples = 40

    def measured_inputs(self) -> Iterator[Any]:
        yield np.arange(80.0).reshape(40, 2)


def asked(**settings: Any) -> tuple[ScriptedAggregator, Device]:
    """A device whose owner allows statistics, in a federation that is paused and asks for them."""
    scripted = aggregator(state="paused", statistics=REQUEST.meta())
    return following("train", scripted, statistics=4, **settings)


def done(job: StartStatistics, **changes: Any) -> events.StatisticsMeasured:
    return events.StatisticsMeasured(**{"request": job.request, "content": b"answer", "clock_s": NOW, **changes})


def answered() -> tuple[ScriptedAggregator, Device, int]:
    """The same after its answer was sent, and the answer's number."""
    scripted, device = asked()
    job = only(device.wait(SETTLE_S), StartStatistics)
    return scripted, device, published(device.handle(done(job)), "statistics")[0].seq


def test_an_answer_is_no_larger_than_a_usual_frame() -> None:
    """It is one frame, which cannot be cut anew where larger ones do not get through."""
    scripted, device = asked()
    device.handle(events.Connected(frame_bytes=FRAME_BYTES, most_bytes=2**28))
    device.arrive(scripted.status(session=2), scripted.head(frame_bytes=2**18))
    assert device.core.uplink.frame_bytes == 2**18
    assert only(device.wait(SETTLE_S), StartStatistics).content_bytes == FRAME_BYTES - ENVELOPE_BYTES


def test_an_answer_is_on_disk_with_its_cost_before_it_is_sent_sealed_and_forgotten_with_its_receipt() -> None:
    scripted, device = asked()
    assert of(device.actions, StartStatistics) == []
    job = only(device.wait(SETTLE_S), StartStatistics)
    assert (job.request, job.per_day, job.is_private, job.asked) == (REQUEST, 4, False, ())
    account = Account(epsilon=1.5)
    made = device.handle(done(job, account=account))
    assert isinstance(made[0], Save)
    assert made[0].state.account == account
    assert made[0].state.statistics == Statistics(request=5, content=b"answer", asked=(Asked(
        at=NOW, kinds="moments", outcome="answered"),))  # fmt: skip
    (frame,) = published(made, "statistics")
    assert frame.meta == {"request": 5}
    assert frame.body == b"sealed:" + DEVICE_KEY.key_id + frame.seq.to_bytes(8, "little") + b"answer"
    assert "statistics" in logged(made)
    settled = device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted"))
    assert only(settled, Save).state.statistics.content == b""
    assert published(device.wait(10_000), "statistics") == []
    device.arrive(scripted.head())
    assert of(device.wait(10), StartStatistics) == []  # the same request again


def test_a_device_whose_owner_does_not_allow_it_ignores_requests() -> None:
    _, device = following("train", aggregator(state="paused", statistics=REQUEST.meta()))
    assert of(device.wait(10), StartStatistics) == []


def test_a_newer_head_at_once_replaces_the_request_that_had_waited_at_the_broker() -> None:
    scripted, device = asked()
    scripted.statistics = {**REQUEST.meta(), "id": 6}
    device.arrive(scripted.head())
    assert only(device.wait(SETTLE_S), StartStatistics).request.id == 6
    scripted.statistics = None
    _, other = asked()
    other.arrive(scripted.head(seq=1000))
    assert of(other.wait(10), StartStatistics) == []


def test_an_answer_is_sent_again_until_the_aggregator_has_it_also_after_a_crash() -> None:
    scripted, device, first = answered()
    device.handle(events.Published(seq=first))
    (again,) = published(device.wait(100), "statistics")
    assert again.seq > first
    device.handle(events.Disconnected(reason="gone"))
    device.wait(5)
    assert published(device.connect() + device.arrive(scripted.status(session=2)), "statistics")
    late = device.restarted()
    late.connect()
    resent = published(late.arrive(scripted.status(session=2), scripted.head()), "statistics")
    assert [frame.body[-6:] for frame in resent] == [b"answer"]
    assert of(late.wait(10), StartStatistics) == []  # it is answered: nothing is paid twice
    assert late.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, resent[0].seq, "busy", retry_after_s=300.0)) == []
    assert published(late.wait(290), "statistics") == []
    (later,) = published(late.wait(200), "statistics")
    assert "statistics-refused" in logged(late.arrive(
        scripted.receipt(DEVICE, DEVICE_KEY.key_id, later.seq, "invalid", reason="no")))  # fmt: skip
    assert published(late.wait(10_000), "statistics") == []


def test_an_answer_does_not_leave_once_its_owner_no_longer_allows_it() -> None:
    scripted, device, _ = answered()
    late = device.restarted(statistics=None)
    late.connect()
    late.arrive(scripted.status(session=2), scripted.head())
    assert published(late.actions + late.wait(10_000), "statistics") == []


def test_a_receipt_that_no_answer_has_is_dropped() -> None:
    scripted, device, seq = answered()
    device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "enrolled"))
    assert device.core.dropped["odd-receipt"] == 1
    device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq + 5, "accepted"))
    assert device.core.dropped["not-outstanding"] == 1


def test_an_answer_that_is_asked_for_no_more_is_forgotten() -> None:
    scripted, device, _ = answered()
    scripted.statistics = None
    (save,) = of(device.arrive(scripted.head()), Save)
    assert save.state.statistics.content == b""
    assert save.state.statistics.request == 5


def test_a_request_that_cannot_be_read_is_none_and_its_head_counts() -> None:
    for wrong in ({**REQUEST.meta(), "kinds": ["rows"]}, {"id": 1}, 7):
        scripted = aggregator(state="paused", statistics=wrong)
        _, device = following("train", scripted, statistics=4)
        assert device.core.follower.head is not None
        assert of(device.wait(10), StartStatistics) == []
        assert ("bad-request" in logged(device.actions)) == isinstance(wrong, dict)


def test_training_and_statistics_wait_for_each_other_since_both_change_the_account() -> None:
    scripted = aggregator(statistics=REQUEST.meta())
    _, device = following("train", scripted, statistics=4)
    training = only(device.actions, StartTraining)
    assert of(device.wait(10), StartStatistics) == []
    job = only(device.handle(trained(training)), StartStatistics)
    scripted.advance()
    update = published(device.actions, "update")[-1]
    device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, update.seq, "accepted"))
    device.arrive(*scripted.delta(1), scripted.head())
    assert len(of(device.actions, StartTraining)) == 1
    assert only(device.handle(done(job)), StartTraining).base == 1


def test_a_closed_federation_and_an_evaluator_get_no_statistics() -> None:
    _, device = following("train", aggregator(state="closed", statistics=REQUEST.meta()), statistics=4, stays=True)
    assert of(device.wait(10), StartStatistics) == []
    _, evaluator = following("evaluate", aggregator(statistics=REQUEST.meta()), statistics=4)
    assert of(evaluator.wait(10), StartStatistics) == []


def test_the_log_is_bounded_and_refusals_by_the_limit_push_nothing_out() -> None:
    scripted, device = asked()
    job = only(device.wait(SETTLE_S), StartStatistics)
    device.handle(done(job))
    for number in range(6, 10):
        scripted.statistics = {**REQUEST.meta(), "id": number}
        device.arrive(scripted.head())
        job = only(device.wait(SETTLE_S), StartStatistics)
        done_now = device.handle(done(job, refusal="its owner allows no more requests a day than 1", clock_s=NOW + 1))
        assert "statistics" in logged(done_now)
    assert [each.is_limit for each in device.core.state.statistics.asked] == [False, True]
    assert ASKED_MAX > 50  # of a day


# --- the job


def job(**changes: Any) -> StartStatistics:
    fields: dict[str, Any] = {"request": REQUEST, "plan": Plan(), "refusal": "", "account": Account(), "asked": ()}
    return StartStatistics(**{**fields, "per_day": 4, "is_private": False, "content_bytes": 10_000, **changes})


def answer(work: StartStatistics, trainer: Any = None) -> events.StatisticsMeasured:
    data: Any = trainer or Data()
    return measuring.answer(data, work, RandomSource(), NOW)


def test_an_answer_has_the_statistics() -> None:
    found = answer(job())
    assert (found.refusal, found.account, found.clock_s) == ("", None, NOW)
    assert Measured.read(found.content, REQUEST).first.tolist() == [39.0, 40.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_private": True}, "private sums"),
        ({"plan": None, "refusal": "its owner requires dp"}, "its owner requires dp"),
        ({"request": NOISY}, 'the plan has dp = "none"'),
        ({"plan": Plan(**DP)}, 'the request "none"'),
        ({"per_day": 0}, "no more requests a day than 0"),
        ({"content_bytes": 20}, "more than fit"),
        ({"request": replace(REQUEST, features=("9",))}, "no feature"),
    ],
)
def test_a_refusal_says_why_in_words(changes: dict[str, Any], words: str) -> None:
    found = answer(job(**changes))
    assert words in found.refusal
    assert found.account is None
    assert words[:20] in Measured.read(found.content, REQUEST).refusal


def test_the_owner_limits_requests_a_day_whatever_the_clock_says() -> None:
    day = measuring.DAY_S
    before = [Asked(at=NOW - age, kinds="moments", outcome="answered") for age in (2 * day, 3.0, 2.0)]
    assert answer(job(asked=tuple(before), per_day=3)).refusal == ""
    ahead = Asked(at=NOW + 5 * day, kinds="moments", outcome="answered")
    refused = answer(job(asked=(*before, ahead), per_day=3))
    assert refused.refusal == "its owner allows no more requests a day than 3"
    limit = Asked(at=NOW, kinds="moments", outcome=refused.refusal)
    assert answer(job(asked=(*before, limit), per_day=3)).refusal == ""


def test_code_that_fails_is_told_at_home_alone() -> None:
    class Failing(Data):
        def measured_inputs(self) -> Iterator[Any]:
            raise ValueError("patient 7")

    found = answer(job(), Failing())
    assert "patient 7" in found.refusal
    assert "patient" not in Measured.read(found.content, REQUEST).refusal


def test_noise_is_paid_from_the_account_and_refused_when_the_budget_is_spent() -> None:
    pytest.importorskip("dp_accounting")
    plan = Plan(**DP)
    first = answer(job(request=NOISY, plan=plan))
    assert first.account is not None
    assert first.account.spent == (Cost(kind="device", noise=5.0, rate=1.0, steps=1),)
    assert 0 < first.account.epsilon <= 3.0
    account = first.account
    while not (found := answer(job(request=NOISY, plan=plan, account=account))).refusal:
        assert found.account is not None
        assert found.account.epsilon > account.epsilon
        account = found.account
    assert "budget does not pay" in found.refusal
    bound = PrivacyPolicy(kind="device", epsilon=0.5, delta=1e-5).bound(plan)
    assert "above 0.5" in answer(job(request=NOISY, plan=bound)).refusal  # the owner's --max-epsilon
    mixed = Account(spent=(Cost(kind=SAMPLE, noise=5.0, rate=1.0, steps=1),))
    assert "budget" in answer(job(request=NOISY, plan=plan, account=mixed)).refusal


def test_the_worker_answers_with_the_time_of_day() -> None:
    got: list[Any] = []
    worker = Worker(Data(), got.append)  # type: ignore[arg-type]
    found = worker._perform(job())
    assert isinstance(found, events.StatisticsMeasured)
    assert found.clock_s > NOW


# --- disk and options


def test_the_outbox_keeps_answer_and_log(tmp_path: Path) -> None:
    known = Statistics(request=9, content=b"\x01", asked=(Asked(at=1.5, kinds="labels", outcome="answered"),))
    with Outbox(tmp_path, DEVICE_KEY.key_id) as outbox:
        assert outbox.state.statistics == Statistics()
        outbox.save(replace(outbox.state, statistics=known), None, {})
    assert summary(tmp_path).state.statistics == known
    with Outbox(tmp_path, DEVICE_KEY.key_id) as outbox:
        assert outbox.state.statistics == known


def test_a_device_that_joins_again_keeps_its_log_alone() -> None:
    known = Statistics(request=9, content=b"\x01", asked=(Asked(at=1.5, kinds="labels", outcome="answered"),))
    state = State(key=DEVICE_KEY.key_id, statistics=known)
    assert state.rejoined(DEVICE_KEY.key_id).statistics == Statistics(asked=known.asked)


def test_options() -> None:
    assert (allowed(False, None), allowed(True, None), allowed(True, 2)) == (None, PER_DAY, 2)
    with pytest.raises(ConfigError, match="add --statistics"):
        allowed(False, 2)
    assert (check_setting(""), check_setting("7")) == (None, 7)
    for wrong in ("0", "51", "x", "-1"):
        with pytest.raises(ConfigError, match=r"edge\.toml"):
            check_setting(wrong)
