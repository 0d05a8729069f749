"""What Home Assistant is shown, by values: which messages, how many, how often, and what becomes of them."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jinja2
import pytest
from ha_mqtt_discoverable import DeviceInfo, EntityInfo
from ha_mqtt_discoverable.sensors import BinarySensorInfo, SensorInfo

from support.private_world import HelperSide, PrivateBench, make_private
from support.small_world import LAB, Bench, reconfigure, refusals, saved, scratch, ternary_block
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.home_assistant import OF_BUFFER, OF_DEVICE, OF_FEDERATION
from ternbus.aggregator.store import status as statuses
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import AGGREGATOR
from ternbus.broker.protocol.messages import Status

Make = Callable[..., Bench]
PREFIX = "homeassistant"
EVERY_S, REFRESH_S = 15.0, 600.0
# What an entity of each platform has in ha_mqtt_discoverable, and the name of its component there.
MODELS: Mapping[str, type[EntityInfo]] = {"sensor": SensorInfo, "binary_sensor": BinarySensorInfo}
# Of Home Assistant's schema of device discovery: what a message must and may have.
REQUIRED = {"device", "origin", "components"}
ALLOWED = REQUIRED | {"state_topic", "command_topic", "qos", "encoding", "availability", "availability_mode"}


@pytest.fixture
def shown(make: Make) -> Callable[..., Bench]:
    def start(**settings: object) -> Bench:
        return make(**{"home_assistant__discovery_prefix": PREFIX, "home_assistant__every_s": EVERY_S, **settings})

    return start


def view(bench: Bench, name: str) -> dict[str, Any]:
    """The state of a device as the broker holds it."""
    found: dict[str, Any] = json.loads(bench.retained[topics.view(LAB, name)])
    return found


def configuration_of(bench: Bench, name: str, prefix: str = PREFIX) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench.retained[topics.discovery(prefix, LAB, name)])
    return found


def is_shown(topic: str) -> bool:
    return topic.startswith(f"{PREFIX}/") or "/view/" in topic


def shown_by(actions: list[events.Action]) -> list[events.Publish]:
    return [each for each in actions if isinstance(each, events.Publish) and is_shown(each.topic)]


def acknowledge(bench: Bench) -> list[events.Action]:
    """The broker acknowledges all that is awaited."""
    actions: list[events.Action] = []
    for topic in sorted(bench.core.awaited):
        actions += bench.handle(events.Published(topic=topic))
    return actions


def test_nothing_is_shown_by_default(make: Make) -> None:
    bench = make()
    bench.join("pi")
    bench.tick(1000.0)
    assert [topic for topic in bench.retained if is_shown(topic)] == []
    assert bench.core.deadline is None or bench.core.deadline > bench.now


def test_a_device_is_shown_with_its_state_and_the_federation_with_its_own(shown: Make) -> None:
    bench = shown(merge__buffer_size=1)
    pi = bench.join("pi")
    bench.receive(pi.topic("status"), pi.status("training", base=0))
    bench.handle(
        events.MessageArrived(
            topic=pi.topic("metrics"), payload=pi.metrics(0, "local", accuracy=0.75), clock_s=1_700_000_000.0
        )
    )
    bench.send(pi, ternary_block(bench.schema, 1), 0, metrics={"loss": 0.25})
    bench.tick(EVERY_S)
    assert view(bench, "pi") == {
        "state": "training", "lag": 1, "metric": 0.75, "metric_name": "accuracy", "loss": 0.25,
        "seen": "2023-11-14T22:13:20+00:00", "failing": False,
    }  # fmt: skip
    assert view(bench, AGGREGATOR) == {
        "availability": "online", "state": "open", "version": 1, "devices_online": 1, "buffer": 0,
    }  # fmt: skip
    bench.receive(pi.topic("status"), pi.status("offline"))
    bench.tick(EVERY_S)
    assert view(bench, "pi")["state"] == "offline"


def test_private_sums_have_no_buffer_to_show() -> None:
    chosen = {"home_assistant__discovery_prefix": PREFIX}
    bench = PrivateBench(make_private(scratch() / "private", [HelperSide("h-1")], **chosen))
    bench.start()
    assert "buffer" not in view(bench, AGGREGATOR)
    assert set(configuration_of(bench, AGGREGATOR)["components"]) == set(OF_FEDERATION)
    bench.close()


def test_what_is_left_of_a_privacy_budget_is_shown_where_there_is_one(shown: Make) -> None:
    plan = {"plan__dp": "device", "plan__dp_noise": 1.0, "plan__dp_clip": 1.0, "plan__dp_epsilon": 9.0}
    bench = shown(**plan)
    pi = bench.join("pi")
    bench.tick(EVERY_S)
    assert view(bench, "pi")["epsilon_left"] is None
    assert "epsilon_left" in configuration_of(bench, "pi")["components"]
    bench.send(pi, ternary_block(bench.schema, 1), 0, metrics={"epsilon": 2.5})
    bench.tick(EVERY_S)
    assert view(bench, "pi")["epsilon_left"] == 6.5
    bench.restart()
    bench.start()
    assert view(bench, "pi")["epsilon_left"] == 6.5


def test_a_message_of_discovery_is_one_that_home_assistant_reads(shown: Make) -> None:
    """By the models of ha-mqtt-discoverable, by the keys of Home Assistant's schema, and by rendering its templates."""
    bench = shown()
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
    about = Status(state="idle", session=1, software="ternbus 9.9")
    bench.receive(pi.topic("status"), pi.frame("status", about.meta()))
    bench.tick(EVERY_S)
    assert configuration_of(bench, "pi")["device"]["sw_version"] == "ternbus 9.9"
    assert "sw_version" not in configuration_of(bench, judge.name)["device"]
    names = ("pi", "judge", AGGREGATOR)
    ids: list[str] = []
    for name in names:
        message, state = configuration_of(bench, name), view(bench, name)
        assert message.keys() >= REQUIRED
        assert message.keys() <= ALLOWED
        about_device = DeviceInfo(**message["device"])
        assert set(message["device"]) <= set(DeviceInfo.model_fields)
        assert message["origin"]["name"] == "Ternbus"
        for key, entry in message["components"].items():
            rest = {name: value for name, value in entry.items() if name != "platform"}
            entity = MODELS[entry["platform"]](device=about_device, **rest)
            assert (entity.component, entity.unique_id) == (entry["platform"], entry["unique_id"])
            ids.append(entry["unique_id"])
            value = jinja2.Template(entry["value_template"]).render(value_json=state)
            if entry["platform"] == "binary_sensor":
                assert value in {"ON", "OFF"}
            elif entry.get("device_class") == "enum":
                assert value in entry["options"]
                assert not {"state_class", "unit_of_measurement"} & entry.keys()
            else:
                assert value == str(state[key])
            assert entry["expire_after"] == 2 * REFRESH_S + 60
        (available,) = message["availability"]
        assert available["topic"] == topics.view(LAB, AGGREGATOR)
        rendered = jinja2.Template(available["value_template"]).render(value_json=view(bench, AGGREGATOR))
        assert rendered == "online"
    assert len(set(ids)) == len(ids)
    assert set(configuration_of(bench, "pi")["components"]) == set(OF_DEVICE)
    assert set(configuration_of(bench, "judge")["components"]) == set(OF_DEVICE) - {"lag", "loss"}
    assert set(configuration_of(bench, AGGREGATOR)["components"]) == {*OF_FEDERATION, *OF_BUFFER}
    via = configuration_of(bench, "pi")["device"]["via_device"]
    assert configuration_of(bench, AGGREGATOR)["device"]["identifiers"] == [via]


def test_only_what_changed_is_sent_and_at_most_once_in_its_time(shown: Make) -> None:
    bench = shown(merge__buffer_size=1, downlink__codec="float32")
    pi, other = bench.join("pi"), bench.join("other")
    for device in (pi, other):
        bench.receive(device.topic("status"), device.status("idle"))
    bench.tick(EVERY_S)
    assert shown_by(bench.tick(EVERY_S)) == []
    sent = 0
    for _ in range(10):
        for state in ("training", "idle"):
            sent += len(shown_by(bench.receive(pi.topic("status"), pi.status(state))))
            sent += len(shown_by(bench.tick(0.1)))
    assert sent == 0
    bench.receive(pi.topic("status"), pi.status("training"))
    assert [each.topic for each in shown_by(bench.tick(EVERY_S))] == [topics.view(LAB, "pi")]


def test_a_state_is_sent_again_before_home_assistant_doubts_it_and_discovery_is_not(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    topics_sent: list[str] = []
    while len(topics_sent) < 4:
        topics_sent += [each.topic for each in shown_by(bench.tick(EVERY_S))]
    assert sorted(set(topics_sent)) == [topics.view(LAB, AGGREGATOR), topics.view(LAB, "pi")]
    assert bench.now < 1000.0 + 3 * REFRESH_S


def test_everything_is_sent_again_on_a_new_connection(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    before = {topic for topic in bench.retained if is_shown(topic)}
    assert len(before) == 4
    assert {each.topic for each in shown_by(bench.connect())} == before


def test_a_number_that_json_does_not_have_is_none(shown: Make) -> None:
    bench = shown()
    pi = bench.join("pi")
    bench.core.registry.members["pi"].loss = float("inf")
    bench.core.registry.members["pi"].metric = "accuracy", float("nan")
    bench.tick(EVERY_S)
    assert (view(bench, pi.name)["loss"], view(bench, pi.name)["metric"]) == (None, None)


def test_so_many_devices_are_shown_and_no_more(shown: Make) -> None:
    bench = shown(home_assistant__devices_max=2)
    for name in ("c", "a", "b"):
        bench.join(name)
    bench.tick(EVERY_S)
    names = {topic.rpartition("/")[2] for topic in bench.retained if "/view/" in topic}
    assert names == {"a", "b", AGGREGATOR}


def test_a_revoked_device_is_removed_and_its_topics_are_forgotten_once_the_broker_has_taken_that(shown: Make) -> None:
    bench = shown()
    for name in ("pi", "other"):
        bench.join(name)
    bench.tick(EVERY_S)
    bench.revoke("pi")
    cleared = shown_by(bench.tick(EVERY_S))
    mine = {topics.discovery(PREFIX, LAB, "pi"), topics.view(LAB, "pi")}
    assert {each.topic for each in cleared if each.payload == b"" and each.retain} == mine
    assert not mine & bench.retained.keys()
    assert mine <= set(bench.core.awaited)
    (record,) = saved(acknowledge(bench), records.TopicsShown)
    assert isinstance(record, records.TopicsShown)
    assert not mine & set(record.topics)
    assert topics.view(LAB, "other") in record.topics
    assert shown_by(bench.tick(EVERY_S)) == []


def test_a_removal_that_the_broker_has_not_taken_is_repeated_after_a_restart(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    bench.revoke("pi")
    bench.tick(EVERY_S)
    bench.retained[topics.view(LAB, "pi")] = b"{}"  # the connection was lost before
    bench.restart()
    bench.start()
    assert topics.view(LAB, "pi") not in bench.retained


def test_a_device_that_comes_back_before_the_broker_answers_is_shown(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    bench.revoke("pi")
    bench.tick(EVERY_S)
    bench.join("pi")
    bench.tick(EVERY_S)
    assert saved(acknowledge(bench), records.TopicsShown) == []
    assert view(bench, "pi")["state"] == "offline"
    assert configuration_of(bench, "pi")["device"]["name"] == "pi"


def test_turning_it_off_removes_everything_and_it_stays_off(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    reconfigure(bench, home_assistant={"discovery_prefix": ""})
    bench.restart()
    bench.start()
    assert [topic for topic in bench.retained if is_shown(topic)] == []
    (record,) = saved(acknowledge(bench), records.TopicsShown)
    assert record == records.TopicsShown(topics=())
    bench.restart()
    assert shown_by(bench.start()) == []


def test_another_prefix_removes_what_was_below_the_first(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    reconfigure(bench, home_assistant={"discovery_prefix": "ha/discovery"})
    bench.restart()
    bench.start()
    assert [topic for topic in bench.retained if topic.startswith(PREFIX)] == []
    assert configuration_of(bench, "pi", "ha/discovery")["state_topic"] == topics.view(LAB, "pi")
    assert view(bench, "pi")["state"] == "offline"


def test_what_is_to_be_shown_is_on_disk_before_the_broker_has_it(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    actions = bench.tick(EVERY_S)
    first = next(place for place, each in enumerate(actions) if isinstance(each, events.Publish) and "pi" in each.topic)
    assert any(
        isinstance(each, events.Save) and isinstance(each.record, records.TopicsShown) for each in actions[:first]
    )


def test_a_stop_says_that_nothing_more_comes(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.handle(events.StopRequested())
    assert view(bench, AGGREGATOR)["availability"] == "offline"
    assert [each.topic for each in shown_by(bench.last)] == [topics.view(LAB, AGGREGATOR)]


def test_nothing_is_sent_without_a_connection(shown: Make) -> None:
    bench = shown()
    bench.join("pi")
    bench.handle(events.Disconnected())
    assert shown_by(bench.tick(10 * EVERY_S)) == []
    assert shown_by(bench.handle(events.StopRequested())) == []


def test_a_broker_that_refuses_it_is_named_once_and_devices_are_served_all_the_same(shown: Make) -> None:
    bench = shown()
    pi = bench.join("pi")
    lines = [
        each.text
        for topic in (topics.discovery(PREFIX, LAB, "pi"), topics.view(LAB, "pi"), "former/device/lab/pi/config")
        for each in bench.handle(events.Refused(topic=topic, reason="Not authorized"))
        if isinstance(each, events.Log)
    ]
    (line,) = lines
    assert line.startswith("the broker refused homeassistant/device/lab/pi/config: Not authorized")
    assert refusals(bench.handle(events.CountsRequested())) == {"broker-refused": 3}
    assert bench.send(pi, ternary_block(bench.schema, 1), 0)[0].outcome == "accepted"


def test_what_the_broker_refused_is_sent_again_ever_more_rarely_and_then_as_before(shown: Make) -> None:
    """As where the access list is read a moment after the aggregator has connected."""
    bench = shown()
    bench.join("pi")
    bench.tick(EVERY_S)
    config = topics.discovery(PREFIX, LAB, "pi")
    moments: list[float] = []
    while len(moments) < 8:
        bench.handle(events.Refused(topic=config, reason="Not authorized"))
        assert bench.core._retained.shown.due is not None
        bench.now = bench.core._retained.shown.due
        sent = shown_by(bench.tick())
        moments += [bench.now for each in sent if each.topic == config]
    waits = [round(later - earlier) for earlier, later in pairwise(moments)]
    assert waits == [15, 20, 40, 80, 160, 320, 600]
    bench.tick(600.0)
    assert bench.core._retained.shown.due == bench.now + EVERY_S


def test_what_was_said_before_a_restart_is_still_shown(shown: Make) -> None:
    bench = shown(merge__buffer_size=1)
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
    bench.send(pi, ternary_block(bench.schema, 1), 0, metrics={"loss": 0.5})
    bench.receive(judge.topic("metrics"), judge.metrics(1, loss=2.0, accuracy=0.5))
    bench.handle(events.CountsRequested())
    seen = statuses.read(bench.directory)["devices"]["pi"]["seen_at"]
    bench.restart()
    bench.start()
    assert (view(bench, "pi")["loss"], view(bench, "pi")["lag"]) == (0.5, 1)
    assert view(bench, "pi")["seen"] is not None
    assert seen is not None
    assert (view(bench, "judge")["metric"], view(bench, "judge")["metric_name"]) == (0.5, "accuracy")


@pytest.mark.parametrize("prefix", ["ternbus", "ternbus/1", "a b", "home/#", "+", "/a", "a/", "a" * 65, "a/b/c/d/e"])
def test_a_prefix_that_is_none_is_refused_by_name(prefix: str) -> None:
    text = f'federation = "lab"\nbroker = "mqtt://127.0.0.1:1"\n[home_assistant]\ndiscovery_prefix = "{prefix}"\n'
    with pytest.raises(ConfigError, match=r"home_assistant\.discovery_prefix"):
        configuration.parse(text)


@pytest.mark.parametrize("prefix", ["", "homeassistant", "ha/discovery", "ternbus-home"])
def test_a_prefix_may_have_levels(prefix: str) -> None:
    text = f'federation = "lab"\nbroker = "mqtt://127.0.0.1:1"\n[home_assistant]\ndiscovery_prefix = "{prefix}"\n'
    assert configuration.parse(text).home_assistant.discovery_prefix == prefix
