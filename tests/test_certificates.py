"""Certificates, what each may do, and the files that hold secrets: without a broker."""

import base64
import binascii
import datetime as dt
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.shell import administration as aggregators
from ternbus.aggregator.shell import transport
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.files import read_password, write_secret
from ternbus.broker.link.link import Link, Tls
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY, ServerTls
from ternbus.broker.protocol.identity import Identity, is_device
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.server import auth_callout, broker_checkup, callout_tokens, certificates, mosquitto
from ternbus.broker.server.callout_tokens import Question
from ternbus.broker.server.certificates import Authority, Pair
from ternbus.broker.server.directory import BrokerDirectory
from ternbus.broker.server.running import ACCESS, Engine
from ternbus.edge.shell.directory import DeviceDirectory as Device

KINDS = ("enroll", "metrics", "offer", "statistics", "status", "update")  # that a device writes

ROOT = Path(__file__).resolve().parent.parent
AUTHORITY = Authority.create("Ternbus broker bus")


def handshake(server: Pair, client: Pair | None, name: str, folder: Path) -> None:
    """A TLS 1.3 handshake in memory, both sides as strict as OpenSSL can be; SSLError where either refuses."""
    for file, pair in (("server", server), ("client", client or server)):
        (folder / file).write_text(pair.certificate + pair.key)
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(folder / "server")
    here.verify_mode = ssl.CERT_REQUIRED
    there = ssl.create_default_context(cadata=AUTHORITY.pair.certificate)
    if client is not None:
        there.load_cert_chain(folder / "client")
    for context in (here, there):
        context.load_verify_locations(cadata=AUTHORITY.pair.certificate)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    shake(here, there, name)


def shake(here: ssl.SSLContext, there: ssl.SSLContext, name: str) -> None:
    """A handshake of the server ``here`` with the client ``there``, which expects ``name``."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [there.wrap_bio(down, up, server_hostname=name), here.wrap_bio(up, down, server_side=True)]
    done = 0
    while done < 2:
        done = 0
        for end in ends:
            try:
                end.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                continue


def plain_pair() -> tuple[str, Pair]:
    """An authority without a key usage, and a server's certificate without its key identifier, as openssl makes."""
    keys = [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()]
    issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("own", "localhost"))
    now = dt.datetime.now(dt.UTC)

    def signed(name: x509.Name, key: Ed25519PrivateKey, extension: x509.ExtensionType, *, critical: bool) -> str:
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=critical)
        builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        return builder.sign(keys[0], algorithm=None).public_bytes(Encoding.PEM).decode()

    authority = signed(issuer, keys[0], x509.BasicConstraints(ca=True, path_length=None), critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    key = keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return authority, Pair(certificate=signed(subject, keys[1], names, critical=False), key=key)


def test_an_authority_of_ones_own_is_believed_with_every_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 3.13 on the default context is strict, and refused what 3.11 took: the same pages tell how to make both."""
    make = ssl.create_default_context

    def strict(**files: Any) -> ssl.SSLContext:
        context = make(**files)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    authority, server = plain_pair()
    (tmp_path / CA).write_text(authority)
    (tmp_path / "server").write_text(server.certificate + server.key)
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(tmp_path / "server")
    shake(here, Tls(ca=tmp_path / CA).context(), "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(here, Tls(ca=tmp_path / CA).context(), "elsewhere")
    (tmp_path / CA).write_text(AUTHORITY.pair.certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(here, Tls(ca=tmp_path / CA).context(), "localhost")


@pytest.mark.parametrize("name", ["bus.example.org", "192.168.1.10", "::1"])
def test_a_broker_is_believed_under_each_of_its_names(name: str, tmp_path: Path) -> None:
    server = AUTHORITY.server(["bus.example.org", "192.168.1.10", "::1"])
    handshake(server, AUTHORITY.client("pi-1", "lab"), name, tmp_path)


def test_under_another_name_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(AUTHORITY.server(["bus"]), AUTHORITY.client("pi-1", "lab"), "pi", tmp_path)


def test_a_client_cannot_play_the_broker(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(AUTHORITY.client("bus", "lab"), AUTHORITY.client("pi-1", "lab"), "bus", tmp_path)


def test_without_a_certificate_the_broker_refuses(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(AUTHORITY.server(["bus"]), None, "bus", tmp_path)


def test_a_renewed_authority_goes_with_what_the_old_one_signed(tmp_path: Path) -> None:
    renewed = AUTHORITY.renewed()
    assert renewed.pair.certificate != AUTHORITY.pair.certificate
    handshake(renewed.server(["bus"]), renewed.client("pi-1", "lab"), "bus", tmp_path)  # all others hold the old one


def test_a_certificate_says_whom_it_names_and_is_valid_whatever_an_unset_clock_says() -> None:
    pem = AUTHORITY.client("pi-1", "lab").certificate
    named = certificates.read(pem, "it")
    assert (named.name, named.federation) == ("pi-1", "lab")
    assert 9.9 * 365 < named.days_left(certificates.now()) < 10.1 * 365
    assert x509.load_pem_x509_certificate(pem.encode()).not_valid_before_utc == dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@pytest.mark.parametrize("name", ["", "0.0.0.0", "::", "a b", "-a", "a..b", "bus:8883", "*"])
def test_what_no_device_could_reach_is_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use a host name or address that devices can connect to"):
        BrokerDirectory.create(tmp_path / "bus", names=[name], port=8883)
    assert not (tmp_path / "bus").exists()


# A broker's directory.


@pytest.fixture
def bus(tmp_path: Path) -> BrokerDirectory:
    return BrokerDirectory.create(tmp_path / "bus", names=["192.168.1.10", "bus"], port=8883, engine=Engine.NATS)


def test_a_brokers_directory_says_where_it_is_and_is_made_once(bus: BrokerDirectory) -> None:
    assert bus.url == "mqtts://192.168.1.10:8883"
    assert bus.settings().listen == "0.0.0.0"
    with pytest.raises(ConfigError, match="already contains a broker"):
        BrokerDirectory.create(bus.folder, names=["bus"], port=8883)


def test_broker_toml_is_checked(bus: BrokerDirectory) -> None:
    path = bus.folder / "broker.toml"
    for line in ('names = []\nlisten = ""\nport = 1\nengine = "nats"', 'names = ["a"]', "port =", 'engine = "x"'):
        path.write_text(line)
        with pytest.raises(ConfigError):
            bus.settings()


def test_a_name_belongs_to_one_federation_of_a_broker(bus: BrokerDirectory) -> None:
    bus.issue("pi-1", "lab")
    bus.issue("pi-1", "lab")
    with pytest.raises(ConfigError, match="'pi-1' is already in federation 'lab' on this broker"):
        bus.issue("pi-1", "other")
    for name in ("aggregator-other", "Probe", "../pi", "aggregator"):
        with pytest.raises(ConfigError, match="invalid device name"):
            bus.issue(name, "lab")


def test_renewal_keeps_keys_and_is_due_before_the_end(bus: BrokerDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = bus.issue("pi-1", "lab")
    assert not bus.renew_if_due()
    assert [path.name for path in bus.renew()] == ["server.pem"]
    assert [path.name for path in bus.renew(everything=True)] == ["server.pem", "pi-1.pem"]
    before, after = issued.certificate.encode(), bus.issued("pi-1").read_bytes()
    assert before != after
    assert x509.load_pem_x509_certificate(before).public_key() == x509.load_pem_x509_certificate(after).public_key()
    later = certificates.now() + dt.timedelta(days=310)
    monkeypatch.setattr(certificates, "now", lambda: later)
    assert bus.renew_if_due()
    assert bus.certificates()["tls/server.pem"].days_left(later) > 360


def test_a_certificates_key_is_never_kept_by_the_authority(bus: BrokerDirectory) -> None:
    key = bus.issue("pi-1", "lab").key
    assert [file for file in bus.folder.rglob("*") if file.is_file() and key in file.read_text()] == []


# Who may do what: both brokers' answers.


def asked(name: str, federation: str, *, client_id: str | None = None, kind: str = "mqtt") -> Question:
    chain = (AUTHORITY.client(name, federation).certificate,)
    return Question(server="S", user="U", kind=kind, client_id=client_id or name, chain=chain)


def test_a_device_gets_what_the_access_list_gives_it() -> None:
    access = auth_callout.decide(asked("pi-1", "lab"))
    root = "ternbus.1.lab"
    assert access.write == [f"{root}.up.pi-1.{kind}" for kind in KINDS]
    assert access.read == [f"{root}.down.pi-1", f"{root}.down.pi-1.>", f"{root}.all", f"{root}.all.>"]
    assert access.until > certificates.now().timestamp()


def test_the_aggregator_gets_what_the_access_list_gives_it() -> None:
    access = auth_callout.decide(asked("aggregator-lab", "lab"))
    root = "ternbus.1.lab"
    assert access.write == [
        *(f"{root}.all.{rest}" for rest in ("head", "status", "delta.*.*", "snapshot.*.*", "revocations.*", "terms.*")),
        *(f"{root}.down.*.{kind}" for kind in ("candidate", "grant", "receipt")),
        *(f"{root}.help.*.{kind}" for kind in ("ask", "receipt")),
        f"{root}.view.*",
        "homeassistant.device.lab.*.config",
    ]
    readable = [(f"{root}.{group}", f"{root}.{group}.>") for group in ("up", "all", "help")]
    assert access.read == [subject for pair in readable for subject in pair]


def test_a_helper_gets_what_the_access_list_gives_it() -> None:
    access = auth_callout.decide(asked("aggregator_help_bureau", "lab"))
    root = "ternbus.1.lab"
    assert access.write == [f"{root}.help.bureau.{kind}" for kind in ("answer", "card", "enroll", "status")]
    assert access.read == [f"{root}.help.bureau", f"{root}.help.bureau.>", f"{root}.all.status"]


def test_a_reader_gets_what_the_access_list_gives_it_and_may_write_nothing() -> None:
    access = auth_callout.decide(asked("aggregator_read_ha", "lab"))
    root = "ternbus.1.lab"
    assert access.write == []
    assert access.read == [f"{root}.view", f"{root}.view.>", "homeassistant", "homeassistant.>"]


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (asked("pi-1", "lab", client_id="pi-2"), "wrong-client-id"),
        (asked("pi-1", "lab", kind="nats"), "not-mqtt"),
        (asked("pi-1", ""), "no-federation"),
        (asked("aggregator-lab", "other"), "no-device"),
        (asked("a.>", "lab"), "no-device"),
        (asked("aggregator_help_", "lab"), "no-device"),
        (asked("aggregator_help_a.>", "lab"), "no-device"),
        (asked("aggregator_read_", "lab"), "no-device"),
        (asked("aggregator_read_a.>", "lab"), "no-device"),
        (asked("pi-1", "lab.>"), "no-federation"),
        (Question(server="S", user="U", kind="mqtt", client_id="pi-1", chain=()), "no-certificate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_get_nothing(question: Question, reason: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        auth_callout.decide(question)
    assert refused.value.reason == reason


@pytest.mark.parametrize("token", ["", "a", "a.b.c", "a.e30.c", "a.bnVsbA.c", "a.eyJuYXRzIjp7fX0.c"])
def test_what_is_no_question_is_a_protocol_error(token: str) -> None:
    with pytest.raises(ProtocolError):
        callout_tokens.question(token)


def test_a_key_is_written_as_nats_writes_it() -> None:
    """A prefix byte that makes the first letter, the key, and a checksum, in base32 without padding."""
    identity = Identity(bytes(32))
    for letter, text in (("A", callout_tokens.account_key(identity)), ("U", callout_tokens.user_key(identity))):
        content = base64.b32decode(text)
        assert (text[0], len(text), content[1:33]) == (letter, 56, identity.public)
        assert binascii.crc_hqx(content[:-2], 0) == int.from_bytes(content[-2:], "little")


def test_an_aggregator_takes_no_certificate_of_somebody_else(bus: BrokerDirectory, tmp_path: Path) -> None:
    """With a device's it would connect under that device's name, and both would take turns."""
    settings = configuration.Settings(federation="lab", broker="mqtts://127.0.0.1:8883")
    for name, federation in (("aggregator-lab", "lab"), ("pi-1", "lab"), ("aggregator-other", "other")):
        issued = bus.issue(name, federation)
        folder = tmp_path / name
        folder.mkdir()
        for file, pem in ((CA, issued.authority), (CERTIFICATE, issued.certificate), (TLS_KEY, issued.key)):
            write_secret(folder / file, pem.encode())
    transport.equip(tmp_path, settings, transport.in_folder(tmp_path / "aggregator-lab"), tmp_path)
    assert certificates.read((tmp_path / CERTIFICATE).read_text(), "it").name == "aggregator-lab"
    plain = replace(settings, broker="mqtt://127.0.0.1:1883")
    with pytest.raises(ConfigError, match="a URL without TLS"):  # at once, not at each start
        transport.equip(tmp_path, plain, transport.in_folder(tmp_path / "aggregator-lab"), tmp_path)
    for name, whose in (
        ("pi-1", "pi-1 in federation lab"),
        ("aggregator-other", "aggregator-other in federation other"),
    ):
        with pytest.raises(ConfigError, match=f"has the certificate of {whose}, not that of aggregator-lab in lab"):
            transport.equip(tmp_path, settings, transport.in_folder(tmp_path / name), tmp_path)
    another = Authority.create("Another")  # which names clients as it likes
    both = another.pair.certificate + (tmp_path / "pi-1" / CA).read_text()  # as while an authority is replaced
    write_secret(tmp_path / "pi-1" / CA, both.encode())
    with pytest.raises(ConfigError, match="has the certificate of pi-1 in federation lab"):
        transport.equip(tmp_path, settings, transport.in_folder(tmp_path / "pi-1"), tmp_path)
    theirs = another.client("pi-1", "lab")
    write_secret(tmp_path / "pi-1" / CERTIFICATE, theirs.certificate.encode())
    transport.equip(tmp_path, settings, transport.in_folder(tmp_path / "pi-1"), tmp_path)


def test_what_is_no_certificate_is_not_copied(tmp_path: Path) -> None:
    """A link may point to what only root can read, and the copy is the service's user's."""
    secret = tmp_path / "secret.pem"
    write_secret(secret, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (CA, CERTIFICATE):
        (folder / name).symlink_to(secret)
        with pytest.raises(ConfigError, match=f"{folder / name} is no certificate in PEM"):
            transport.in_folder(folder)
        (folder / name).unlink()


def test_a_helper_is_certified_under_a_name_that_is_nobody_else_s(bus: BrokerDirectory) -> None:
    issued = bus.issue("aggregator_help_pi-1", "lab")
    assert certificates.read(issued.certificate, "it").name == "aggregator_help_pi-1"
    bus.issue("pi-1", "lab")  # a device may have the helper's name
    for name in ("aggregator_help_", "aggregator_help", "aggregator_help_a/b", f"aggregator_help_{'x' * 49}"):
        with pytest.raises(ConfigError):
            bus.issue(name, "lab")
    with pytest.raises(ConfigError, match="already in federation 'lab'"):
        bus.issue("aggregator_help_pi-1", "other")
    assert not is_device("aggregator_help_pi-1")
    access = (bus.folder / ACCESS).read_text()
    assert "user aggregator_help_pi-1\ntopic write ternbus/1/lab/help/pi-1/answer\n" in access


def test_with_several_federations_each_member_is_listed_with_its_own() -> None:
    text = mosquitto.separating_list({"other": ["pi-9"], "lab": ["pi-1", "aggregator_help_bureau", "aggregator-lab"]})
    assert "pattern" not in text
    assert text.splitlines()[1:] == [
        "user aggregator-lab",
        "topic write ternbus/1/lab/all/head",
        "topic write ternbus/1/lab/all/status",
        "topic write ternbus/1/lab/all/delta/+/+",
        "topic write ternbus/1/lab/all/snapshot/+/+",
        "topic write ternbus/1/lab/all/revocations/+",
        "topic write ternbus/1/lab/all/terms/+",
        "topic write ternbus/1/lab/down/+/candidate",
        "topic write ternbus/1/lab/down/+/grant",
        "topic write ternbus/1/lab/down/+/receipt",
        "topic write ternbus/1/lab/help/+/ask",
        "topic write ternbus/1/lab/help/+/receipt",
        "topic write ternbus/1/lab/view/+",
        "topic write homeassistant/device/lab/+/config",
        "topic read ternbus/1/lab/up/#",
        "topic read ternbus/1/lab/all/#",
        "topic read ternbus/1/lab/help/#",
        "user aggregator_help_bureau",
        *(f"topic write ternbus/1/lab/help/bureau/{kind}" for kind in ("answer", "card", "enroll", "status")),
        "topic read ternbus/1/lab/help/bureau/#",
        "topic read ternbus/1/lab/all/status",
        "user pi-1",
        *(f"topic write ternbus/1/lab/up/pi-1/{kind}" for kind in KINDS),
        "topic read ternbus/1/lab/down/pi-1/#",
        "topic read ternbus/1/lab/all/#",
        "user pi-9",
        *(f"topic write ternbus/1/other/up/pi-9/{kind}" for kind in KINDS),
        "topic read ternbus/1/other/down/pi-9/#",
        "topic read ternbus/1/other/all/#",
    ]
    assert mosquitto.separating_list({"lab": ["pi-1"]}) == mosquitto.access_list(["lab"])
    assert [line for line in mosquitto.separating_list({}).splitlines() if not line.startswith("#")] == []


def test_a_reader_is_denied_what_patterns_give_a_device_and_the_discovery_of_other_federations() -> None:
    names = {"lab": ["pi-1", "aggregator-lab", "aggregator_read_ha"]}
    alone = mosquitto.separating_list(names).splitlines()
    assert alone[alone.index("user aggregator_read_ha") + 1 :] == [
        *(f"topic deny ternbus/1/lab/{group}/#" for group in ("up", "down", "all")),
        "topic read ternbus/1/lab/view/#",
        "topic read homeassistant/#",
    ]
    beside = mosquitto.separating_list({**names, "other": ["pi-9"]}).splitlines()
    first = beside.index("user aggregator_read_ha") + 1
    assert beside[first : first + 4] == [
        "topic read ternbus/1/lab/view/#",
        "topic read homeassistant/#",
        "topic deny homeassistant/device/other/#",
        "user pi-1",
    ]


def test_the_deployed_files_are_what_is_generated() -> None:
    deployed = ROOT / "deploy" / "mosquitto-tls"
    here = Path("/etc/mosquitto/tls")
    assert (deployed / "access.list").read_text() == mosquitto.separating_list({"home": ["pi-1"]})
    assert (deployed / "mosquitto.conf").read_text() == mosquitto.configuration(
        host="0.0.0.0",
        port=8883,
        data=Path("/var/lib/mosquitto"),
        access=Path("/etc/mosquitto/access.list"),
        tls=ServerTls(authority=here / "ca.pem", certificate=here / "server.pem", key=here / "server.key"),
    )


# The aggregator, its invitations, and devices.


@pytest.fixture
def aggregator(bus: BrokerDirectory, tmp_path: Path) -> Path:
    folder = tmp_path / "agg"
    settings = {"transport.authority": str(bus.folder)}
    aggregators.create(folder, federation="lab", broker=bus.url, model={"w": np.zeros(3)}, settings=settings)
    return folder


def test_an_invitation_carries_all_that_a_device_needs(aggregator: Path, tmp_path: Path) -> None:
    (invitation,) = aggregators.invite(aggregator, "pi-1")
    again = Invitation.loads(invitation.dumps())
    assert again == invitation
    assert again.certificate is not None
    assert certificates.read(again.certificate, "it").name == "pi-1"
    device = Device(tmp_path / "pi-1")
    device.prepare(again, task="digits-numpy", data=None, partition="all")
    tls = device.tls()
    assert tls is not None
    tls.context()
    assert {file.name: file.stat().st_mode & 0o777 for file in device.folder.iterdir()} == dict.fromkeys(
        ("ca.pem", "certificate.pem", "certificate.key", "device.key", "edge.toml"), 0o600
    )
    assert "PRIVATE" not in repr(again)


def test_the_aggregator_has_papers_of_its_own_and_takes_up_renewed_ones(aggregator: Path, bus: BrokerDirectory) -> None:
    settings = aggregators.load_settings(aggregator)
    bus.renew(everything=True)
    assert (aggregator / "certificate.pem").read_bytes() != bus.issued("aggregator-lab").read_bytes()
    transport.connect(aggregator, settings, lambda _: None)
    assert (aggregator / "certificate.pem").read_bytes() == bus.issued("aggregator-lab").read_bytes()


def test_who_renews_the_certificate_of_a_client_is_said(
    bus: BrokerDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's folder does not know where the broker's is, nor whether it is one of Ternbus."""
    (tmp_path / CERTIFICATE).write_text(bus.issue("pi-1", "lab").certificate)
    later = certificates.now() + dt.timedelta(days=3640)
    monkeypatch.setattr(certificates, "now", lambda: later)
    (found,) = broker_checkup.of_client(tmp_path)
    assert found.text.endswith(f"{CERTIFICATE} (this client) expires in 10 days")
    assert found.mend.startswith("ask the broker's operator for a renewed file and put it in this one's place; of a")
    assert "BROKER" not in found.mend
    own = {each.check: each for each in broker_checkup.examine(bus.folder)}
    assert own["certificates"].mend == f"ternbus broker renew {bus.folder}"


def test_a_broker_elsewhere_gives_its_papers_in_folders(bus: BrokerDirectory, tmp_path: Path) -> None:
    for name in ("aggregator-lab", "pi-1"):
        issued, folder = bus.issue(name, "lab"), tmp_path / "certificates" / name
        folder.mkdir(parents=True)
        texts = (issued.authority, issued.certificate, issued.key)
        for file, text in zip(transport.FILES, texts, strict=True):
            (folder / file).write_text(text)
            (folder / file).chmod(0o600)
    certificates, agg, model = tmp_path / "certificates", tmp_path / "agg", {"w": np.zeros(3)}
    own = certificates / "aggregator-lab"
    aggregators.create(agg, federation="lab", broker=bus.url, model=model, credentials=transport.in_folder(own))
    with pytest.raises(ConfigError, match="add --certificates FOLDER"):
        aggregators.invite(agg, "pi-1")
    (invitation,) = aggregators.invite(agg, "pi-1", certificates=certificates)
    assert invitation.certificate == (certificates / "pi-1" / "certificate.pem").read_text()
    with pytest.raises(ConfigError, match="pi-2 has neither"):
        aggregators.invite(agg, "pi-2", certificates=certificates)


# Secrets.


@pytest.mark.parametrize("name", ["aggregator.key", "certificate.key"])
def test_the_aggregator_refuses_keys_that_others_can_read(aggregator: Path, name: str) -> None:
    (aggregator / name).chmod(0o640)
    settings = aggregators.load_settings(aggregator)
    uses: dict[str, Callable[[], object]] = {
        "aggregator.key": lambda: aggregators.invite(aggregator, "pi-1"),
        "certificate.key": lambda: transport.connect(aggregator, settings, lambda _: None),
    }
    with pytest.raises(ConfigError, match=f"other users can read; run: chmod 600 .*{name}"):
        uses[name]()


@pytest.mark.parametrize("name", ["ca.key", "server.key", "probe.key"])
def test_a_broker_refuses_keys_that_others_can_read(bus: BrokerDirectory, name: str) -> None:
    (bus.folder / "tls" / name).chmod(0o604)
    with pytest.raises(ConfigError, match=f"run: chmod 600 .*{name}"):
        bus.secured()


def test_a_device_refuses_a_key_that_others_can_read(tmp_path: Path) -> None:
    pair = AUTHORITY.client("pi-1", "lab")
    for name, text in (("certificate.pem", pair.certificate), ("certificate.key", pair.key)):
        (tmp_path / name).write_text(text)
    (tmp_path / "certificate.key").chmod(0o644)
    tls = Tls(certificate=tmp_path / "certificate.pem", key=tmp_path / "certificate.key")
    with pytest.raises(ConfigError, match="run: chmod 600"):
        Link("mqtts://bus", client_id="pi-1", deliver=lambda _: None, tls=tls)


def test_a_password_comes_from_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("käse 7\nnot this\n")
    file.chmod(0o600)
    assert read_password(file) == "käse 7"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="run: chmod 600"):
        read_password(file)
    file.write_text("\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="has no password"):
        read_password(file)


def test_a_password_is_not_sent_in_the_open() -> None:
    with pytest.raises(ConfigError, match=r"a password for .* would be sent unencrypted"):
        Link("mqtt://bus.example.org", client_id="pi-1", deliver=lambda _: None, username="u", password="p")
    Link("mqtt://127.0.0.1", client_id="pi-1", deliver=lambda _: None, username="u", password="p")


def test_a_password_is_in_no_invitation_and_in_no_settings(bus: BrokerDirectory, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("correct horse")
    secret.chmod(0o600)
    agg = tmp_path / "agg"
    settings = {"transport.username": "us", "transport.password_file": str(secret)}
    aggregators.create(agg, federation="lab", broker="mqtts://bus", model={"w": np.zeros(3)}, settings=settings)
    (invitation,) = aggregators.invite(agg, "pi-1")
    assert "correct horse" not in invitation.dumps() + (agg / "aggregator.toml").read_text()
    device = Device(tmp_path / "pi-1")
    device.prepare(invitation, task="digits-numpy", data=None, partition="all", username="me", password_file=secret)
    assert device.settings().username == "me"
    assert "correct horse" not in (device.folder / "edge.toml").read_text()
