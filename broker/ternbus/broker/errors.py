"""Every error that Ternbus raises on purpose, and whose fault each one is."""


class FederationError(Exception):
    """The root: whatever Ternbus raises on purpose. Anything else is a bug and should crash loudly."""


class ProtocolError(FederationError):
    """A peer's fault: count it, acknowledge the message to the broker, carry on.

    ``reason`` is a short slug, the same for every instance of one fault, so that it can be counted;
    ``detail`` says what was found, for a log line or a receipt: one line, since it may quote what the peer wrote.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        shown = detail if detail.isprintable() else "".join(each if each.isprintable() else "?" for each in detail)
        super().__init__(f"{reason}: {shown}" if shown else reason)
        self.reason = reason
        self.detail = shown


class ConfigError(FederationError):
    """The operator's to mend: one line that says what to do; the command ends with exit code 2."""


class LinkError(FederationError):
    """The broker cannot be reached, or refuses us, now; trying again later may help."""
