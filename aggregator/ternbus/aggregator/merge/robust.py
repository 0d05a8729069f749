"""Robust merge rules, which limit the influence of a few hostile devices; they need the whole buffer.

Each device counts once, by the mean of its updates in the buffer, since nothing that it claims (how many samples it
has) and nothing that it can do more often (send updates on several versions) may buy it influence. A device's mean is
x_d = mean_i s_i Delta_i over its updates; s_i is an update's ``discount``.

Blocks stay packed as they came, so a ternary buffer costs 0.2 bytes a parameter and update. Rules unpack as many
coordinates of all of them at a time as fit into ``WORK_BYTES``, whatever the buffer's size.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.mean import Change, Mean, Sum
from ternbus.aggregator.settings import MergeSettings
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block

WORK_BYTES: Final = 2**24  # what a rule unpacks at a time, all its temporaries together
_BYTES_A_NUMBER: Final = 32  # a coordinate of one device: twice float32, twice float64, and a few truths
F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class Buffered:
    """Gathers updates, packed; ``result`` applies the settings' rule to them."""

    about: MergeSettings
    schema: Schema
    work_bytes: int = WORK_BYTES
    _updates: list[BufferedUpdate] = field(default_factory=list)

    def add(self, update: AcceptedUpdate, block: Block) -> None:
        """Take in one update."""
        self._updates.append((update, block))

    def result(self) -> Change:
        """There must have been an update."""
        if self.about.rule == "mean":
            return self._sum(self._capped())
        means = DeviceMeans.of(self.schema, self._updates, self.work_bytes)
        count = means.count
        match self.about.rule:
            case "median":
                return self._trimmed(means, (count - 1) // 2)
            case "trimmed-mean":
                return self._trimmed(means, trimmed(self.about.trim, count))
            case "norm-clip":
                return self._sum(means.spread(clip_to_norm(means.norms(), self.about.clip_norm)))
            case _ if count < 3:  # nobody can be told from the others
                return self._trimmed(means, 0)
            case rule:
                keep = 1 if rule == "krum" else self.about.krum_keep
                return self._sum(means.spread(krum(means.distances(), self.about.byzantine, keep)))

    def _capped(self) -> list[float]:
        """The weights of ``Mean``, with n_i cut where a device would have more than its share."""
        totals: dict[str, int] = {}
        for update, _ in self._updates:
            totals[update.device] = totals.get(update.device, 0) + update.samples
        most = cap(list(totals.values()), self.about.max_share)
        samples = [update.samples * min(1.0, most / totals[update.device]) for update, _ in self._updates]
        total = 0.0
        for each in samples:  # sum() rounds otherwise from Python 3.12 on, and a ledger is replayed to the same bits
            total += each
        return [each * update.discount / total for each, (update, _) in zip(samples, self._updates, strict=True)]

    def _sum(self, weights: Sequence[float]) -> Change:
        total = Accumulator(self.schema)
        for (_, block), weight in zip(self._updates, weights, strict=True):
            if weight:
                total.add(block, weight)
        return Change(total.total(), tuple(weights))

    def _trimmed(self, means: "DeviceMeans", leave: int) -> Change:
        """The mean of each coordinate without its ``leave`` smallest and its ``leave`` largest values."""
        delta = np.empty(self.schema.elements, dtype=np.float32)
        used = np.zeros(means.count)
        for first, values in means.pieces():
            middle = np.sort(values, axis=0)[leave : means.count - leave]
            delta[first : first + values.shape[1]] = middle.mean(axis=0)
            used += _used(values, middle)
        weights = used / ((means.count - 2 * leave) * self.schema.elements)
        return Change(delta, tuple(means.spread(weights)))


def _used(values: npt.NDArray[np.float32], middle: npt.NDArray[np.float32]) -> F64:
    """How many of the sorted values in the ``middle`` are each device's; devices with equal values share them."""
    low, high = middle[0], middle[-1]
    used: F64 = ((values > low) & (values < high)).sum(axis=1, dtype=np.float64)
    for edge, counts in ((low, True), (high, high > low)):
        at_edge = values == edge
        part = counts * (middle == edge).sum(axis=0) / at_edge.sum(axis=0)
        used += np.where(at_edge, part, 0).sum(axis=1)
    return used


@dataclass(frozen=True, slots=True)
class DeviceMeans:
    """The mean update x_d of each device in a buffer, in the order in which the devices first came."""

    schema: Schema
    updates: Sequence[BufferedUpdate]
    work_bytes: int
    count: int
    parts: tuple[tuple[int, float], ...]  # for each update its device's place, and its factor in that device's mean

    @classmethod
    def of(cls, schema: Schema, updates: Sequence[BufferedUpdate], work_bytes: int) -> "DeviceMeans":
        counts = Counter(update.device for update, _ in updates)
        places = {device: place for place, device in enumerate(counts)}
        parts = tuple((places[update.device], update.discount / counts[update.device]) for update, _ in updates)
        return cls(schema, updates, work_bytes, len(counts), parts)

    def pieces(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(place in the vector, all means there): arrays of shape (devices, coordinates)."""
        width = max(1, self.work_bytes // (_BYTES_A_NUMBER * self.count))
        for segment in self.schema.segments:
            for first in range(0, segment.tensor.elements, width):
                last = min(first + width, segment.tensor.elements)
                values = np.zeros((self.count, last - first), dtype=np.float32)
                for (_, block), (place, part) in zip(self.updates, self.parts, strict=True):
                    values[place] += block.piece(segment, first, last) * np.float32(part)
                yield segment.start + first, values

    def norms(self) -> F64:
        """The L2 norm of each mean."""
        squares = np.zeros(self.count)
        for _, values in self.pieces():
            squares += np.square(values, dtype=np.float64).sum(axis=1)
        return np.sqrt(squares)

    def distances(self) -> F64:
        """The squared L2 distance between any two means, shape (devices, devices)."""
        products = np.zeros((self.count, self.count))
        for _, values in self.pieces():
            exact = values.astype(np.float64)
            products += exact @ exact.T
        squares = products.diagonal()
        return np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)

    def spread(self, weights: Sequence[float] | F64) -> list[float]:
        """From weights of devices to weights of updates."""
        return [float(weights[place]) * part for place, part in self.parts]


def gather(about: MergeSettings, schema: Schema, summing: Callable[[Schema], Sum] = Accumulator) -> Mean | Buffered:
    """Where updates are put until they are merged: the plain mean needs no buffer, ``summing`` adds them up at once."""
    plain = about.rule == "mean" and about.max_share >= 1
    return Mean(summing(schema)) if plain else Buffered(about, schema)


def cap(totals: Sequence[float], max_share: float) -> float:
    """The c for which nobody's min(N_d, c) is more than ``max_share`` of their sum.

    With fewer devices than 1 / max_share that is impossible, and all count alike.
    """
    share = max(max_share, 1 / len(totals))
    ordered = sorted(totals, reverse=True)
    rest = float(sum(ordered))
    for above, largest in enumerate(ordered):  # so many are cut: c = share (above c + rest)
        most = share * rest / (1 - share * above)
        if largest <= most:
            return most
        rest -= largest
    return float(ordered[-1])


def trimmed(fraction: float, count: int) -> int:
    """How many values are left out at each end: ceil(fraction count), as long as any is left.

    Yin et al. 2018, definition 2, which leaves out fraction count; rounded up since a fraction of a device is a device.
    """
    return min(math.ceil(fraction * count - 1e-9), (count - 1) // 2)


def clip_to_norm(norms: F64, most: float) -> F64:
    """Weights 1/n min(1, M / norm): norm thresholding of Sun et al. 2019, section 4; M = 0 is the norms' median."""
    bound = most or float(np.median(norms))
    return np.minimum(1, bound / np.maximum(norms, np.finfo(np.float64).tiny)) / len(norms)


def krum(distances: F64, byzantine: int, keep: int) -> F64:
    """Weights of Krum (``keep`` = 1) and Multi-Krum (Blanchard et al. 2017, section 4): the best, in equal parts.

    score(i) = the sum of i's squared distances to the n - f - 2 means closest to it. ``keep`` = 0 keeps n - f of them.
    Where n < 2 f + 3, f is what n can bear: (n - 3) / 2, rounded down.
    """
    count = len(distances)
    f = min(byzantine, (count - 3) // 2)
    others = distances[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    scores = np.sort(others, axis=1)[:, : count - f - 2].sum(axis=1)
    best = np.argsort(scores, kind="stable")[: min(keep or count, count - f)]
    weights = np.zeros(count)
    weights[best] = 1 / len(best)
    return weights
