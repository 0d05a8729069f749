"""The reaction to a full disk: a warning at first, then no update is accepted until there is room again."""

from typing import Final

ENOUGH, LOW, FULL = "enough", "low", "full"  # states of a disk
LOW_BELOW: Final = 0.10  # parts of the file system that are free
FULL_BELOW: Final = 0.05  # a merge, a snapshot and the log still have room
RETRY_S: Final = 30.0  # until a device sends an update again that was answered `busy` for it


def state_of(free: float) -> str:
    """The state of a disk of which this part is free."""
    if free < FULL_BELOW:
        return FULL
    return LOW if free < LOW_BELOW else ENOUGH


def sentence(free: float) -> str:
    """What the operator is told of a disk of which this part is free."""
    meaning = {
        FULL: f"updates are answered `busy` below {FULL_BELOW:.0%}; free some space",
        LOW: f"below {FULL_BELOW:.0%} updates are answered `busy`",
        ENOUGH: "enough",
    }
    return f"{free:.1%} of the disk is free: {meaning[state_of(free)]}"
