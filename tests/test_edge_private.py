"""The core of a device of private sums: what it sends, by which terms, and what it never sends."""

from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from support.core_device import (
    DEVICE,
    DEVICE_KEY,
    Device,
    connected,
    evaluated,
    following,
    logged,
    of,
    only,
    published,
    trained,
    update_in,
)
from support.private_device import (
    PINS,
    SEALED,
    aggregator,
    finished,
    named,
    private,
    sending,
    terms_messages,
    training,
    words_of,
)
from support.private_sums import card, seeds_in, terms_for
from support.scripted_aggregator import SHAPES, ScriptedAggregator
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Status, Update
from ternbus.broker.protocol.schema import Schema, vector_digest
from ternbus.broker.sums.terms import Terms, context, digest_of
from ternbus.edge.core import events
from ternbus.edge.core.actions import Publish, Save, StartEvaluation, StartTraining
from ternbus.edge.core.receipts import is_out

OTHER_KEY = Identity(b"e" * 32)
TWO = (card(1), card(2))


def standard(scripted: ScriptedAggregator) -> Terms:
    return terms_for(scripted.schema)


def receipt(scripted: ScriptedAggregator, seq: int, outcome: str, key: Identity = DEVICE_KEY, **more: Any) -> Any:
    return scripted.receipt(DEVICE, key.key_id, seq, outcome, **more)


# -- what is sent


def test_a_private_update_is_masked_and_sealed_and_says_nothing_of_the_data() -> None:
    scripted, device, job = training()
    assert job.sums is not None
    done = device.handle(finished(job))
    frame = update_in(done)
    update = Update.from_meta(frame.meta)
    assert (update.codec, update.encoding, update.sealed, update.samples) == ("private", "raw", True, 1)
    assert update.metrics == {}
    assert (update.min, len(update.boxes)) == (PINS.min, 1)
    assert frame.body.startswith(SEALED + frame.key + frame.seq.to_bytes(8, "little"))
    content = finished(job).content
    assert words_of(frame, standard(scripted)).tobytes() == content.words  # type: ignore[union-attr]
    masked = frame.body[len(SEALED) + 16 :]
    assert np.mean(np.frombuffer(masked, np.uint8) == np.frombuffer(content.words, np.uint8)) < 0.1  # type: ignore[union-attr]
    assert isinstance(done[0], Save)
    assert done[0].state.outstanding is not None
    assert done[0].state.outstanding.encoded == content.words  # type: ignore[union-attr]


def test_an_update_states_the_account_of_privacy_and_no_metric_of_the_task_by_its_name() -> None:
    """A task may call a loss "delta"."""
    assert Update.from_meta(sending()[2].meta).metrics == {}
    noisy = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0}
    assert Update.from_meta(sending(plan=noisy)[2].meta).metrics == {"epsilon": 1.0, "delta": 1e-5}


def test_the_context_binds_version_model_plan_bytes_and_terms() -> None:
    scripted, _, job = training()
    plan = msgpack.packb(scripted.plan)
    terms = digest_of(standard(scripted).content())
    model = vector_digest(scripted.vectors[0])
    assert job.sums is not None
    assert job.sums.context == context(version=0, model=model, plan=digest_of(plan), terms=terms)


def test_the_same_bytes_as_other_tensors_are_another_context() -> None:
    """Tensors in another order, or of other roles, make another model of one vector: it may be dead for all but one."""
    jobs = []
    for shapes in (SHAPES, dict(reversed(SHAPES.items()))):
        scripted, device = aggregator(schema=Schema.of(shapes)), private()
        done = device.arrive(*terms_messages(scripted), scripted.status(), scripted.head(), *scripted.snapshot())
        jobs.append(only(done, StartTraining))
    one, other = jobs
    assert np.array_equal(one.vector, other.vector)
    assert one.schema != other.schema
    assert one.sums is not None
    assert other.sums is not None
    assert one.sums.terms == other.sums.terms
    assert one.sums.context != other.sums.context


@pytest.mark.parametrize("names", [bytes(32), "x", None])
def test_no_update_is_made_where_the_plan_does_not_name_the_schema_of_the_model(names: Any) -> None:
    scripted, device = aggregator(), private()
    scripted.plan["schema"] = names
    done = device.arrive(*terms_messages(scripted), scripted.status(), scripted.head(), *scripted.snapshot())
    assert of(done, StartTraining) == []
    assert "does not name the schema" in device.core.state.refusal
    scripted.plan["schema"] = scripted.schema.digest
    assert len(of(device.arrive(scripted.head()), StartTraining)) == 1


def test_a_plan_that_names_another_schema_later_has_no_update_by_the_first() -> None:
    scripted, device, frame = sending()
    other = Schema.of(dict(reversed(SHAPES.items())))
    scripted.advance()
    scripted.plan["schema"] = other.digest
    accepted = receipt(scripted, frame.seq, "accepted")
    done = device.arrive(accepted, scripted.head(schema=other.digest), *scripted.delta(1))
    assert of(done, StartTraining) == []
    scripted.plan["schema"] = scripted.schema.digest
    assert len(of(device.arrive(scripted.head()), StartTraining)) == 1


def test_the_same_plan_in_other_bytes_is_another_context() -> None:
    scripted, device = aggregator(plan={"batch_size": 1}), private()
    _, payload = scripted.head()
    frame = parse(payload)
    long = frame.meta_bytes.replace(b"\xaabatch_size\x01", b"\xaabatch_size\xcd\x00\x01")
    header = frame.header.replace(frame.meta_bytes, long)
    assert header != frame.header
    forged = b"TBF1" + len(header).to_bytes(4, "little") + header
    forged += scripted.identity.sign(b"ternbus/1 frame\0" + header)
    done = device.arrive(*terms_messages(scripted), ("ternbus/1/fed/all/head", forged), *scripted.snapshot())
    other = only(device.arrive(scripted.status()) + done, StartTraining)
    _, _, job = training(plan={"batch_size": 1})
    assert job.sums is not None
    assert other.sums is not None
    assert other.plan == job.plan
    assert other.sums.context != job.sums.context


def test_each_helper_of_the_terms_gets_a_box_also_one_that_is_not_pinned() -> None:
    terms = terms_for(aggregator().schema, helpers=TWO)
    _, _, frame = sending(of=terms)
    seeds = seeds_in(frame, DEVICE_KEY.public, (1, 2))
    assert len(set(seeds)) == 2
    assert words_of(frame, terms).size == terms.layout.words


def test_an_update_is_the_same_bytes_each_time_also_after_a_restart() -> None:
    scripted, device, frame = sending()
    again = device.restarted()
    again.connect()
    sent = update_in(again.arrive(scripted.status(), scripted.head()))
    assert (sent.header, sent.body) == (frame.header, frame.body)


def test_a_private_device_publishes_no_metrics_whatever_it_is_asked_for() -> None:
    scripted, device, _ = training(reports=True)
    device.handle(trained_as(device))
    scripted.advance()
    done = device.arrive(*scripted.delta(1), scripted.head())
    assert published(device.handle(evaluated(1)) + done, "metrics") == []
    judge = connected("evaluate", sums=PINS)
    judge.arrive(scripted.status(), scripted.head(), *scripted.snapshot(), *scripted.delta(1))
    assert len(of(judge.actions, StartEvaluation)) == 1
    assert published(judge.handle(evaluated(1)), "metrics") == []


def trained_as(device: Device) -> events.TrainingFailed:
    job = device.core.training.running
    assert job is not None
    return events.TrainingFailed(base=job.base, reason="quotes the data")


def test_nobody_is_told_of_a_failure() -> None:
    """A model can be made by which a training, or an evaluation, fails on some data only."""
    _, device, _ = training()
    (frame,) = published(device.handle(trained_as(device)), "status")
    assert Status.from_meta(frame.meta).failing == ""
    _, device, job = training(reports=True)
    done = device.handle(finished(job, 0.0, failure="quotes the data"))
    assert "training-failed" in logged(done)
    assert Update.from_meta(update_in(done).meta).is_private
    assert b"quotes" not in b"".join(each.payload for each in of(done, Publish))
    assert only(device.actions, StartEvaluation).private


# -- the same content under another number or key


def again_as(terms: Terms, before: Frame, after: Frame, key: Identity = DEVICE_KEY) -> None:
    """The second frame has other bytes, and the words and the seeds of the first."""
    assert after.header != before.header
    assert after.meta["context"] == before.meta["context"]
    assert after.meta["boxes"] != before.meta["boxes"]
    assert np.array_equal(words_of(after, terms, key), words_of(before, terms))
    assert seeds_in(after, key.public) == seeds_in(before, DEVICE_KEY.public)
    same_mask = after.body[-8 * terms.layout.words :] == before.body[-8 * terms.layout.words :]
    assert same_mask == (key is DEVICE_KEY)


def test_a_number_that_was_used_before_gets_the_same_words_and_seeds_under_the_next() -> None:
    scripted, device, frame = sending()
    for highest in (5000, 7000):
        (again,) = published(device.arrive(receipt(scripted, frame.seq, "duplicate", highest_seq=highest)), "update")
        assert again.seq == highest + 1
        again_as(standard(scripted), frame, again)
        assert device.disk is not None
        assert device.disk.outstanding is not None
        assert device.disk.outstanding.seq == again.seq
        frame = again


def test_smaller_packets_get_the_same_words_and_seeds_under_another_number() -> None:
    terms = terms_for(aggregator().schema, bits=8)
    scripted, device, frame = sending(of=terms)
    device.handle(events.Disconnected(reason="gone"))
    device.wait(5.0)
    save = only(device.handle(events.Connected(frame_bytes=1600)), Save)
    assert save.answered is not None
    assert save.answered.outcome == "renumbered"
    before, after = frame, save.state.outstanding
    assert after is not None
    assert after.private is not None
    assert after.seq > before.seq
    assert after.private.seeds == tuple(seeds_in(before, DEVICE_KEY.public))
    parts = published(device.arrive(scripted.status()), "update")
    assert len(parts) > 1
    assert len({part.header for part in parts}) == len(parts)
    assert sorted({part.meta["boxes"][0] for part in parts}) == list(after.private.boxes)
    joined = b"".join(part.body for part in parts)
    again_as(terms, frame, replace(parts[0], body=joined))


def test_another_key_gets_the_same_words_and_seeds_under_another_mask() -> None:
    scripted, device, frame = sending()
    again = device.restarted(identity=OTHER_KEY)
    again.connect()
    again.arrive(scripted.status())
    (enroll,) = published(again.actions, "enroll")
    sent = update_in(again.arrive(receipt(scripted, enroll.seq, "enrolled", OTHER_KEY), scripted.head()))
    again_as(standard(scripted), frame, sent, OTHER_KEY)


def test_an_update_of_the_time_before_private_sums_is_not_sent() -> None:
    scripted, device = following()
    device.handle(trained(only(device.actions, StartTraining)))
    again = device.restarted(sums=PINS)
    again.connect()
    (answered,) = [save.answered for save in of(again.actions, Save) if save.answered is not None]
    assert answered.outcome == "unanswered"  # it may have been sent, and accepted
    scripted = aggregator()
    done = again.arrive(scripted.status(), *terms_messages(scripted), scripted.head(seq=100), *scripted.snapshot())
    assert published(done + again.wait(1000.0), "update") == []
    assert again.disk is not None
    assert again.disk.outstanding is None
    assert len(of(again.actions, StartTraining)) == 1


# -- what an update has of other versions: nothing


def nothing_of_before(scripted: ScriptedAggregator, device: Device, job: StartTraining) -> bool:
    """Whether an update of a training that changes nothing, as at learning rate 0, carries nothing."""
    frame = update_in(device.handle(finished(job, 0.0, draw=2)))
    terms = job.sums.terms if job.sums is not None else standard(scripted)
    ternary, plain = terms.layout.unpack(words_of(frame, terms))
    assert device.disk is not None
    return not (ternary.any() or plain[: terms.dense].any()) and device.disk.residual is None


@pytest.mark.parametrize("outcome", ["stale", "accepted", "duplicate", "invalid"])
def test_what_was_sent_never_comes_back_whatever_the_receipt_says(outcome: str) -> None:
    scripted, device, frame = sending()
    done = device.arrive(receipt(scripted, frame.seq, outcome))
    assert device.disk is not None
    assert (device.disk.residual, device.disk.outstanding) == (None, None)
    assert [event for event in logged(done) if event != "waiting"] == [outcome]
    scripted.advance()
    job = only(device.arrive(*scripted.delta(1), scripted.head()), StartTraining)
    assert nothing_of_before(scripted, device, job)


def test_what_one_device_learned_by_a_scale_of_0_is_in_no_later_sum_at_learning_rate_0() -> None:
    """Else an aggregator that shows a version to this device alone sees all of its change in the next sum."""
    zero = terms_for(aggregator().schema, scales=(0.0, 0.0))
    scripted, device, job = training(zero)
    assert job.plan.error_feedback
    frame = update_in(device.handle(finished(job)))  # its whole change is cut to 0: it is not in this update
    device.arrive(receipt(scripted, frame.seq, "accepted"))
    device.arrive(*named(scripted, standard(scripted)))
    scripted.advance()
    job = only(device.arrive(*scripted.delta(1), scripted.head()), StartTraining)
    assert nothing_of_before(scripted, device, job)


def offered(**changes: Any) -> tuple[ScriptedAggregator, Device, Frame]:
    """A private device that has offered its update, and sent no part of it."""
    scripted, device, job = training(direct_parts=0, **changes)
    (frame,) = published(device.handle(finished(job)), "offer")
    assert frame.meta == {"base": 0, "parts": 1}
    return scripted, device, frame


def test_a_grant_that_waits_behind_the_head_that_makes_an_update_late_has_nothing_sent() -> None:
    scripted, device, frame = offered(max_staleness=0)
    scripted.advance()
    grant = scripted.grant(DEVICE, DEVICE_KEY.key_id, frame.seq, [[0, 0]])
    for topic, payload in [*scripted.delta(1), scripted.head(), grant]:
        device.core.take(events.FrameArrived(topic=topic, frame=parse(payload), retained=False), device.now)
    done = device.core.proceed(device.now)
    assert "withdrawn" in logged(done)
    assert published(done, "update") == []
    assert (device.core.state.outstanding, device.core.state.left) == (None, -1)


def test_an_update_that_is_late_when_its_training_ends_is_forgotten() -> None:
    scripted, device, job = training(direct_parts=0, max_staleness=0)
    scripted.advance()
    assert "withdrawn" not in logged(device.arrive(*scripted.delta(1), scripted.head()))
    done = device.handle(finished(job))
    assert "withdrawn" in logged(done)
    assert published(done, "offer") == []
    assert device.core.state.outstanding is None


def test_where_an_update_is_given_up_nobody_trains_on_a_vector_without_its_digest() -> None:
    scripted, device, _ = offered(max_staleness=1)
    scripted.advance()
    device.arrive(*scripted.delta(1), scripted.head())
    scripted.advance()
    scripted.vectors[2] = scripted.vectors[2] + np.float32(1)  # head and delta state a digest that is not the block's
    done = device.arrive(*scripted.delta(2), scripted.head())
    assert "withdrawn" in logged(done)
    assert "resync" in logged(done)
    assert of(done, StartTraining) == []


def test_an_update_that_is_late_before_any_of_it_was_sent_is_forgotten() -> None:
    scripted, device, frame = offered(max_staleness=1)
    scripted.advance()
    assert "withdrawn" not in logged(device.arrive(*scripted.delta(1), scripted.head()))
    scripted.advance()
    done = device.arrive(*scripted.delta(2), scripted.head())
    assert "withdrawn" in logged(done)
    job = only(done, StartTraining)
    assert job.base == 2
    assert device.disk is not None
    assert (device.disk.outstanding, device.disk.answered_base, device.disk.left) == (None, 0, -1)
    assert published(device.arrive(scripted.grant(DEVICE, DEVICE_KEY.key_id, frame.seq, [[0, 0]])), "update") == []
    scripted.direct_parts = 9
    device.arrive(scripted.head())
    assert nothing_of_before(scripted, device, job)


def test_a_late_update_is_forgotten_after_a_restart_without_the_model() -> None:
    scripted, device, _ = offered(max_staleness=0)
    again = device.restarted()
    again.connect()
    scripted.advance()
    assert "withdrawn" in logged(again.arrive(scripted.status(), scripted.head()))
    assert again.disk is not None
    assert (again.disk.outstanding, again.disk.residual) == (None, None)


def test_a_stale_receipt_for_an_offer_gives_nothing_back() -> None:
    scripted, device, frame = offered()
    done = device.arrive(receipt(scripted, frame.seq, "stale"))
    assert "is not sent again, since private sums keep no residual" in str(done)
    assert device.disk is not None
    assert (device.disk.outstanding, device.disk.residual) == (None, None)


def test_what_an_earlier_plan_has_left_in_the_residual_is_in_no_private_update() -> None:
    scripted, device, _ = training()
    assert device.disk is not None
    device.disk = replace(device.disk, residual=np.ones(scripted.schema.elements, np.float32))
    again = device.restarted()
    again.connect()
    messages = [*terms_messages(scripted), scripted.status(), scripted.head(), *scripted.snapshot()]
    job = only(again.arrive(*messages), StartTraining)
    assert nothing_of_before(scripted, again, job)


def test_that_a_part_may_have_left_is_on_disk_before_it_leaves() -> None:
    scripted, device, frame = offered(max_staleness=0)
    assert device.disk is not None
    assert device.disk.left == -1
    assert published(device.arrive(scripted.grant(DEVICE, DEVICE_KEY.key_id, frame.seq, [])), "update") == []
    assert device.disk.left == -1
    done = device.arrive(scripted.grant(DEVICE, DEVICE_KEY.key_id, frame.seq, [[0, 0]]))
    assert isinstance(done[0], Save)
    assert done[0].state.left == 0
    assert len(of(done, Publish)) == 1
    again = device.restarted()  # the connection may have carried it or not
    again.connect()
    scripted.advance()
    done = again.arrive(scripted.status(), scripted.head())
    assert "withdrawn" not in logged(done)
    assert len(published(done, "offer")) == 1
    again.arrive(receipt(scripted, frame.seq, "stale"))
    assert again.disk is not None
    assert again.disk.outstanding is None


def test_what_left_is_known_by_its_version_whatever_number_it_has() -> None:
    scripted, device, frame = sending()
    device.arrive(receipt(scripted, frame.seq, "duplicate", highest_seq=900))
    assert device.disk is not None
    assert device.disk.outstanding is not None
    assert is_out(device.disk, device.disk.outstanding)
    assert device.disk.rejoined(OTHER_KEY.key_id).left == -1
    assert device.disk.with_key(OTHER_KEY.key_id).left == 0
