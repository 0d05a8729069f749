"""The list of revoked keys on the broker: signed by the aggregator, for itself, so that none is taken back."""

from collections.abc import Callable

from support.small_world import LAB, Bench, Device, refusals, saved, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.store.revocations import FILE, read
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity

Make = Callable[..., Bench]
PAGE = topics.revocations(LAB, 0)


def page_of(identity: Identity, *keys: tuple[str, bytes], parts: int = 1) -> bytes:
    (body,) = revocations.pages(keys)
    about = {"federation": LAB, "sender": AGGREGATOR, "kind": revocations.KIND, "seq": 10**9, "meta": {"page": 0}}
    return build(identity, **about, body=body, parts=parts)  # type: ignore[arg-type]


def listed(bench: Bench, page: int = 0) -> set[str]:
    payload = bench.retained.get(topics.revocations(LAB, page))
    return {device for device, _ in revocations.read(parse(payload).body)} if payload else set()


def subscribed(actions: list[events.Action]) -> list[str]:
    return [each for action in actions if isinstance(action, events.Subscribe) for each in action.filters]


def test_a_revocation_is_on_disk_before_it_is_retained_and_signed(make: Make) -> None:
    bench = make()
    pi, _ = bench.join("pi"), bench.join("other")
    assert PAGE not in bench.retained
    bench.revoke("pi")
    frame = parse(bench.retained[PAGE])
    frame.check_authentic(bench.identity.public)
    topics.check(frame, topics.parse(PAGE))
    assert revocations.read(frame.body) == {("pi", pi.identity.public)}
    assert bench.ledger.frame(PAGE) == bench.retained[PAGE]
    bench.revoke("other")
    assert listed(bench) == {"pi", "other"}


def test_a_key_that_was_only_replaced_is_not_in_the_list(make: Make) -> None:
    bench = make()
    bench.join("pi")
    bench.join("pi")
    bench.revoke("pi")
    assert len(revocations.read(parse(bench.retained[PAGE]).body)) == 1


def test_an_older_copy_takes_the_list_from_the_broker(make: Make) -> None:
    """Who is in it is told so, whether the copy knows the key, another key, or nothing of the device."""
    bench = make()
    pi, renewed = bench.join("pi"), bench.join("renewed")
    retired, late = Device("renewed", bench.schema), Device("late", bench.schema)
    keys = [(each.name, each.identity.public) for each in (pi, retired, late)]
    actions = bench.receive(PAGE, page_of(bench.identity, *keys))
    assert set(saved(actions, records.KeysRevoked)[0].keys) == set(keys)
    assert any("late, pi, renewed" in action.text for action in actions if isinstance(action, events.Log))
    for _ in range(2):
        for device in (pi, retired, late):
            (receipt,) = bench.send(device, ternary_block(bench.schema, 1), 0)
            assert receipt.outcome == "revoked"
        assert bench.core.registry.revoked_keys() == frozenset(keys)
        bench.restart()
        bench.start()
    assert bench.send(renewed, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"
    assert {device for device, _ in read(bench.directory / FILE).keys} == {"pi", "renewed", "late"}
    assert listed(bench) == {"pi", "renewed", "late"}
    assert saved(bench.receive(PAGE, bench.retained[PAGE]), records.KeysRevoked) == []


def test_updates_that_wait_stay_in_the_buffer_and_in_the_ledger(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    bench.receive(PAGE, page_of(bench.identity, ("pi", pi.identity.public)))
    buffer = list(bench.core.model.buffer)
    bench.restart()
    assert (bench.core.model.buffer, len(buffer)) == (buffer, 1)


def test_what_the_aggregator_did_not_sign_revokes_nobody(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    key = ("pi", pi.identity.public)
    bench.receive(PAGE, b"")
    bench.receive(PAGE, page_of(pi.identity, key))
    bench.receive(PAGE, page_of(bench.identity, key, parts=2))
    bench.receive(topics.head(LAB), page_of(bench.identity, key))
    assert bench.core.registry.revoked_keys() == frozenset()
    assert refusals(bench.tick(2.0)) == {"bad-signature": 1, "bad-body": 1}


def test_pages_are_asked_for_by_name_one_more_than_are_known(make: Make) -> None:
    bench = make()
    bench.start()
    connected = subscribed(bench.connect())
    assert [each for each in connected if "revocations" in each] == [PAGE]
    stranger = Identity.generate()
    asked = subscribed(bench.receive(PAGE, page_of(bench.identity, ("x", stranger.public))))
    assert asked == [topics.revocations(LAB, 1)]
    assert subscribed(bench.receive(PAGE, bench.retained[PAGE])) == []
    assert topics.revocations(LAB, 1) in subscribed(bench.connect())


def test_a_broker_that_lost_everything_is_given_the_list_again(make: Make) -> None:
    bench = make()
    bench.join("pi")
    bench.revoke("pi")
    bench.start()
    bench.retained.clear()
    bench.connect()
    bench.tick(seconds=10.0)
    assert listed(bench) == {"pi"}


def test_a_list_from_before_it_was_published_is_published_at_the_start(make: Make) -> None:
    bench = make()
    bench.join("pi")
    bench.revoke("pi")
    with bench.ledger.transaction():
        bench.ledger.db.execute("DELETE FROM frames WHERE topic = ?", (PAGE,))
    bench.retained.clear()
    bench.restart()
    bench.start()
    assert listed(bench) == {"pi"}
    assert bench.core.start(bench.now) == []


def test_many_keys_make_several_pages(make: Make) -> None:
    keys = [(f"d{number:04}", number.to_bytes(32, "little")) for number in range(2500)]
    bodies = list(revocations.pages(keys))
    assert [len(revocations.read(body)) for body in bodies] == [1000, 1000, 500]
    assert max(map(len, bodies)) + 4096 < 120 * 1024
    longest = [("d" * 64, bytes([number % 256, number // 256] * 16)) for number in range(1000)]
    assert len(next(iter(revocations.pages(longest)))) + 1024 < 120 * 1024
