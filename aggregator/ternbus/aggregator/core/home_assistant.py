"""What Home Assistant is shown: each device and the federation, by its MQTT discovery, as retained JSON.

Nobody reads it back: it is a view of what was verified before, and neither signed nor needed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Action, Publish, Save
from ternbus.aggregator.core.registry import Member, Registry
from ternbus.aggregator.core.versions import Versions
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import AGGREGATOR

OFFLINE: Final = "offline"
STATES: Final = ("training", "idle", OFFLINE)  # of devices
EXPIRE_S: Final = 60.0  # beyond two refreshes
RETRY_S, RETRY_MAX_S = 10.0, 600.0  # until a look after one that was refused; it doubles each time

Component = Mapping[str, Any]


def _sensor(name: str, key: str, **about: Any) -> Component:
    return {"platform": "sensor", "name": name, "value_template": f"{{{{ value_json.{key} }}}}", **about}


def _binary(name: str, device_class: str, condition: str, **about: Any) -> Component:
    shown = f"{{{{ 'ON' if {condition} else 'OFF' }}}}"
    return {"platform": "binary_sensor", "name": name, "device_class": device_class, "value_template": shown, **about}


MEASURED: Final = {"state_class": "measurement"}
DIAGNOSTIC: Final = {"entity_category": "diagnostic"}
OF_DEVICE: Final[Mapping[str, Component]] = {
    "state": _sensor("State", "state", device_class="enum", options=list(STATES)),
    "online": _binary("Online", "connectivity", f"value_json.state != '{OFFLINE}'"),
    "problem": _binary("Problem", "problem", "value_json.failing"),
    "lag": _sensor("Version lag", "lag", unit_of_measurement="versions", **MEASURED),
    "metric": _sensor("Metric", "metric", **MEASURED),
    "loss": _sensor("Loss", "loss", **MEASURED),
    "seen": _sensor("Last seen", "seen", device_class="timestamp", **DIAGNOSTIC),
}
OF_TRAINER: Final = ("lag", "loss")  # an evaluator has none
EPSILON: Final = _sensor("Epsilon left", "epsilon_left", **MEASURED)
OF_FEDERATION: Final[Mapping[str, Component]] = {
    "state": _sensor("State", "state", device_class="enum", options=["open", "paused", "closed"]),
    "version": _sensor("Version", "version", **MEASURED),
    "devices_online": _sensor("Devices online", "devices_online", unit_of_measurement="devices", **MEASURED),
}
OF_BUFFER: Final[Mapping[str, Component]] = {  # private sums have none
    "buffer": _sensor("Updates in the buffer", "buffer", unit_of_measurement="updates", **MEASURED),
}


@dataclass(slots=True, kw_only=True)
class HomeAssistant:
    """Decides what is published when; at most one state of each device in ``every_s``, and only what has changed."""

    versions: Versions
    registry: Registry
    software: str
    due: float | None = None  # when ``on_time`` has something to do
    clearing: set[str] = field(default_factory=set)  # topics that were cleared, and not yet acknowledged
    _sent: dict[str, tuple[bytes, float]] = field(default_factory=dict)  # on this connection: what, and when
    _refused: bool = False  # something, since the last look
    _wait_s: float = 0.0  # until the next look, while the broker refuses

    def owns(self, topic: str) -> bool:
        """Whether it is a topic of this view, perhaps of a former prefix."""
        levels = topic.split("/")
        return levels[0] != "ternbus" or levels[3] == "view"

    @property
    def _held(self) -> set[str]:
        return self.versions.published.shown

    def connected(self, now: float) -> None:
        """Publish everything; the broker may have lost it."""
        self._sent.clear()
        self.clearing.clear()
        self._refused, self._wait_s = False, 0.0
        self.due = now if self._is_on or self._held else None

    def disconnected(self) -> None:
        self.due = None

    def acknowledged(self, topic: str) -> list[Action]:
        """The broker took a message; with the last one that clears a topic, those topics are forgotten."""
        if topic not in self.clearing:
            return []
        self.clearing.discard(topic)
        self._held.discard(topic)
        return [] if self.clearing else [self._save()]

    def refused(self, topic: str) -> None:
        """The broker refused a message: it is sent again, ever more rarely."""
        self._refused |= self._sent.pop(topic, None) is not None or topic in self.clearing
        self.clearing.discard(topic)

    def on_time(self, now: float) -> list[Action]:
        """Publish what has changed, and clear what is no longer wanted."""
        if self.due is None or now < self.due:
            return []
        self._wait_s = min(max(2 * self._wait_s, RETRY_S), RETRY_MAX_S) if self._refused else 0.0
        self._refused = False
        self.due = now + max(self._settings.every_s, self._wait_s) if self._is_on else None
        wanted = dict(self._messages()) if self._is_on else {}
        gone = sorted(self._held - wanted.keys() - self.clearing)
        actions: list[Action] = []
        if wanted.keys() - self._held:
            self._held.update(wanted)
            actions.append(self._save())  # before the broker has any of it
        self.clearing.difference_update(wanted)
        self.clearing.update(gone)
        for topic in gone:
            self._sent.pop(topic, None)
        actions += [Publish(topic=topic, payload=b"", retain=True) for topic in gone]
        return [*actions, *(self._publish(topic, payload, now) for topic, payload in self._news(wanted, now))]

    def stop(self, now: float) -> list[Action]:
        """Say that nothing more will come."""
        if self.due is None or not self._is_on:
            return []
        topic, payload = self._federation(OFFLINE)
        return [self._publish(topic, payload, now)]

    @property
    def _settings(self) -> Any:
        return self.versions.settings.home_assistant

    @property
    def _is_on(self) -> bool:
        return bool(self._settings.discovery_prefix)

    def _save(self) -> Save:
        return Save(record=records.TopicsShown(topics=tuple(sorted(self._held))))

    def _publish(self, topic: str, payload: bytes, now: float) -> Publish:
        self._sent[topic] = payload, now
        return Publish(topic=topic, payload=payload, retain=True)

    def _news(self, wanted: Mapping[str, bytes], now: float) -> Iterator[tuple[str, bytes]]:
        """What the broker was not given on this connection, or so long ago that Home Assistant would doubt it."""
        for topic, payload in wanted.items():
            before, at = self._sent.get(topic, (b"", now))
            is_state = not topic.startswith(f"{self._settings.discovery_prefix}/device/")
            is_old = is_state and now - at >= self._settings.refresh_s
            if payload != before or is_old:
                yield topic, payload

    # --- what there is to show

    def _messages(self) -> Iterator[tuple[str, bytes]]:
        """Topic and payload of each message, a device's configuration before its state."""
        of_all = {**OF_FEDERATION, **({} if self.versions.private is not None else OF_BUFFER)}
        yield self._configuration(AGGREGATOR, self._about_federation(), of_all)
        yield self._federation("online")
        members = sorted(each for each, member in self.registry.members.items() if not member.revoked)
        for name in members[: self._settings.devices_max]:
            member = self.registry.members[name]
            yield self._configuration(name, self._about(member), self._components(member))
            yield self._topic(name), _json(self._state(member))

    def _topic(self, name: str) -> str:
        return topics.view(self._federation_name, name)

    @property
    def _federation_name(self) -> str:
        return str(self.versions.settings.federation)

    def _federation(self, availability: str) -> tuple[str, bytes]:
        online = sum(not member.evaluates for member in self.registry.online.values())
        state: dict[str, Any] = {
            "availability": availability,
            "state": self.versions.published.state,
            "version": self.versions.model.version,
            "devices_online": online,
        }
        if self.versions.private is None:
            state["buffer"] = len(self.versions.model.buffer)
        return self._topic(AGGREGATOR), _json(state)

    def _components(self, member: Member) -> Mapping[str, Component]:
        found = {key: each for key, each in OF_DEVICE.items() if key not in OF_TRAINER or not member.evaluates}
        return found | ({"epsilon_left": EPSILON} if self._budget is not None and not member.evaluates else {})

    @property
    def _budget(self) -> float | None:
        """The epsilon after which devices stop, by the plan; None without differential privacy."""
        settings = self.versions.settings
        return settings.epsilon if settings.is_dp else None

    def _state(self, member: Member) -> dict[str, Any]:
        status = member.status
        base = max(-1 if status is None else status.base, member.highest_base)
        name, value = member.metric or (None, None)
        budget = self._budget
        state: dict[str, Any] = {
            "state": OFFLINE if status is None else status.state,
            "lag": None if base < 0 else max(0, self.versions.model.version - base),
            "metric": _finite(value),
            "metric_name": name,
            "loss": _finite(member.loss),
            "seen": None if member.seen_at is None else _moment(member.seen_at),
            "failing": status is not None and bool(status.failing),
        }
        if budget is not None:
            state["epsilon_left"] = None if member.epsilon is None else max(0.0, budget - member.epsilon)
        return state

    def _about_federation(self) -> dict[str, Any]:
        name = self._federation_name
        return {"name": f"Ternbus {name}", "model": "federation", "sw_version": self.software}

    def _about(self, member: Member) -> dict[str, Any]:
        about = {"name": member.name, "model": "evaluator" if member.evaluates else "device"}
        if member.status is not None and member.status.software:
            about["sw_version"] = member.status.software
        return {**about, "via_device": self._identifier(AGGREGATOR)}

    def _identifier(self, name: str) -> str:
        return f"ternbus_{self._federation_name}_{name}"

    def _configuration(
        self, name: str, about: Mapping[str, Any], components: Mapping[str, Component]
    ) -> tuple[str, bytes]:
        """A message of discovery for a device with all of its entities."""
        identifier, expire_s = self._identifier(name), int(2 * self._settings.refresh_s + EXPIRE_S)
        entities = {
            key: {**each, "unique_id": f"{identifier}_{key}", "expire_after": expire_s}
            for key, each in components.items()
        }
        if "metric" in entities:
            attributes = {
                "json_attributes_topic": self._topic(name),
                "json_attributes_template": "{{ {'name': value_json.metric_name} | tojson }}",
            }
            entities["metric"] |= attributes
        content = {
            "device": {"identifiers": [identifier], "manufacturer": "Ternbus", **about},
            "origin": {"name": "Ternbus", "sw_version": self.software},
            "components": entities,
            "state_topic": self._topic(name),
            "availability": [
                {"topic": self._topic(AGGREGATOR), "value_template": "{{ value_json.availability }}"},
            ],
            "qos": 1,
        }
        prefix = self._settings.discovery_prefix
        return topics.discovery(prefix, self._federation_name, name), _json(content)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _finite(value: float | None) -> float | None:
    """A number that JSON has."""
    return value if value is not None and math.isfinite(value) else None


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
