"""The shell blocks of a page, run in order as its reader would run them, with this machine for every other one.

A block is run, unless the line above it says who runs it or why nobody does:

    <!-- run by tests/test_runbook.py -->
    <!-- not run: it needs root and systemd -->

What a reader has done between two blocks stands in a comment too, and is run before the next block:

    <!-- meanwhile
    ternbus edge join invitations/pi-1.toml pi-1 --task digits-numpy --run
    until version agg 2
    -->

There are six commands of the story's own: `until version DIR N` and `until file PATH` wait, `stop DIR` ends the service
of a directory and `kill DIR` cuts its power, `write NAME` writes the page's block that begins with `# NAME`, and
`let NAME COMMAND` puts what the command prints in the place of NAME from then on.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ternbus.aggregator.store import status as statuses

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
SHELL = ("sh", "bash", "console", "shell")
WITHIN_S = 600.0  # ends a wait for what never comes
BLOCK = re.compile(
    r"(?P<above>(?:^<!--(?:(?!-->).)*-->\n+)*)^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```",
    flags=re.DOTALL | re.MULTILINE,
)
COMMENT = re.compile(r"<!-- ?(.*?) ?-->", flags=re.DOTALL)
RUN_BY = re.compile(r"run by (tests/\S+\.py)")
NOT_RUN = re.compile(r"not run: (\S.{9,})", flags=re.DOTALL)
MEANWHILE = re.compile(r"meanwhile\n(.*)", flags=re.DOTALL)
# What stays until it is stopped.
SERVICE = re.compile(
    r"ternbus (?:broker up|aggregator (?:run|up)|helper run|edge (?:run|evaluate)|edge join .*--(?:run|evaluate)\b)"
)
STOPPED = re.compile(r"ternbus aggregator (?:restore|restored|repair|prune) ")  # these say: stop the aggregator first
ADDRESS, NAME = re.compile(r"\b192\.168\.\d+\.\d+\b"), re.compile(r"\b(?:bus|broker)\.example\.org\b")
PORT = re.compile(r"\b(mqtts?://(?:127\.0\.0\.1|localhost))(?::\d+|\b)")
# Runs that take minutes as they are printed, and the options with which they take seconds.
SHORTER = {r"ternbus lab run ": {"--versions": 2, "--devices": 3}, r"ternbus lab simulate ": {"--versions": 2}}
STAMP = re.compile(r"\b(\w+)-\d{8}T\d{6}Z\b")  # of a backup, which stands for the newest there is
CODES = {  # exit codes that are an answer
    r"ternbus doctor": {0, 1},
    r"ternbus aggregator status .*--check": {0, 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A shell block of a page: its first line's number, its text, and what is said of it above."""

    line: int
    text: str
    meanwhile: str
    run_by: str
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    """The shell blocks of the page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] not in SHELL:
            continue
        said = COMMENT.findall(found["above"])
        yield Block(
            line=text.count("\n", 0, found.start("language")) + 1,
            text=found["text"],
            meanwhile="\n".join(each[1] for note in said if (each := MEANWHILE.fullmatch(note))),
            run_by=next((each[1] for note in said if (each := RUN_BY.fullmatch(note))), ""),
            not_run=next((each[1] for note in said if (each := NOT_RUN.fullmatch(note))), ""),
        )


def lines(text: str) -> Iterator[str]:
    """The commands of a block: continued lines as one, without what is only a comment."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield " ".join(line.split())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Story:
    """A page's story: its folder, the services that run there, and what stands for the names of the page."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder, self.current = page, folder, folder
        self.names: dict[str, str] = {"/backups": str(folder / "backups")}
        self.logs = folder / ".logs"
        (folder / "examples").symlink_to(ROOT / "examples")
        self.port = 0
        self._services: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
        self._begun: dict[str, int] = {}  # where the log of a service's newest run begins
        self._written: list[str] = []  # scenarios among it are as short as they are printed
        self._env = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin",
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT / "tests"),  # for support.page_data
            "MPLBACKEND": "agg",
            "OMP_NUM_THREADS": "1",  # torch in many processes at once is slower with more
        }

    def tell(self, text: str) -> None:
        """Do what the text says."""
        for line in lines(text):
            self._do(line)

    def _do(self, line: str) -> None:
        match shlex.split(line, comments=True):
            case ["until", "version", directory, number]:
                self._until(lambda: self._version(directory) >= int(number), line)
            case ["until", "file", path]:
                self._until((self.folder / path).exists, line)
            case ["stop", directory]:
                self._stop(directory)
            case ["kill", directory]:
                process = self._services.pop(directory)[1]
                process.kill()
                process.wait(WITHIN_S)
            case ["write", name]:
                (self.folder / name).write_text(written(self.page, name), encoding="utf-8")
                self._written.append(name)
            case ["let", name, *_]:
                self.names[name] = self._run(line.split(None, 2)[2]).strip()
            case ["cd", folder]:
                self.current = self.current / folder
            case _ if SERVICE.match(line):
                self._start(self._here(line))
            case _:
                if STOPPED.match(line):
                    for directory in [each for each, (kind, _) in self._services.items() if kind == "aggregator"]:
                        self._stop(directory)
                self._run(line)

    def _here(self, line: str) -> str:
        """The command with this machine's addresses, free ports, and the names that are known by now."""
        for name, value in self.names.items():
            line = re.sub(rf"(?<![\w/]){re.escape(name)}(?!\w)", value.replace("\\", r"\\"), line)
        line = STAMP.sub(self._newest, line)
        local = NAME.sub("localhost", ADDRESS.sub("127.0.0.1", line))
        makes_broker = re.match(r"ternbus (?:broker init|aggregator up .*--model)", local)
        plain_broker = re.match(r"ternbus broker up (\S+)", local)
        if makes_broker or (plain_broker and not (self.folder / plain_broker[1] / "broker.toml").exists()):
            self.port = free_port()
            tls = " --tls" if "aggregator up" in local and local != line and "--no-tls" not in local else ""
            local = _with(local, f"--port {self.port}{tls}")
        written_here = any(name in local.split() for name in self._written)
        for options in (
            options for pattern, options in SHORTER.items() if re.match(pattern, local) and not written_here
        ):
            for option, number in options.items():
                local = local if option in local else _with(local, f"{option} {number}")
        return PORT.sub(rf"\1:{self.port}", local) if self.port else local

    def _newest(self, stamp: re.Match[str]) -> str:
        made = sorted((self.folder / "backups").glob(f"{stamp[1]}-*"))
        return made[-1].name if made else stamp[0]

    def _run(self, line: str) -> str:
        local = self._here(line)
        with subprocess.Popen(
            ["bash", "-c", local], cwd=self.current, env=self._env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed = self._printed(process, local)
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)  # the shell and what it has begun
                raise
        codes = next((codes for pattern, codes in CODES.items() if re.match(pattern, line)), {0})
        if said := re.search(r"# exit code (\d+)", line):
            codes = {int(said[1])}
        assert process.returncode in codes, f"{local}\nexit code {process.returncode}\n{printed}{self._logs()}"
        return printed

    def _printed(self, process: subprocess.Popen[str], what: str) -> str:
        """What the process prints until it ends. A service that fails meanwhile fails the story at once."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                return process.communicate(timeout=2)[0]
            except subprocess.TimeoutExpired:
                self._check(what, deadline)

    def _check(self, what: str, deadline: float) -> None:
        """Fail if a service has failed, or the time is over."""
        failed = [each for each, (_, process) in self._services.items() if process.poll() not in (None, 0, 3)]
        assert not failed, f"{what}: {failed[0]} has ended:{self._logs()}"
        assert time.monotonic() < deadline, f"{what}: it does not end{self._logs()}"

    def _start(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        kind, directory = words[1], words[4] if words[2] == "join" else words[3]
        if directory in self._services:
            assert self._services[directory][1].poll() is not None, f"{command}: {directory} is served already"
            self._stop(directory)
        self.logs.mkdir(exist_ok=True)
        path = self.logs / directory.replace("/", "-")
        with path.open("ab") as log:
            before = self._begun[directory] = log.tell()
            process = subprocess.Popen(
                words, cwd=self.current, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._services[directory] = kind, process
        # its first line: from then on it can be stopped in order
        self._until(lambda: path.stat().st_size > before or process.poll() is not None, command)

    def _stop(self, directory: str) -> None:
        kind, process = self._services.pop(directory)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(WITHIN_S)
        text = (self.logs / directory.replace("/", "-")).read_text("utf-8", "replace")
        last = "".join(text[self._begun[directory] :].splitlines()[-1:])
        if code == -signal.SIGTERM and re.search(r"\bstopped|\benrolled as|^ternbus: .*revoked", last):
            return  # it was on its way out by itself, or from joining to training
        if kind == "edge" and code == 1 and last.startswith("ternbus: SIGTERM came before"):
            return  # it was still joining
        # a device ends with 3 if it was revoked
        assert code in ({0, 3} if kind == "edge" else {0}), f"{directory} ended with {code}:{self._logs()}"

    def _version(self, directory: str) -> int:
        return int(statuses.read(self.folder / directory)["version"])

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            self._check(what, deadline)
            time.sleep(0.1)

    def _logs(self) -> str:
        found = sorted(self.logs.glob("*"))
        return "".join(f"\n--- {log.name}\n{log.read_text('utf-8', 'replace')[-1500:]}" for log in found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the services, the newest first. After a failure nobody looks at how they end."""
        failed: list[AssertionError] = []
        for directory in reversed(list(self._services)):
            try:
                self._stop(directory)
            except AssertionError as wrong:
                failed.append(wrong)
        if failed and error is None:
            raise failed[0]


def written(page: Path, name: str) -> str:
    """The page's block, of Python or of TOML, that begins with `# name`."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no block that begins with # {name}"
    return found[1]


def _with(line: str, options: str) -> str:
    """The command with further options, before its comment or the file that its output goes to."""
    found = re.fullmatch(r"(.*?)((?:\s+[#>|].*)?)", line)
    assert found
    return f"{found[1]} {options}{found[2]}"
