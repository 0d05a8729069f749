"""The metrics in the ledger that a status shows: there may be millions, and the key finds those of a device."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from ternbus.aggregator.store.device_metrics import Report
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.measurements import Measurements
from ternbus.aggregator.store.schema import STATED
from ternbus.broker.protocol.direction import PERSONAL

LAST: Final = 100  # versions up to a sender's newest, of which its newest reports are looked for
_ROWS: Final = "SELECT device, version, split, samples, entries, received_at, d.state FROM devices d CROSS JOIN metrics"
# by device first, as the key begins; of the rows of a group, SQLite shows the one that has the `max`
_NEWEST: Final = f"""SELECT device, max(version), split, samples, entries, received_at, d.state
    FROM devices d CROSS JOIN metrics ON device = d.name
    AND version > (SELECT max(version) FROM metrics WHERE device = d.name) - {LAST} WHERE split IN ('test', 'local')
    GROUP BY device, split, split = 'local' AND instr(entries, '"{PERSONAL}') > 0"""  # noqa: S608 - made of constants
_SHOWN: Final = f"""{_ROWS} ON device = d.name AND version >= ?1
    UNION {_ROWS} ON device = d.name AND version IN (SELECT value FROM json_each(?2))
    UNION {_NEWEST}"""  # noqa: S608 - made of constants

Stated = Mapping[str, Mapping[str, Any]]


def stated(ledger: Ledger) -> Stated:
    """What each device stated of its metrics beside their values: ``better`` and ``classes``."""
    rows = ledger.db.execute(
        "SELECT device, entries FROM devices CROSS JOIN metrics ON device = name AND version = 0 AND split = ?",
        (STATED,),
    )
    return {device: json.loads(entries) for device, entries in rows}


def shown(ledger: Ledger, said: Stated, first: int, also: Collection[int] = ()) -> Measurements:
    """The metrics of the versions from ``first`` on and of those in ``also``, and the newest of each sender.

    Those of devices' own data only of devices that are not revoked. The newest with a model of a device's own is one of
    its last ``LAST`` versions.
    """
    found = ledger.db.execute(_SHOWN, (first, json.dumps(list(also))))
    return _measured(found, said)


def tests(ledger: Ledger) -> Measurements:
    """The metrics on the test data of all versions."""
    return _measured(ledger.db.execute(f"{_ROWS} ON device = d.name WHERE split = 'test'"), stated(ledger))


def evaluated(ledger: Ledger) -> dict[str, tuple[int, float]]:
    """By sender of metrics on the test data: the newest version that it has measured, and when it last sent any.

    They are looked for among its last ``LAST`` versions.
    """
    rows = ledger.db.execute(
        "SELECT device, max(version), max(received_at) FROM devices CROSS JOIN metrics ON device = name AND"
        " version > (SELECT max(version) FROM metrics WHERE device = name) - ? WHERE split = 'test' GROUP BY device",
        (LAST,),
    )
    return {device: (version, at) for device, version, at in rows}


def _measured(rows: Iterable[tuple[Any, ...]], said: Stated) -> Measurements:
    found = Measurements()
    for device, version, split, samples, entries, _, state in sorted(rows, key=lambda row: float(row[5])):
        better = said.get(device, {}).get("better", {})
        if split == "test":
            found.add_test(device, version, json.loads(entries))
            found.state(device, better)
        elif split == "local" and state == "active":
            values = json.loads(entries)
            found.add_local(Report(device=device, version=version, samples=samples, values=values, better=better))
    return found
