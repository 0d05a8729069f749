"""Which versions are kept for their metric: the best by the first evaluator, of those that can still be had."""

import json
import time
from collections.abc import Mapping
from typing import Final

from ternbus.aggregator.store import tags
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.rows import set_fact
from ternbus.aggregator.store.schema import STATED
from ternbus.broker.protocol.direction import Direction, direction_of, primary_of, sign_of

WORTH: Final = "best_worth"  # a fact: the metrics of the versions that are kept, which `prune` may have archived


def keep(ledger: Ledger, count: int, below: int) -> None:
    """Keep the best ``count`` versions, now that those ``below`` are about to go; in the caller's transaction.

    They are ranked by the primary metric of the newest version that has any, by the first evaluator by name that has
    measured it. A newer version counts before an equal one.
    """
    if count == 0 and not ledger.fact(tags.BEST_FACT):
        return
    (oldest,) = ledger.db.execute("SELECT min(version) FROM snapshots").fetchone()
    known = {int(version): values for version, values in json.loads(ledger.fact(WORTH) or "{}").items()}
    kept = {tag.version for name, tag in tags.read(ledger).items() if name.startswith(tags.BEST)}
    worth = {version: values for version, values in known.items() if version in kept}
    judge = ""
    rows = ledger.db.execute(
        # by device, as the key begins: there may be millions of metrics. The first by name is the last.
        "SELECT version, device, entries FROM devices CROSS JOIN metrics ON device = name"
        " WHERE split = 'test' AND version >= ? ORDER BY version, device DESC",
        (oldest,),
    )
    for version, device, entries in rows:
        judge, worth[version] = device, json.loads(entries)
    best = _best(worth, _stated(ledger, judge))[:count]
    tags.keep_best(ledger, best, below, time.time())
    set_fact(ledger.db, WORTH, json.dumps({version: worth[version] for version in best}))


def _best(worth: Mapping[int, Mapping[str, float]], better: Mapping[str, Direction]) -> list[int]:
    """The versions that have the primary metric, the best first."""
    metric = primary_of(worth[max(worth)]) if worth else None
    if metric is None:
        return []
    sign = sign_of(direction_of(metric, better))
    return sorted(
        (version for version in worth if metric in worth[version]),
        key=lambda version: (sign * worth[version][metric], version),
        reverse=True,
    )


def _stated(ledger: Ledger, judge: str) -> Mapping[str, Direction]:
    """The directions that an evaluator stated last."""
    row = ledger.db.execute(
        "SELECT entries FROM metrics WHERE device = ? AND version = 0 AND split = ?", (judge, STATED)
    ).fetchone()
    return json.loads(row[0])["better"] if row is not None else {}
