"""The section [home_assistant] of aggregator.toml: what Home Assistant is shown."""

from dataclasses import dataclass

from ternbus.aggregator.sections import key


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeAssistantSettings:
    """What Home Assistant is shown (docs/home-assistant.md)."""

    discovery_prefix: str = key("", "topic below which Home Assistant looks, usually homeassistant; empty: off")
    every_s: float = key(15.0, "shortest time between two states of a device, in s", low=1, high=3600)
    refresh_s: float = key(
        600.0, "a state is sent again after so long, in s; one of twice the age is unavailable", low=60, high=86_400
    )
    devices_max: int = key(200, "largest number of devices shown, the first by name", low=1, high=1000)
