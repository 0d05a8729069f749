"""The check of the federation's schema, with each snapshot: it never changes, and is that of the task's model."""

from dataclasses import dataclass, replace

from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile


@dataclass(slots=True, kw_only=True)
class SchemaCheck:
    """The schema that was compared last, and the first one that fitted in the state."""

    profile: Profile
    pending: PendingState
    fitting: Schema | None = None

    @property
    def done(self) -> bool:
        """Whether a schema was found to fit."""
        return self.fitting is not None

    def fault(self, schema: Schema | None) -> str:
        """A text that says why this device cannot use the schema; empty if it can, or does not know it yet."""
        if schema is None or schema is self.fitting:  # each snapshot makes another object
            return ""
        if fault := self.profile.schema_fault(schema, self.pending.state.schema):
            return fault
        self.fitting = schema
        if not self.pending.state.schema:
            self.pending.put(replace(self.pending.state, schema=schema.encoded))
        return ""
