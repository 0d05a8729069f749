"""Why a broker does not answer, in words that say what to do."""

import socket
import ssl

from ternbus.broker.protocol.endpoint import Endpoint


def explain(endpoint: Endpoint, error: OSError) -> str:
    """One sentence on why nobody answers here, and what to do."""
    nobody = f"no broker answers at {endpoint}"
    match error:
        case ConnectionRefusedError():
            return f"{nobody}: connection refused; start one with `ternbus broker up`"
        case socket.gaierror():
            return f"{nobody}: no machine of the name {endpoint.host} is known; check the broker's URL"
        case TimeoutError():
            return f"{nobody} in time; check its URL, the network and the firewall"
        case ssl.SSLCertVerificationError():
            return f"the broker at {endpoint} shows a certificate that is not to be believed: {error.verify_message}"
        case ssl.SSLError():
            return f"the broker at {endpoint} and we do not agree on TLS: {error.reason or error}"
        case _:
            return f"{nobody}: {error.strerror or error}"


def question(endpoint: Endpoint, what: str) -> str:
    """One sentence on a port that is open, but did ``what`` instead of greeting us."""
    if endpoint.tls:
        return f"{endpoint} {what}; is it a port for MQTT with TLS, and does the broker accept our certificate?"
    return f"{endpoint} {what}; is it a port for MQTT without TLS?"
