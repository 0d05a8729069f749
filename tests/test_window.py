"""The window of unacknowledged messages to a broker: its limits, and how it adapts to the time an answer takes."""

from typing import Any

from ternbus.broker.link.window import BYTES_MAX, BYTES_TO_BEGIN, Window


def window(**limits: Any) -> Window:
    return Window(patience_s=8.0, **limits)


def send(into: Window, count: int, size_bytes: int, now: float = 0.0) -> None:
    for number in range(count):
        into.sent(number, ticket=100 + number, size_bytes=size_bytes, now=now)


def test_it_closes_at_as_many_messages_as_the_broker_takes() -> None:
    some = window(messages_max=2)
    is_open = [some.is_open]
    send(some, 1, 10)
    is_open.append(some.is_open)
    send(some, 2, 10)
    is_open.append(some.is_open)
    assert some.answered(0, now=0.1) == 100
    is_open.append(some.is_open)
    assert is_open == [True, True, False, True]


def test_it_closes_at_the_bytes_but_lets_one_message_through_however_large() -> None:
    some = window(bytes_max=100)
    assert some.is_open
    send(some, 1, 1000)
    assert not some.is_open


def test_quick_answers_open_it_up_to_a_limit() -> None:
    some = window()
    for _ in range(1000):
        send(some, 1, 120_000)
        some.answered(0, now=0.01)
    assert some.bytes_max == BYTES_MAX
    assert some.size_bytes == 0


def test_late_answers_narrow_it_to_one_message_at_a_time() -> None:
    some = window()
    for _ in range(10):
        send(some, 1, 120_000)
        some.answered(0, now=9.0)
    assert some.bytes_max == 1
    assert some.is_open
    send(some, 1, 5)
    assert not some.is_open


def test_answers_in_between_leave_it_as_it_is() -> None:
    some = window()
    send(some, 1, 120_000)
    some.answered(0, now=6.0)
    assert some.bytes_max == BYTES_TO_BEGIN


def test_only_a_message_larger_than_usual_that_is_not_answered_is_under_suspicion() -> None:
    some = window()
    found = [some.suspicion]
    send(some, 2, 122_880)
    found.append(some.suspicion)
    some.sent(7, ticket=1, size_bytes=122_881, now=0.0)
    assert "122881 bytes" in some.suspicion
    some.answered(7, now=1.0)
    assert [*found, some.suspicion] == ["", "", ""]
