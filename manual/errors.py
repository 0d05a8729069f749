"""The error of the manual: a page cannot be made of what there is."""


class ManualError(Exception):
    """What is missing, where, and what to add."""
