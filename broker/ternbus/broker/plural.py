"""Numbers with their nouns, for people."""


def counted(count: int, noun: str) -> str:
    """The number with its noun: `1 entry`, `2 entries`."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun.removesuffix('ry')}ries" if noun.endswith("ry") else f"{count} {noun}s"
