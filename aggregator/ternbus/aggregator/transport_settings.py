"""The section [transport] of aggregator.toml: how the broker is reached."""

from dataclasses import dataclass

from ternbus.aggregator.sections import key
from ternbus.broker.protocol.endpoint import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How the broker is reached, besides the certificates in this directory."""

    authority: str = key("", "directory of the broker (`ternbus broker init`) that signs the devices' certificates")
    username: str = key("", "user name at the broker; empty: aggregator-FEDERATION")
    password_file: str = key("", "file with the broker's password in its first line, mode 0600")
    no_tls: bool = key(False, "true: the password may be sent unencrypted, on a network where you trust everyone")

    def check(self, broker: str, switch: str) -> None:
        """Raise ConfigError, which names ``switch``, if a password would be sent unencrypted without leave."""
        if self.password_file:
            Endpoint.parse(broker).check_password(no_tls=self.no_tls, switch=switch)
