"""The state of private sums as a value, for commands and scripts."""

from pathlib import Path
from typing import Any

from ternbus.aggregator.settings import Settings
from ternbus.aggregator.store import merge_log, private_rows, set_rows
from ternbus.aggregator.store.ledger import Ledger, reading
from ternbus.aggregator.store.rows import CLOSING
from ternbus.broker.protocol.merge_log import Entry, unpack


def read(directory: Path, settings: Settings) -> dict[str, Any]:
    """The key `private` of a status, as JSON values; no key in a federation without private sums.

    ``terms`` is the digest of the newest version's terms (None: devices wait until all ``helpers`` are ready), ``min``
    and ``max`` how many devices a sum is of; each helper's ``waits_for`` says what it is waited for (None: nothing),
    ``card`` the number of its box key, ``count`` how many steps it has written down, ``answered_at`` when it answered
    last (Unix seconds). ``closing``: the federation closes when helpers have answered. For ``groups``, ``sets`` and
    ``dropped`` see `set_rows.status`.
    """
    if settings.private is None:
        return {}
    with reading(directory) as ledger:
        return {"private": _read(ledger, settings)}


def merged_sets(directory: Path) -> int:
    """How many sums of private updates the versions contain, by the log of merges."""
    with reading(directory) as ledger:
        return sum(len(Entry.parse(unpack(entry).content).sets) for _, entry in merge_log.entries(ledger))


def _read(ledger: Ledger, settings: Settings) -> dict[str, Any]:
    sums = private_rows.recover(ledger.db, settings, ledger.schema())
    assert sums is not None  # noqa: S101 - the settings have helpers
    said = {
        name: row
        for name, *row in ledger.db.execute("SELECT name, public, status, software, seen_at, answered_at FROM helpers")
    }
    waits, begun = sums.waits_for(), sums.contexts.get(ledger.version)
    helpers = {}
    for name, helper in sums.helpers.items():
        public, *rest = said.get(name, (helper.public,))
        status, software, seen_at, answered_at = rest if rest and public == helper.public else ("", "", None, None)
        card = None if helper.card is None else helper.card.card
        helpers[name] = {
            "key": helper.public.hex(),
            "enrolled": helper.enrolled,
            "state": status or "offline",
            "card": None if card is None else card.number,
            "roster": None if card is None else card.roster,
            "min": None if card is None else card.min,
            "count": helper.count if helper.count >= 0 else None,
            "software": software,
            "seen_at": seen_at,
            "answered_at": answered_at,
            "waits_for": waits.get(name),
        }
    return {
        "terms": None if begun is None else begun.terms_digest.hex(),
        "bits": sums.settings.bits,
        "levels": sums.settings.levels,
        "min": sums.settings.min if begun is None else begun.terms.min,
        "max": sums.settings.devices_max,
        "helpers": helpers,
        "closing": ledger.fact(CLOSING) is not None,
        **set_rows.status(ledger.db),
    }
