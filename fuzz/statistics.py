"""The fuzz targets of federated statistics: an answer to a request, added up, and the request in a head."""

import json
from collections.abc import Mapping
from typing import Any, Final

from ternbus.aggregator.merge.pooled import Pooled
from ternbus.broker.protocol.statistics import Measured, StatisticsRequest

BOUNDS: Final[dict[str, Any]] = {"low": (0.0,), "high": (4.0,)}
REQUESTS: Final = (  # the first is that of tests/vectors.json, the second its noisy one
    StatisticsRequest(id=100, kinds=("moments", "histogram", "labels"), bins=2, **BOUNDS),
    StatisticsRequest(
        id=101, kinds=("moments", "labels"), features=("0",), labels=("cat",), dp="sample", noise=2.0, **BOUNDS
    ),
    StatisticsRequest(id=102, kinds=("moments",)),
    StatisticsRequest(id=103, kinds=("histogram",), bins=1, dp="device", noise=1.0, **BOUNDS),
)


def answer(data: bytes) -> None:
    """The content of an answer; the first byte chooses the request."""
    request = REQUESTS[data[0] % len(REQUESTS)] if data else REQUESTS[0]
    found = Measured.read(data[1:], request)
    assert Measured.read(found.pack(), request).pack() == found.pack()
    if found.refusal:
        return
    pooled = Pooled(request=request)
    for _ in range(2):
        pooled.add(found)
    shown = pooled.result(1)
    json.dumps(shown, allow_nan=False)
    assert Pooled.unpack(request, pooled.pack()).result(1) == shown


def request(meta: Mapping[str, Any]) -> None:
    """What a head asks for, if it does: a device that refuses it still follows the head."""
    asked = meta.get("statistics")
    if isinstance(asked, dict):
        found = StatisticsRequest.from_meta(asked)
        assert StatisticsRequest.from_meta(found.meta()) == found
