"""Terms and contexts of private sums: each version has exactly one context, and terms change only with a version.

All updates of a set have the same context, which names the model, the plan and the terms. With two contexts for one
version, an aggregator could single a device out by giving it another plan or other terms.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Save
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums.state import ContextOf, PrivateSums
from ternbus.broker.protocol.topics import TERMS
from ternbus.broker.sums.terms import SCHEMA, digest_of


@dataclass(slots=True, kw_only=True)
class PrivateTerms:
    """Says which terms a version has, and when a version must end because what it is made by has changed."""

    settings: Settings
    sums: PrivateSums
    retained: bytes = b""  # digest of the terms that the broker was given
    held: Callable[[], Collection[int]] = frozenset  # stale bases whose contexts are still needed

    def plan(self, version: int) -> Mapping[str, Any]:
        """What a head of this version tells devices."""
        begun = self.sums.contexts.get(version)
        return self._plan(b"" if begun is None else begun.terms_digest)

    def _plan(self, terms: bytes) -> Mapping[str, Any]:
        plan = self.settings.published_plan
        return {**plan, TERMS: terms, SCHEMA: self.sums.schema.digest} if terms else plan

    def can_begin(self, model: Model) -> bool:
        """Whether the newest version has no terms yet, and could have some."""
        return model.version not in self.sums.contexts and self.sums.next_terms(model.published) is not None

    def is_outdated(self, model: Model) -> bool:
        """Whether the newest version has another plan, or other terms, than one that would begin now."""
        begun = self.sums.contexts.get(model.version)
        return begun is not None and (
            begun.plan != _digest(self._plan(begun.terms_digest))
            or begun.terms != self.sums.next_terms(model.published)
        )

    def begin(self, model: Model) -> tuple[Save, ...]:
        """The context of the newest version, if it has none yet and the helpers are ready."""
        terms = self.sums.next_terms(model.published) if model.version not in self.sums.contexts else None
        if terms is None:
            return ()
        content = terms.content()
        digest, oldest = digest_of(content), model.version - self.settings.staleness.max
        begun = ContextOf(
            base=model.version,
            model=model.digest,
            plan=_digest(self._plan(digest)),
            terms=terms,
            terms_bytes=content,
        )
        self.sums.begin(begun, oldest, self.held())
        context = records.ContextBegun(base=begun.base, model=begun.model, plan=begun.plan, terms=digest, oldest=oldest)
        return Save(record=records.TermsMade(digest=digest, content=content)), Save(record=context)


def _digest(plan: Mapping[str, Any]) -> bytes:
    """Of a plan's bytes as they are in a head."""
    return digest_of(bytes(msgpack.packb(dict(plan))))
