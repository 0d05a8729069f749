"""The exit codes of Ternbus commands. The units in deploy/systemd do not restart after 2, 3 or 4."""

from typing import Final

EXIT_DONE: Final = 0  # done
EXIT_FAILED: Final = 1  # no broker, a full disk, a timeout, a check that found faults, stopped with work unfinished
EXIT_CONFIG: Final = 2  # an error that the operator must correct, such as a wrong option; a corrupt store
EXIT_REFUSED: Final = 3  # device: the aggregator has revoked or refused it
EXIT_BUDGET: Final = 4  # device: its owner's privacy budget is spent
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, the convention of shells
