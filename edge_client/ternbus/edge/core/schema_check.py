"""The check of the federation's schema, once per process: it never changes, and is that of the task's model."""

from dataclasses import dataclass, replace

from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile


@dataclass(slots=True, kw_only=True)
class SchemaCheck:
    """Whether the schema was compared, and the first one that fitted in the state."""

    profile: Profile
    pending: PendingState
    done: bool = False

    def fault(self, schema: Schema | None) -> str:
        """A text that says why this device cannot use the schema; empty if it can, or does not know it yet."""
        if schema is None or self.done:
            return ""
        if fault := self.profile.schema_fault(schema, self.pending.state.schema):
            return fault
        self.done = True
        if not self.pending.state.schema:
            self.pending.put(replace(self.pending.state, schema=schema.encoded))
        return ""
