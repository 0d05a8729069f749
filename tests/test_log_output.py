"""The log lines of services: for people, for systemd's journal, as JSON."""

import errno
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import IO

import pytest

from ternbus.broker.log_levels import ERROR, INFO, PRIORITIES, WARNING
from ternbus.broker.log_output import JOURNAL, LogOutput, is_journal, log_line, take_library_lines
from ternbus.edge.core.actions import Log, Stop
from ternbus.edge.shell.printer import Printer


def line(text: str, **about: bool) -> str:
    return log_line(text, level=WARNING, event="refused", fields={"device": "pi"}, **about)


def test_a_line_for_people_has_the_time_with_its_offset_and_the_level() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d warning it fails", line("it fails"))


def test_a_line_for_the_journal_has_a_priority_and_no_time() -> None:
    assert line("it fails", journal=True) == "<4>it fails"
    assert [PRIORITIES[level] for level in (ERROR, WARNING, INFO)] == [3, 4, 6]


def test_a_line_as_json_has_time_level_event_text_and_fields() -> None:
    found = json.loads(line("it fails", as_json=True))
    assert found.pop("time") > 1.7e9
    assert found == {"level": "warning", "event": "refused", "text": "it fails", "device": "pi"}


def test_a_text_of_a_peer_makes_no_terminal_obey() -> None:
    assert line("a\x1b[2Jb\rc\nd", journal=True) == "<4>a?[2Jb?c\nd"
    assert "\x1b" not in line("\x1b", as_json=True)


def test_the_journal_is_known_by_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") as file, (tmp_path / "other").open("w") as other:
        about = os.fstat(file.fileno())
        assert not is_journal(file)
        monkeypatch.setenv(JOURNAL, f"{about.st_dev}:{about.st_ino}")
        assert is_journal(file)
        assert not is_journal(other)
        assert not is_journal(io.StringIO())
        LogOutput(stream=file)("ready")
    assert (tmp_path / "log").read_text() == "<6>ready\n"


class Failing(io.StringIO):
    """A stream that fails with an error of the system."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_service_goes_on_when_its_log_is_on_a_full_disk_or_its_reader_has_ended() -> None:
    LogOutput(stream=Failing(errno.ENOSPC))("a")
    LogOutput(stream=Failing(errno.EPIPE))("a")
    LogOutput(stream=Failing(errno.ENOSPC), needs_reader=True)("a")
    with pytest.raises(BrokenPipeError):
        LogOutput(stream=Failing(errno.EPIPE), needs_reader=True)("a")


def test_lines_of_modules_and_libraries_become_lines_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    stream = io.StringIO()
    take_library_lines(LogOutput(stream=stream, as_json=True))
    for level in (logging.ERROR, logging.WARNING):
        logging.getLogger("ternbus.some.module").log(level, "%s fails", "it")
    found = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert [(each["level"], each["event"], each["text"]) for each in found] == [
        ("error", "module", "it fails"),
        ("warning", "module", "it fails"),
    ]
    try:
        dict[str, str]()["a bug"]
    except KeyError:
        logging.getLogger("ternbus.some.module").exception("it fails")
    text = json.loads(stream.getvalue().splitlines()[-1])["text"]
    assert text.startswith("it fails\nTraceback")
    assert text.endswith("KeyError: 'a bug'")


def printed(stream: IO[str], *logs: Log, stop: Stop | None = None) -> list[str]:
    printer = Printer(as_json=True, output=stream)
    for each in logs:
        printer(each)
    if stop is not None:
        printer.end(stop)
    stream.seek(0)
    return [json.loads(text)["level"] for text in stream]


def test_a_device_tells_by_the_level_what_its_owner_may_have_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    logs = [Log(event=event, text="x") for event in ("accepted", "other-beginning", "stale", "training-failed")]
    levels = printed(io.StringIO(), *logs, stop=Stop(code=3, reason="revoked"))
    assert levels == [INFO, INFO, WARNING, WARNING, ERROR]
    assert capsys.readouterr().err == "ternbus: revoked\n"
