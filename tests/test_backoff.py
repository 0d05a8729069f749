"""When a client connects again, and when it guesses that another one has its name."""

from collections.abc import Iterable

import pytest

from ternbus.broker.backoff import CUT_SHORT, LONGEST_S, SHORT_S, STEADY_S, Reconnect


def connections(
    reconnect: Reconnect, lasted_s: Iterable[float | None], now: float = 0.0
) -> tuple[list[float], list[bool]]:
    """(the waits, the guesses) after connections that lasted so long; None: the attempt failed."""
    waits, guesses = [], []
    for lasted in lasted_s:
        now = max(now, reconnect.due_s)
        if lasted is not None:
            reconnect.connected(now)
            now += lasted
        guesses.append(reconnect.failed(now))
        waits.append(reconnect.due_s - now)
    return waits, guesses


@pytest.mark.parametrize("lasted_s", [1.0, LONGEST_S, STEADY_S - 1])
def test_connections_that_do_not_last_do_not_reset_the_backoff(lasted_s: float) -> None:
    """Two clients of one name end each other's connections after as long as each of them waits."""
    waits, _ = connections(Reconnect(salt="pi"), [lasted_s] * 100)
    assert all(LONGEST_S / 2 <= wait <= LONGEST_S for wait in waits[10:])
    waits, _ = connections(Reconnect(salt="pi"), [1.0] * 20 + [STEADY_S])
    assert waits[-1] <= 0.2


def test_connections_cut_short_in_a_row_make_one_guess() -> None:
    short = SHORT_S / 2
    _, guesses = connections(Reconnect(salt="pi"), [short] * 100)
    assert [number for number, guess in enumerate(guesses) if guess] == [CUT_SHORT - 1]
    _, guesses = connections(Reconnect(salt="pi"), ([short] * (CUT_SHORT - 1) + [SHORT_S]) * 9)
    assert not any(guesses)
    _, guesses = connections(Reconnect(salt="pi"), ([short] * (CUT_SHORT - 1) + [None]) * 9)
    assert not any(guesses)  # a broker that is not there tells nothing of other clients
    _, guesses = connections(Reconnect(salt="pi"), ([short] * CUT_SHORT + [STEADY_S]) * 3)
    assert sum(guesses) == 3
