"""What a broker of ours lets anybody take of it, whichever software it is."""

from typing import Final

CONNECTIONS_MAX: Final = 20_000  # twice the devices that were measured: each of ten thousand may be reconnecting
