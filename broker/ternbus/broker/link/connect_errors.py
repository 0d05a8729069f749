"""Error messages for failed connections to a broker."""

import socket
import ssl
from typing import Final

from ternbus.broker.errors import LinkError
from ternbus.broker.protocol.endpoint import Endpoint

PROBE_S: Final = 2.0
CANNOT_SERVE: Final = "the broker cannot serve now, as when its disk is full: see its log, and free space there"
TOO_EARLY: Final = 9  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID
EXPIRED: Final = 10  # and X509_V_ERR_CERT_HAS_EXPIRED
CLOCK: Final = "set this machine's clock, which `date` shows: it is behind"
RENEW: Final = "see whether `date` is right here; if so, run `ternbus broker renew` on the broker's machine"
AUTHORITY: Final = "check the URL, and ca.pem in the folder of this aggregator or device: it has the broker's authority"
LOGIN: Final = (
    "if it asks for a password, give the right --username and --password-file, or username and password_file in "
    "aggregator.toml or edge.toml"
)
RETAIN: Final = "Ternbus needs retained messages: allow them (mosquitto: retain_available true)"


class UnansweredError(LinkError):
    """The broker ended the connection without an answer."""


def explain(endpoint: Endpoint, error: OSError) -> str:
    """The reason why the connection failed, and what to do."""
    failed = f"cannot connect to {endpoint}"
    match error:
        case ConnectionRefusedError():
            return f"{failed}: no broker listens there; start one with `ternbus broker up` or check the URL"
        case socket.gaierror():
            return f"{failed}: unknown host name {endpoint.host}; check the broker's URL"
        case TimeoutError():
            return f"{failed}: no answer in time; check the broker's URL, the network and the firewall"
        case ssl.SSLCertVerificationError():
            mend = {EXPIRED: RENEW, TOO_EARLY: CLOCK}.get(error.verify_code, AUTHORITY)
            return f"{failed}: the broker's certificate is not trusted ({error.verify_message}); {mend}"
        case ssl.SSLEOFError() | ConnectionResetError() if endpoint.tls:
            return f"{failed}: it ended the TLS handshake; the port is for MQTT without TLS, or {CANNOT_SERVE}"
        case ssl.SSLError() if error.reason == "WRONG_VERSION_NUMBER":
            return f"{failed}: the port is not for TLS; check the port and the URL"
        case ssl.SSLError():
            return f"{failed}: the TLS handshake failed: {error.reason or error}"
        case _:
            return f"{failed}: {error.strerror or error}"


def silent(endpoint: Endpoint) -> str:
    """A message for a port that is open, but does not answer CONNECT."""
    return f"{endpoint} is open but does not answer; check that the port is for MQTT {_with_tls(endpoint)}"


def closed(endpoint: Endpoint) -> str:
    """A message for a broker that ends the connection instead of answering CONNECT; tries TLS on a port without."""
    what = f"{endpoint} closed the connection without an answer"
    if endpoint.tls:
        return f"{what}, after the TLS handshake: it does not accept this certificate, or {CANNOT_SERVE}"
    if _speaks_tls(endpoint):
        return f"{what}: the port is for MQTT with TLS; use mqtts:// and the broker's ca.pem"
    return f"{what}, and without TLS: the port is not for MQTT, or {CANNOT_SERVE}"


def refused(endpoint: Endpoint, client_id: str, code: int, name: str) -> str:
    """A message for a CONNACK with a reason code of MQTT 5 that is a failure."""
    text = f"the broker at {endpoint} refuses {client_id!r}: {name}"
    match code:
        case 0x88 | 0x89 | 0x97:  # server unavailable, server busy, quota exceeded
            return f"{text}; {CANNOT_SERVE}"
        case 0x86 | 0x87:  # bad user name or password, not authorized
            return f"{text}; {LOGIN}"
        case 0x9A:
            return f"{text}; {RETAIN}"
        case _:
            return text


def no_retain(endpoint: Endpoint) -> str:
    """A message for a CONNACK that says that retained messages are not available."""
    return f"the broker at {endpoint} retains no messages; {RETAIN}"


def _with_tls(endpoint: Endpoint) -> str:
    return f"with{'' if endpoint.tls else 'out'} TLS"


def _speaks_tls(endpoint: Endpoint) -> bool:
    """Whether a TLS handshake on the port is answered, by a certificate or by an alert."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent or believed
    try:
        with (
            socket.create_connection((endpoint.host, endpoint.port), timeout=PROBE_S) as trial,
            context.wrap_socket(trial),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
