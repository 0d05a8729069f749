"""The levels of log lines, and their priorities in a system's journal."""

from collections.abc import Mapping
from typing import Final

INFO, WARNING, ERROR = "info", "warning", "error"
PRIORITIES: Final[Mapping[str, int]] = {ERROR: 3, WARNING: 4, INFO: 6}  # of syslog, RFC 5424, section 6.2.1
