"""The refusals that brokers log: their lines, written by brokers and by attackers, are read and counted."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ternbus.broker.server import mosquitto, refusals
from ternbus.broker.server.refusals import (
    CLIENTS_MAX,
    DETAIL_CHARS,
    LINE_BYTES,
    LOG,
    LOG_BYTES,
    NO_NAME,
    OTHERS,
    REASONS,
    Access,
    Counter,
    Counts,
    Lines,
    Refusal,
    covers,
    of_mosquitto,
    of_nats,
)

PID = "[21145] 2026/11/20 14:06:14.449466 "
LAB = "ternbus/1/lab"
ACCESS = Access.parse(mosquitto.access_list(["lab"]))


def read(said: str) -> tuple[str, str, str] | None:
    found = of_nats(said, Access()) if said.startswith(PID) else of_mosquitto(said, ACCESS)
    return None if found is None else (found.client, found.reason, found.detail)


@pytest.mark.parametrize("of", ["OpenSSL Error[0]", "OpenSSL Error while trying to get the error[0]"])  # 2.0, 2.1
@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("error:0A0000C7:SSL routines::peer did not return a certificate", "no-certificate"),
        ("error:1417C0C7:SSL routines:tls_process:peer did not return a certificate", "no-certificate"),
        ("error:0A000086:SSL routines::certificate verify failed", "bad-certificate"),
        ("error:0A000102:SSL routines::unsupported protocol", "old-tls"),
        ("error:0A00010B:SSL routines::wrong version number", "no-handshake"),
    ],
)  # fmt: skip
def test_mosquitto_says_why_a_handshake_failed(of: str, why: str, reason: str) -> None:
    assert read(f"{of}: {why}") == (NO_NAME, reason, "")


@pytest.mark.parametrize(
    ("topic", "detail"),
    [
        (f"{LAB}/up/pi-1/update', ... (1 bytes))", f"{LAB}/up/pi-1/update"),
        (f"{LAB}/down/pi-2/a'b)', ('x', ... (1 bytes))", f"{LAB}/down/pi-2/a'b)', ('x"),
        ("a" * 900, "a" * 900),  # it cuts what is long
    ],
)
def test_mosquitto_says_what_it_does_not_let_be_written(topic: str, detail: str) -> None:
    said = f"Denied PUBLISH from pi-2 (d0, q1, r1, m3, '{topic}"
    assert read(said) == ("pi-2", "write-denied", detail)


@pytest.mark.parametrize(
    ("client", "wanted", "denied"),
    [
        ("pi-2", f"{LAB}/down/pi-1/#", True),
        ("pi-2", f"{LAB}/down/+/receipt", True),
        ("pi-2", f"{LAB}/up/pi-2/#", True),
        ("pi-2", "ternbus/1/other/all/head", True),
        ("pi-2", "#", True),
        ("pi-2", "$SYS/#", True),
        ("pi-2", f"{LAB}/down/pi-2/#", False),
        ("pi-2", f"{LAB}/down/pi-2/receipt", False),
        ("pi-2", f"{LAB}/all/+/0/0", False),
        ("pi-2", f"$share/g/{LAB}/all/head", False),
        ("aggregator-lab", f"{LAB}/up/#", False),
        ("aggregator-lab", f"{LAB}/all/#", False),
        ("aggregator-lab", f"{LAB}/down/#", True),
    ],
)
def test_what_mosquitto_grants_but_does_not_deliver_is_found_in_the_access_list(
    client: str, wanted: str, denied: bool
) -> None:
    found = read(f"{client} 1 {wanted}")
    assert found == ((client, "read-denied", wanted) if denied else None)


def test_with_several_federations_each_member_has_its_own_rights() -> None:
    access = Access.parse(mosquitto.separating_list({"lab": ["pi-1", "aggregator-lab"], "other": ["pi-9"]}))
    assert access.may_read("pi-1", f"{LAB}/all/head")
    assert access.may_read("aggregator-lab", f"{LAB}/up/#")
    assert not access.may_read("pi-9", f"{LAB}/all/head")
    assert not access.may_read("nobody", f"{LAB}/all/head")


def test_what_a_reader_is_denied_is_no_pattern_s() -> None:
    access = Access.parse(mosquitto.separating_list({"lab": ["aggregator_read_ha"]}))
    assert access.may_read("pi-1", f"{LAB}/all/#")
    assert not access.may_read("aggregator_read_ha", f"{LAB}/all/#")
    assert not access.may_read("aggregator_read_ha", f"{LAB}/all/head")
    assert access.may_read("aggregator_read_ha", f"{LAB}/view/#")
    assert access.may_read("aggregator_read_ha", "homeassistant/+/+/config")


@pytest.mark.parametrize(
    ("allowed", "wanted", "expected"),
    [
        ("a/#", "a", True), ("a/#", "a/b/c", True), ("a/#", "a/+/#", True), ("a/#", "#", False), ("a/#", "+/b", False),
        ("a/+", "a/+", True), ("a/+", "a/b", True), ("a/+", "a/#", False), ("a/+", "a", False), ("a", "a/b", False),
        ("#", "#", True), ("a/+/c", "a/b/+", False), ("", "", True),
    ],
)  # fmt: skip
def test_a_filter_covers_another(allowed: str, wanted: str, expected: bool) -> None:
    assert covers(allowed, wanted) is expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "127.0.0.1:55865 - mid:25 - TLS handshake error: tls: client didn't provide a certificate",
            (NO_NAME, "no-certificate", "127.0.0.1"),
        ),
        (
            "::1:53241 - mid:28 - TLS handshake error: tls: failed to verify certificate: signed by unknown (CN=pi-1)",
            (NO_NAME, "bad-certificate", "::1"),
        ),
        (
            "127.0.0.1:1 - mid:31 - TLS handshake error: tls: client offered only unsupported versions: [303 302 301]",
            (NO_NAME, "old-tls", "127.0.0.1"),
        ),
        ("127.0.0.1:1 - mid:31 - TLS handshake error: EOF", (NO_NAME, "no-handshake", "127.0.0.1")),
        (
            '127.0.0.1:48429 - mid:40 - "pi-2" - Subscription Violation - Subject "ternbus.1.lab.up.*.update", SID x',
            ("pi-2", "read-denied", f"{LAB}/up/+/update"),
        ),
        ('127.0.0.1:1 - mid:40 - "pi-2" - Subscription Violation - Subject ">", SID >', ("pi-2", "read-denied", "#")),
        (
            '127.0.0.1:48429 - mid:40 - "pi-2" - Publish Violation - Subject "ternbus.1.lab.up.pi-1.a//b"',
            ("pi-2", "write-denied", f"{LAB}/up/pi-1/a.b"),
        ),
        ('127.0.0.1:37055 - mid:53 - "ev\\nil" - invalid character in client ID "ev\\nil"', None),
    ],
)
def test_nats_server_says_what_it_refused(said: str, expected: tuple[str, str, str] | None) -> None:
    assert read(f"{PID}[ERR] {said}") == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("wrong-client-id: the certificate of \"pi-2\" calls itself 'pi-1'", ("pi-2", "wrong-client-id", "'pi-1'")),
        ("no-device: 'x' names neither", (NO_NAME, "not-admitted", "no-device: 'x' names neither")),
    ],
)
def test_a_reason_of_the_auth_callout_comes_through_nats_server(said: str, expected: tuple[str, str, str]) -> None:
    assert read(f"{PID}[WRN] Auth callout service returned an error: {said}") == expected


def test_a_foreign_certificates_subject_accuses_nobody() -> None:
    """nats-server writes it as it is, line ends too, but for quotes."""
    for forged in (
        '[ERR] 1.1.1.1:1 - mid:1 - \\"pi-1\\" - Publish Violation - Subject \\"x\\"',
        '[WRN] Auth callout service returned an error: wrong-client-id: the certificate of \\"pi-1\\" calls itself x',
    ):
        found = read(PID + forged)
        assert found is None or found[0] == NO_NAME


def test_lines_are_cut_where_they_end_and_of_a_long_one_only_the_beginning_counts() -> None:
    lines = Lines()
    assert lines.feed(b"one\ntw") == [b"one"]
    assert lines.feed(b"o\n") == [b"two"]
    assert lines.feed(b"x" * (LINE_BYTES + 1)) == [b"x" * LINE_BYTES]
    assert lines.feed(b"x" * 3 * LINE_BYTES) == []
    assert lines.feed(b"Denied PUBLISH from honest\nthree\n") == [b"three"]
    assert lines.feed(b"y" * 3 * LINE_BYTES + b"\n") == [b"y" * LINE_BYTES]


def test_beyond_so_many_names_the_others_are_counted_together() -> None:
    counts = Counts(since="")
    for number in range(2 * CLIENTS_MAX):
        counts.add(Refusal(client=f"d{number}", reason="write-denied"), "")
    counts.add(Refusal(client=NO_NAME, reason="old-tls"), "")
    assert len(counts.rows) == CLIENTS_MAX + 2
    assert counts.rows[OTHERS, "write-denied"].count == CLIENTS_MAX
    assert counts.rows["d0", "write-denied"].count == 1
    assert sum(row.count for row in counts.rows.values()) == 2 * CLIENTS_MAX + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / refusals.ACCESS).write_text(mosquitto.access_list(["lab"]))
    return tmp_path


def counts(folder: Path) -> dict[tuple[str, str], int]:
    found = json.loads((folder / refusals.FILE).read_text())["refused"]
    return {(row["client"], row["reason"]): row["count"] for row in found}


def count(folder: Path, engine: str, log: bytes) -> None:
    """As the process does through which a broker's log goes."""
    command = [sys.executable, "-I", "-S", refusals.__file__, str(folder), engine]
    subprocess.run(command, input=log, check=True, timeout=60, capture_output=True)


DENIED = f"Denied PUBLISH from pi-2 (d0, q1, r1, m3, '{LAB}/all/head', ... (1 bytes))\n".encode()
PACKETS = b"Received PUBLISH from pi-2 (d0)\nSending PUBACK to pi-2 (m5, rc0)\n\t# (QoS 1)\n"
GRANTED = f"Client pi-2 negotiated TLSv1.3 cipher X\npi-2 1 {LAB}/all/head\n".encode()


def test_a_flood_fills_no_disk_and_is_counted_to_the_last(folder: Path) -> None:
    count(folder, "mosquitto", b"first\n" + 25_000 * (DENIED + PACKETS) + GRANTED + b"last words")
    assert counts(folder) == {("pi-2", "write-denied"): 25_000}
    stamps, kept = zip(*(line.split(b": ", 1) for line in (folder / LOG).read_bytes().splitlines(True)), strict=True)
    assert all(datetime.fromisoformat(stamp.decode()).utcoffset() == timedelta() for stamp in stamps)
    assert kept == (b"first\n", *5 * [DENIED], b"last words\n")  # the 1st, 10th, 100th, 1,000th, 10,000th


def test_a_flood_of_what_is_no_refusal_fills_no_disk_either(folder: Path) -> None:
    line = PID.encode() + 100 * b"x" + b"\n"
    count(folder, "nats", (3 * LOG_BYTES // len(line)) * line)
    for name in (LOG, f"{LOG}.1"):
        assert 0 < (folder / name).stat().st_size <= 2 * LOG_BYTES


def test_what_is_kept_does_nothing_to_a_terminal(folder: Path) -> None:
    count(folder, "nats", PID.encode() + b"[INF] \x1b[31m \xc2\x9b \xff \xe2\x80\xae\tend\r\n")
    assert (folder / LOG).read_text() == PID + "[INF] ?[31m ? \N{REPLACEMENT CHARACTER} ?\tend?\n"
    counts = Counts(since="")
    counts.add(Refusal(client="pi-2", reason="write-denied", detail="\x1b" + 200 * "a"), "")
    assert counts.rows["pi-2", "write-denied"].detail == "?" + (DETAIL_CHARS - 1) * "a"


def test_counts_go_on_after_a_restart_and_begin_anew_where_they_cannot_be_read(folder: Path) -> None:
    for _ in range(2):
        count(folder, "mosquitto", 3 * DENIED)
    assert counts(folder) == {("pi-2", "write-denied"): 6}
    for broken in ("", "[]", '{"since": "", "refused": [{}]}', '{"since": "", "refused": [[1]]}'):
        (folder / refusals.FILE).write_text(broken)
        count(folder, "mosquitto", DENIED)
        assert counts(folder) == {("pi-2", "write-denied"): 1}


def test_the_rights_of_a_newcomer_are_known_at_once(folder: Path) -> None:
    access = folder / refusals.ACCESS
    access.write_text("")
    counter = Counter(folder, "mosquitto")
    wanted = f"pi-3 1 {LAB}/all/head\n".encode()
    counter.feed(wanted)
    access.write_text(mosquitto.access_list(["lab"]))
    os.utime(access, ns=(1, 1))
    counter.feed(wanted)
    counter.close()
    assert counts(folder) == {("pi-3", "read-denied"): 1}


def test_every_reason_is_explained() -> None:
    assert set(refusals.HANDSHAKES.values()) < set(REASONS)
