"""Reported metrics of a version, by devices and evaluators: checked, limited in size, and saved."""

import json

from ternbus.aggregator.core import records
from ternbus.aggregator.core.registry import DEVICE, Member
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.direction import primary_of
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import Metrics


def received(member: Member, frame: Frame, *, version: int, bytes_max: int) -> records.MetricsReceived:
    """The record of a member's metrics, at most ``bytes_max`` of one member; ``version`` is the model's.

    Raises ProtocolError for metrics that this member may not send.
    """
    frame.check_bodiless()
    metrics = Metrics.from_meta(frame.meta)
    if metrics.version > version:
        raise ProtocolError("bad-meta", "metrics of a version that is not yet")
    if metrics.split == "test" and member.role == DEVICE:
        raise ProtocolError("not-evaluator", f"{member.name} must be invited with `invite --evaluator` for that")
    if frame.seq <= member.metrics_seq:
        raise ProtocolError("replayed-metrics", member.name)
    size_bytes = len(json.dumps(dict(metrics.values)))  # as the ledger holds them
    stated = json.dumps([dict(metrics.better), dict(metrics.classes)])
    if hash(stated) != member.metrics_stated:  # written too, in place of what was stated before
        size_bytes += len(stated)
    if member.metrics_bytes + size_bytes > bytes_max:
        raise ProtocolError("too-many-metrics", f"more than limits.metrics_bytes of {member.name}")
    member.metrics_bytes += size_bytes
    member.metrics_seq, member.metrics_stated = frame.seq, hash(stated)
    if (primary := primary_of(metrics.values)) is not None:
        member.metric = primary, metrics.values[primary]
    if metrics.split == "test" and member.highest_base < 0:
        member.evaluates = True
    return records.MetricsReceived(device=member.name, seq=frame.seq, metrics=metrics)
