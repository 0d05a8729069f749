"""The exceptions of Ternbus, by who can correct the error: the peer, the operator, the disk or the network."""

import errno
from itertools import chain
from traceback import StackSummary
from typing import Final

from ternbus.broker.own_code import own_frames
from ternbus.broker.printable import printable

FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})
# A path that may not be used, does not exist or is of another kind is so after a restart, too.
WRONG_PATH: Final = FORBIDDEN | {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip


class FederationError(Exception):
    """The base class of all exceptions that Ternbus raises on purpose. Any other exception is a bug."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the lines of the user's own code, then the text. Ours help nobody to correct it."""
        causes: list[BaseException] = [self]
        while (cause := causes[-1].__cause__) is not None and cause not in causes:  # somebody may raise one from itself
            causes.append(cause)
        lines = StackSummary.extract(chain.from_iterable(map(own_frames, causes))).format()
        return [*map(str.rstrip, lines), f"{type(self).__name__}: {self}", *getattr(self, "__notes__", ())]


class ProtocolError(FederationError):
    """A peer sent an invalid message: the receiver counts it, acknowledges it to the broker and continues.

    ``reason`` is a short constant for each kind of error, by which errors are counted. ``detail`` describes the
    instance, for logs and receipts. It may quote text from the peer, so control characters are replaced.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        shown = printable(detail)
        super().__init__(f"{reason}: {shown}" if shown else reason)
        self.reason = reason
        self.detail = shown


class ConfigError(FederationError):
    """An error that the operator must correct: one line with what to do. The command ends with exit code 2."""


class StorageError(FederationError):
    """A disk did not do what it was asked: full, read-only or failing. The text names the file; a restart may help."""


class CorruptError(FederationError):
    """A store holds what was never written to it. The text names the store and the command that helps."""


class LinkError(FederationError):
    """The broker cannot be reached or refuses the connection; a later attempt may succeed."""
