"""The settings in aggregator.toml: each key with its default, meaning and check."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from ternbus.aggregator import plan_settings
from ternbus.aggregator.home_assistant_settings import HomeAssistantSettings
from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.private_settings import PRIVATE_DOC, PrivateSettings, plan_with_codec
from ternbus.aggregator.search_settings import SEARCH_DOC, SearchSettings
from ternbus.aggregator.sections import key, section
from ternbus.aggregator.transport_settings import TransportSettings
from ternbus.aggregator.version_settings import CanarySettings, VersionSettings
from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys, topics
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_RANGE
from ternbus.broker.protocol.identity import check_federation
from ternbus.broker.protocol.invitation import check_broker_url
from ternbus.broker.protocol.ternary import CODECS

OPTIMIZERS: Final = ("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
RULES: Final = ("mean", "median", "trimmed-mean", "krum", "multi-krum", "norm-clip")
SEALED_DEVICES_MIN: Final = 2  # in a merge: the delta of a single update shows what its box hid
LEARNING_RATE: Final = 0.01
DISCOUNTS: Final = ("polynomial", "constant", "hinge", "exponential")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSettings:
    """When updates are merged, and how much any of them may weigh."""

    buffer_size: int = key(4, "number of updates in one merge", low=1, high=1_000_000)
    max_wait_s: float = key(30.0, "seconds after its first update until a smaller buffer is merged", low=0.01, high=1e7)
    min_devices: int = key(
        0,
        "smallest number of distinct devices in one merge; updates of fewer wait; "
        "0 = automatic: 2 if plan.seal is true, else 1",
        low=0,
        high=1_000_000,
    )
    max_update_norm: float = key(0.0, "largest L2 norm of an update; 0 = no limit", low=0)
    on_large: str = key(
        "clip",
        "what happens to longer updates. clip: scaled down to it; refuse: answered `invalid`",
        one_of=("clip", "refuse"),
    )
    influence_bound: str = key(
        "none",
        "limit of one update's norm and samples. adaptive: a few times the usual of the newest merged updates; none: "
        "no limit",
        one_of=("none", "adaptive"),
    )
    max_share: float = key(1.0, "largest share of a buffer's samples for one device (rule mean)", low=1e-6, high=1)
    rule: str = key(
        "mean",
        "mean: weighted by samples; median, trimmed-mean, krum, multi-krum, norm-clip: robust, each device counts once",
        one_of=RULES,
    )
    trim: float = key(0.2, "share of the devices left out at each end (rule trimmed-mean)", low=0, high=0.49)
    byzantine: int = key(
        1,
        "number of hostile devices tolerated, of at least 2 byzantine + 3 (rules krum, multi-krum)",
        low=0,
        high=100_000,
    )
    krum_keep: int = key(
        0, "number of devices averaged (rule multi-krum); 0 = all but byzantine", low=0, high=1_000_000
    )
    clip_norm: float = key(0.0, "largest L2 norm of a device's update (rule norm-clip); 0 = the buffer's median", low=0)

    @property
    def is_bounded(self) -> bool:
        """Whether one update's influence is (``influence_bound``)."""
        return self.influence_bound == "adaptive"


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessSettings:
    """How old an update may be, and what it is then worth."""

    max: int = key(
        8,
        "largest number of versions between an update's base and the head; older ones are answered `stale`",
        low=0,
    )
    discount: str = key(
        "polynomial",
        "polynomial: (1 + staleness)^-exponent; constant: 1; exponential: exp(-decay * staleness); "
        "hinge: 1 up to hinge_from, then 1 / (1 + hinge_slope * (staleness - hinge_from))",
        one_of=DISCOUNTS,
    )
    exponent: float = key(0.5, "exponent of the polynomial discount", low=0, high=100)
    decay: float = key(0.5, "rate of the exponential discount", low=0, high=100)
    hinge_slope: float = key(1.0, "slope of the hinge", low=0, high=1e6)
    hinge_from: int = key(2, "largest staleness without a discount under the hinge", low=0, high=1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How far the model follows a merge."""

    name: str = key("fedavg", "fedavg, fedavgm (server momentum), fedadagrad, fedadam or fedyogi", one_of=OPTIMIZERS)
    learning_rate: float = key(
        1.0, "learning rate of the server; about 0.01 to 0.1 for fedadagrad, fedadam and fedyogi", low=0, high=1e6
    )
    momentum: float = key(0.9, "momentum of fedavgm", low=0, high=0.9999)
    beta1: float = key(
        0.9,
        "decay of the first moment (fedadam, fedyogi, fedadagrad); 0 = plain fedadagrad",
        low=0,
        high=0.9999,
    )
    beta2: float = key(0.99, "decay of the second moment (fedadam, fedyogi)", low=0, high=0.999999)
    tau: float = key(
        1e-3, "degree of adaptivity of the same three; smaller values adapt more to each parameter", low=1e-9, high=1e3
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DownlinkSettings:
    """How the model travels to the devices."""

    codec: str = key("ternary", "codec of the deltas: ternary, with error feedback; or float32", one_of=CODECS)
    min_interval_s: float = key(
        0.0, "shortest time between two versions, in s; updates wait, at most merge.max_wait_s", low=0, high=1e6
    )
    slots: int = key(
        32, "number of deltas retained on the broker; a device further behind fetches a snapshot", low=1, high=65_535
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What a peer can make this aggregator hold or do."""

    direct_parts: int = key(
        8, "largest number of parts of an update that is sent without a grant (more if the model needs more)", low=4
    )
    frames_per_s: int = key(500, "frames accepted from one device per second; more are dropped and counted", low=500)
    broker_queue_messages: int = key(4000, "length of the broker's queue for the aggregator, in messages", low=100)
    frame_bytes: int = key(
        FRAME_BYTES, "largest MQTT payload sent, in bytes; devices may send as large ones",
        low=FRAME_BYTES_RANGE[0], high=FRAME_BYTES_RANGE[1],
    )  # fmt: skip
    assembly_bytes: int = key(
        256 * 2**20, "bytes of all updates of several parts that devices are sending; three always fit", low=2**20
    )
    receipts_per_s: int = key(
        100, "receipts to one device per second; frames that need more are dropped before they are read", low=10
    )
    refusals_per_s: int = key(20, "receipts `refused` per second to all names together that are not invited", low=1)
    enrolments_per_minute: int = key(
        60, "enrollment attempts of one invited name per minute; more are dropped before they are read", low=1
    )
    journal_bytes: int = key(
        2**28, "bytes of one device's updates that wait for a merge; one update always fits", low=0
    )
    metrics_bytes: int = key(2**24, "bytes of one device's evaluations, which are kept for good", low=1024)
    log_lines_per_minute: int = key(
        6, "log lines per minute about messages refused for one reason; all are counted", low=1
    )
    work_bytes_per_s: int = key(
        2**27,
        "bytes decoded per second for all devices, in fair shares; a device beyond its share waits for the others",
        low=2**20,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InvitationSettings:
    """How long an invitation stands open."""

    expire_after_s: float = key(
        7 * 86_400.0, "lifetime of an invitation, in seconds, without `invite --expires-in`; 7 days", low=1, high=1e9
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole file."""

    federation: str
    broker: str
    merge: MergeSettings = field(default_factory=MergeSettings)
    staleness: StalenessSettings = field(default_factory=StalenessSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    downlink: DownlinkSettings = field(default_factory=DownlinkSettings)
    versions: VersionSettings = field(default_factory=VersionSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    invitations: InvitationSettings = field(default_factory=InvitationSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    home_assistant: HomeAssistantSettings = field(default_factory=HomeAssistantSettings)
    plan: Mapping[str, Any] = field(default_factory=dict)
    plan_check: PlanCheck | None = None
    private: PrivateSettings | None = None
    search: SearchSettings | None = None

    @property
    def published_plan(self) -> Mapping[str, Any]:
        """What the head tells devices."""
        return plan_settings.published(self.plan, self.plan_check, self.staleness.max)

    @property
    def warnings(self) -> list[str]:
        """What is doubtful in a plan that an earlier version wrote, without a table to check it by."""
        return [] if self.plan_check is not None else [f"plan.{each}" for each in plan_settings.doubts(self.plan, None)]

    @property
    def _whole_plan(self) -> Mapping[str, Any]:
        """The task's plan, and over it what the settings state."""
        return {**({} if self.plan_check is None else self.plan_check.default_plan), **self.plan}

    @property
    def learning_rate(self) -> float:
        """Of the devices, where the plan or the task states one; else a usual one."""
        return float(self._whole_plan.get("learning_rate") or LEARNING_RATE)

    @property
    def is_dp(self) -> bool:
        """Whether devices add noise: then nothing else of their data may show."""
        return self.noise_of_plan[0] != plan_keys.NO_DP

    @property
    def epsilon(self) -> float:
        """After which devices stop, by the plan; of an owner's own limit nothing is known here."""
        return float(self._whole_plan.get("dp_epsilon", 0.0))

    @property
    def noise_of_plan(self) -> tuple[str, float]:
        """The `dp` of the plan or the task, and its noise multiplier."""
        return str(self._whole_plan.get("dp", plan_keys.NO_DP)), float(self._whole_plan.get("dp_noise", 0.0))

    @property
    def sum_noise(self) -> tuple[float, float]:
        """θ and B of `dp = "sum"`, of the plan or the task; 0 and 0 for another `dp`."""
        theta, norm = (float(self._whole_plan.get(name, 0.0)) for name in ("dp_theta", "dp_norm"))
        return (theta, norm) if self.noise_of_plan[0] == plan_keys.SUM else (0.0, 0.0)

    @property
    def min_devices(self) -> int:
        """How many distinct devices a merge has at least: a version of one sealed update would show that update."""
        return self.merge.min_devices or (SEALED_DEVICES_MIN if self.plan.get("seal") else 1)


# What a new federation begins with where its operator chooses nothing; a file without these keys keeps the defaults.
NEW_HOME: Final[Mapping[str, object]] = {
    "merge.influence_bound": "adaptive", "plan_check.allowed_keys": (), "versions.keep_best": 1,
}  # fmt: skip


def new_home(chosen: Mapping[str, object]) -> dict[str, object]:
    """The settings of a new federation, with dotted keys, from those that were chosen."""
    return {**NEW_HOME, **with_private(chosen)}


def with_private(chosen: Mapping[str, object]) -> dict[str, object]:
    """The chosen settings, with dotted keys, and what goes with private sums if there are any.

    With these no update's influence can be bounded, and a merge is as large as its sums, with room for them.
    """
    about = {name: value for name, value in chosen.items() if name.startswith("private.")}
    private = PrivateSettings.from_table(with_overrides({}, about).get("private"), "private")
    if private is None:
        return dict(chosen)
    size = min(2 * private.min, private.devices_max)
    return {"merge.influence_bound": "none", "merge.buffer_size": size, **chosen}


SECTIONS: Final[Mapping[str, type]] = {
    "merge": MergeSettings,
    "staleness": StalenessSettings,
    "optimizer": OptimizerSettings,
    "downlink": DownlinkSettings,
    "versions": VersionSettings,
    "canary": CanarySettings,
    "limits": LimitSettings,
    "invitations": InvitationSettings,
    "transport": TransportSettings,
    "home_assistant": HomeAssistantSettings,
}
RETIRED: Final[Mapping[str, frozenset[str]]] = {"limits": frozenset({"messages_in_assembly"})}  # of older files
OTHERS: Final = ("plan", "plan_check", "private", "search")  # sections that are read by their own rules


def parse(text: str, source: str = "aggregator.toml") -> Settings:
    """Read and check the file's text; ConfigError names the key that is wrong and what it may be."""
    return from_table(toml.loads(text, source), source)


def from_table(table: Mapping[str, Any], source: str = "aggregator.toml") -> Settings:
    """Check a table of sections, as TOML gives it."""
    unknown = sorted(set(table) - {"federation", "broker", *OTHERS, *SECTIONS})
    if unknown:
        raise ConfigError(f"{source}: unknown key {unknown[0]!r}; known are {', '.join((*SECTIONS, *OTHERS))}")
    for name in ("federation", "broker"):
        if name not in table:
            raise ConfigError(f"{source}: {name!r} is missing; add it, or restore the file from a backup")
        if not isinstance(table[name], str):
            raise ConfigError(f"{source}: {name!r} must be a string")
    sections = {
        name: section(kind, table.get(name, {}), f"{source}: {name}", RETIRED.get(name, frozenset()))
        for name, kind in SECTIONS.items()
    }
    check = PlanCheck.from_table(table.get("plan_check"), f"{source}: plan_check")
    plan = plan_settings.read(table.get("plan", {}), check, f"{source}: plan")
    private = PrivateSettings.from_table(table.get("private"), f"{source}: private")
    plan = plan_with_codec(plan, private, f"{source}: plan")
    _check_merge(sections["merge"], f"{source}: merge", seal=bool(plan.get("seal")))
    if (prefix := sections["home_assistant"].discovery_prefix) and not topics.is_discovery_prefix(prefix):
        where = f"{source}: home_assistant.discovery_prefix = {prefix!r}"
        raise ConfigError(f"{where} must be levels of a topic, of a-z, A-Z, 0-9, '_' and '-', and not ternbus")
    if private is not None:
        private.check_merge(sections["merge"], f"{source}: merge")
    sections["canary"].check(f"{source}: canary", is_private=private is not None)
    made = Settings(
        federation=check_federation(table["federation"]),
        broker=check_broker_url(table["broker"]),
        plan=plan,
        plan_check=check,
        private=private,
        search=SearchSettings.from_table(table.get("search"), f"{source}: search"),
        **sections,
    )
    made.transport.check(made.broker, f"{source}: transport.no_tls = true")
    if made.search is not None:
        made.search.check(plan, f"{source}: search", is_private=private is not None, dp=made.noise_of_plan[0])
    return made


def _check_merge(about: MergeSettings, where: str, *, seal: bool) -> None:
    """Refuse what each key allows by itself and the rule, or a plan that seals updates, does not."""
    size, rule = about.buffer_size, about.rule
    shows = "with plan.seal = true makes a version of one sealed update, and shows it: choose merge"
    if seal and 0 < about.min_devices < SEALED_DEVICES_MIN:
        raise ConfigError(
            f"{where}.min_devices = 1 {shows}.min_devices = 0 (automatic) or at least {SEALED_DEVICES_MIN}"
        )
    if seal and (rule == "krum" or (rule == "multi-krum" and about.krum_keep == 1)):
        raise ConfigError(f'{where}.rule = "{rule}" {shows}.rule = "multi-krum" with krum_keep = 0 or at least 2')
    if about.on_large == "refuse" and about.max_update_norm == 0:
        raise ConfigError(
            f'{where}.on_large = "refuse" has no effect while max_update_norm is 0: set {where}.max_update_norm'
        )
    if about.max_share < 1 and rule != "mean":
        raise ConfigError(
            f'{where}.max_share applies to rule = "mean" only: "{rule}" counts each device once; leave it out'
        )
    if rule in ("krum", "multi-krum") and size < 2 * about.byzantine + 3:
        raise ConfigError(
            f'{where}.rule = "{rule}" with byzantine = {about.byzantine} needs a buffer_size of at least '
            f"{2 * about.byzantine + 3} (2 byzantine + 3), not {size}"
        )
    if rule == "multi-krum" and about.krum_keep > size - about.byzantine:
        raise ConfigError(
            f"{where}.krum_keep = {about.krum_keep} must be at most {size - about.byzantine} (buffer_size - byzantine)"
        )
    if rule == "trimmed-mean" and 2 * math.ceil(about.trim * size - 1e-9) >= size:
        raise ConfigError(
            f"{where}.trim = {about.trim:g} trims everything of a buffer_size of {size}: "
            "use a smaller trim or a larger buffer_size"
        )


def with_overrides(table: dict[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    """The table with dotted keys such as ``merge.buffer_size`` set."""
    for dotted, value in overrides.items():
        section, dot, key = dotted.partition(".")
        if not dot or not key or "." in key:
            raise ConfigError(f"invalid --set {dotted}: write SECTION.KEY=VALUE, for example merge.buffer_size=1")
        if not isinstance(table.setdefault(section, {}), dict):
            raise ConfigError(f"--set {dotted}: unknown section {section!r}; known are {', '.join(SECTIONS)}, plan")
        table[section][key] = value
    return table


def dumps(settings: Settings) -> str:
    """The file's text: every key, its value, and what it means."""
    heading = "A Ternbus aggregator. Changes are in force after a restart; what is wrong is refused by name at start."
    comments: dict[toml.Place, str] = {
        (): heading,
        ("plan",): plan_settings.PLAN_DOC,
        ("plan_check",): plan_settings.CHECK_DOC,
        ("private",): PRIVATE_DOC,
        ("search",): SEARCH_DOC,
    }
    more = {"plan_check": PlanCheck, "private": PrivateSettings, "search": SearchSettings}
    for name, kind in {**SECTIONS, **more}.items():
        comments |= {(name, entry.name): entry.metadata.get("doc", "") for entry in fields(kind)}
    return toml.dumps({name: value for name, value in asdict(settings).items() if value is not None}, comments)
