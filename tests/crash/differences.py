"""The differences between a federation to which much happened and one to which nothing did."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from crash.federation import DEVICES, Federation, as_json
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import control
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.edge.core.state import AnsweredUpdate
from ternbus.edge.store import outbox

Row = tuple[Any, ...]


def rows(federation: Federation, query: str) -> list[Row]:
    with closing(sqlite3.connect(federation.home / LEDGER, timeout=30.0)) as db:
        return db.execute(query).fetchall()


def accepted(federation: Federation, device: str) -> list[AnsweredUpdate]:
    """The receipts that a device holds."""
    return [answer for answer in outbox.answers(federation.device(device)) if answer.outcome == "accepted"]


def found(damaged: Federation, reference: Federation) -> list[str]:
    """Every difference, in words. The reference has made at least as many versions; neither aggregator runs."""
    return [*_versions(damaged, reference), *_updates(damaged, reference), *_receipts(damaged), *recomputed(damaged)]


def _versions(damaged: Federation, reference: Federation) -> Iterator[str]:
    query = "SELECT version, digest, updates, staleness_max FROM versions ORDER BY version"
    ours, theirs = rows(damaged, query), rows(reference, query)
    if [row[0] for row in ours] != list(range(len(ours))):
        yield f"the versions are not 0 to {len(ours) - 1}"
    if len(theirs) < len(ours):
        yield f"there are {len(ours)} versions, in the reference only {len(theirs)}"
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            yield f"version {mine[0]} is not that of the reference: {mine} instead of {other}"


def _updates(damaged: Federation, reference: Federation) -> Iterator[str]:
    last = damaged.version()
    query = (
        "SELECT device, base, samples, codec, staleness, discount, norm, stated, merged FROM updates"
        f" WHERE merged <= {last} ORDER BY merged, device"
    )
    ours, theirs = Counter(rows(damaged, query)), Counter(rows(reference, query))
    yield from (f"the update {row} is not in the reference" for row in ours - theirs)
    yield from (f"the update {row} is only in the reference" for row in theirs - ours)
    by_update = rows(damaged, "SELECT merged, count(*) FROM updates WHERE merged > 0 GROUP BY merged ORDER BY merged")
    if by_update != rows(damaged, "SELECT version, updates FROM versions WHERE updates > 0 ORDER BY version"):
        yield "the versions do not count each update once"


def _receipts(damaged: Federation) -> Iterator[str]:
    """Every receipt is in the ledger, and of every update in the ledger its device was told, but for the newest."""
    for device in DEVICES:
        held = Counter((answer.base, answer.digest) for answer in accepted(damaged, device))
        query = f"SELECT base, digest FROM updates WHERE device = '{device}' AND (merged IS NULL OR merged > 0)"
        kept = Counter(rows(damaged, query))
        # its receipt was still to come when the device got another key, under which the aggregator told it so
        told = {answer.base for answer in outbox.answers(damaged.device(device)) if answer.outcome == "duplicate"}
        newest = max((base for base, _ in held), default=-1)
        yield from (f"{device} holds a receipt for {row}, the ledger does not" for row in held - kept)
        yield from (
            f"{device} lost the receipt for {row}" for row in kept - held if row[0] <= newest and row[0] not in told
        )


def recomputed(damaged: Federation) -> Iterator[str]:
    """The log proves each version; what a start recovers is the version that was published."""
    log = damaged.folder / "lab.log"
    damaged.command("log", "aggregator", "log", "export", damaged.home, log)
    facts = as_json("aggregator", "log", "verify", damaged.home)
    if not facts["ok"]:
        yield f"the log does not verify: {facts}"
    for device in damaged.devices:
        facts = as_json("edge", "verify", damaged.device(device), log)
        if not facts["ok"]:
            yield f"the log does not verify for {device}: {facts}"
    with control.exclusive(damaged.home), closing(Ledger(damaged.home / LEDGER)) as ledger:
        core = administration.open_core(damaged.home, ledger, "test")
        digest = administration.tensors_of(damaged.home, None)[1]
        if core.model.digest != digest:
            yield "a start does not recover the published version"
