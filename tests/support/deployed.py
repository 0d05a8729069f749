"""Commands of deploy/, run as their containers would run them, on this machine."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

WITHIN_S = 120.0  # ends a wait for what never comes
BIN = Path(sys.executable).parent


class Containers:
    """Processes with folders of the host in place of a container's, ended together."""

    def __init__(self, folders: Mapping[str, object]) -> None:
        self._folders = folders
        self._running: dict[str, subprocess.Popen[str]] = {}
        self.env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin"}

    def local(self, text: str) -> str:
        """The text with this machine's folders and addresses; longer names first, since one may begin another."""
        for name in sorted(self._folders, key=len, reverse=True):
            text = text.replace(name, str(self._folders[name]))
        return text

    def done(self, command: Sequence[str], env: Mapping[str, str]) -> str:
        """What a command that ends prints; it must succeed."""
        environment = {**self.env, **{name: self.local(value) for name, value in env.items()}}
        done = subprocess.run(
            [self.local(word) for word in command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._running[name] = subprocess.Popen(
            [self.local(word) for word in command],
            env={**self.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until_line(self, name: str, pattern: str) -> str:
        """The first line of a process from now on that the pattern is found in."""
        process = self._running[name]
        assert process.stdout is not None
        seen = []
        watch = threading.Timer(WITHIN_S, process.kill)
        watch.start()
        try:
            for line in process.stdout:
                seen.append(line)
                if re.search(pattern, line):
                    return line
        finally:
            watch.cancel()
        raise AssertionError(f"{name} ended without {pattern!r}:\n{''.join(seen)}")

    def kill(self, name: str) -> None:
        self._running[name].kill()

    def end(self, name: str) -> int:
        """End a process as a container is stopped, and wait for it."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WITHIN_S)
        return process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            process.kill()
            process.communicate(timeout=WITHIN_S)
