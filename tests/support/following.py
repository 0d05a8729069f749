"""A follower of the model, and a broker that it asks for retained messages by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from support.scripted_aggregator import FEDERATION, Message, ScriptedAggregator
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.model_messages import Head
from ternbus.edge.core.actions import Action, Log, Subscribe, Unsubscribe
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.part_requests import SUBSCRIBED_MAX


@dataclass
class Broker:
    """Retained messages and a follower's subscriptions by name; what is retained comes at once when asked for."""

    retained: dict[str, bytes] = field(default_factory=dict)
    subscribed: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    silent: bool = False

    def publish(self, messages: list[Message]) -> None:
        self.retained.update(messages)

    def perform(self, follower: Follower, actions: Sequence[Action], now: float) -> None:
        queue = list(actions)
        while queue:
            match queue.pop(0):
                case Subscribe(filters=filters):
                    self.subscribed.update(filters)
                    assert len(self.subscribed) <= SUBSCRIBED_MAX
                    self.asked += filters
                    for topic in filters:
                        if topic in self.retained and not self.silent:
                            queue += follower.part_arrived(topic, parse(self.retained[topic]), now)
                case Unsubscribe(filters=filters):
                    self.subscribed.difference_update(filters)
                case Log(event=event):
                    self.logs.append(event)
                case other:
                    raise AssertionError(f"a follower does not ask for {other}")


def a_head(aggregator: ScriptedAggregator) -> Head:
    return Head.from_meta(parse(aggregator.head()[1]).meta)


def connected() -> tuple[Follower, Broker]:
    follower, broker = Follower(federation=FEDERATION), Broker()
    broker.perform(follower, follower.reconnected(0.0), 0.0)
    return follower, broker


def started(versions: int = 0, **settings: int) -> tuple[ScriptedAggregator, Follower, Broker]:
    """A follower that has the newest version."""
    aggregator = ScriptedAggregator(**settings)  # type: ignore[arg-type]
    follower, broker = connected()
    for _ in range(versions):
        aggregator.advance()
    aggregator.snapshot_version = aggregator.version
    broker.publish(aggregator.snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 0.0), 0.0)
    assert follower.synced
    return aggregator, follower, broker


def has(follower: Follower, aggregator: ScriptedAggregator, version: int) -> bool:
    return (
        follower.version == version
        and follower.vector is not None
        and follower.vector.tobytes() == aggregator.vectors[version].tobytes()
    )


def deliver(follower: Follower, messages: list[Message], now: float = 0.0) -> list[Action]:
    return [action for topic, payload in messages for action in follower.part_arrived(topic, parse(payload), now)]
