"""Text that a peer has a part in, for a screen, a log or a file."""


def printable(text: str, keep: str = "") -> str:
    """The text with `?` in place of each character that is not printable and not in ``keep``."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else "?" for each in text)
