"""Error messages for failed connections to a broker."""

import socket
import ssl

from ternbus.broker.protocol.endpoint import Endpoint


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
            return (
                f"{failed}: the broker's certificate is not trusted ({error.verify_message}); check ca.pem and the URL"
            )
        case ssl.SSLError():
            return f"{failed}: the TLS handshake failed: {error.reason or error}"
        case _:
            return f"{failed}: {error.strerror or error}"


def no_answer(endpoint: Endpoint, what: str) -> str:
    """A message for a port that is open, but did ``what`` instead of answering CONNECT."""
    if endpoint.tls:
        return (
            f"{endpoint} {what}; check that the port is for MQTT with TLS and that the broker accepts the certificate"
        )
    return f"{endpoint} {what}; check that the port is for MQTT without TLS"
