"""The section [private] of aggregator.toml: the helpers and parameters of private sums."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ternbus.aggregator.sections import key, section
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import check_helper, is_public_key
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.broker.protocol.plan_keys import DEVICE, SAMPLE, SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import bfv
from ternbus.broker.sums.terms import BFV, HELPERS_MAX, KINDS, MASK
from ternbus.broker.sums.words import BITS, DEVICES_MAX, Layout

PRIVATE_DOC: Final = """\
Private sums: no single update is ever seen, only sums of at least min devices, which the helpers open together.
Devices need `ternbus edge join --private`; see docs/private-sums.md.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateSettings:
    """What terms are made of; ``helpers`` are public keys by name, 64 hex digits each."""

    helpers: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"doc": "helpers by name, each with its public key, as in its card.toml; all must open each sum"},
    )
    kind: str = key(
        MASK,
        f"{MASK}: sums of masked updates, opened by helpers; or {BFV}: of encrypted ones, only where all parties "
        "follow the protocol",
        one_of=KINDS,
    )
    bits: int = key(
        6, f"bits of a ternary value in a sum: {', '.join(map(str, BITS))}; more hold larger sums", one_of=BITS
    )
    levels: int = key(1, "ternary values are from -levels to levels", low=1, high=127)
    min: int = key(5, "smallest number of devices in a sum", low=2, high=DEVICES_MAX)
    samples: float = key(
        0.0, "number of samples with which an update weighs 1, others 1/4 to 1; 0 = all weigh the same", low=0
    )
    close_wait_s: float = key(
        600.0,
        "seconds that a federation waits for helpers when it is closed; then it drops what is not open",
        low=0,
        high=1e7,
    )

    @property
    def devices_max(self) -> int:
        """The largest number of devices in a sum."""
        return Layout(bits=self.bits, ternary=1, dense=0, tensors=1).sum_max(self.levels)

    @property
    def public_keys(self) -> dict[str, bytes]:
        return {name: bytes.fromhex(text) for name, text in self.helpers.items()}

    @classmethod
    def from_table(cls, table: object, where: str) -> "PrivateSettings | None":
        """Of the table in aggregator.toml; None where it is absent, or has no helpers. Raises `ConfigError`."""
        if table is None:
            return None
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} must be a table")
        rest = {name: value for name, value in table.items() if name != "helpers"}
        found: PrivateSettings = section(cls, rest, where)
        helpers = _helpers(table.get("helpers", {}), f"{where}.helpers")
        if not helpers:
            if rest:
                raise ConfigError(f"{where} has no helpers: add {where}.helpers, or leave the section out")
            return None
        if found.kind == BFV and len(helpers) > 1:
            raise ConfigError(
                f'{where}.kind = "{BFV}" takes one helper, which holds the key, and {where}.helpers names '
                f"{len(helpers)}: name one"
            )
        if found.min > found.devices_max:
            raise ConfigError(
                f"{where}.min = {found.min}: {found.bits} bits with levels = {found.levels} hold sums of at most "
                f"{found.devices_max} devices; use more bits, fewer levels or a smaller min"
            )
        return replace(found, helpers=helpers)

    def check_model(self, schema: Schema) -> None:
        """Refuse a model that is too large for encrypted sums, and a machine without TenSEAL; ConfigError says why."""
        if self.kind != BFV:
            return
        bfv.require()
        if schema.elements > bfv.ELEMENTS_MAX:
            raise ConfigError(
                f'private.kind = "{BFV}" is for linear models and heads of at most {bfv.ELEMENTS_MAX:,} parameters, '
                f'and the model has {schema.elements:,}: use kind = "{MASK}"'
            )

    def check_merge(self, about: Any, where: str) -> None:
        """Refuse settings of [merge] that do not go with private sums; ConfigError says why."""
        unseen = "private sums do not go with it, since no single update is seen"
        if about.rule != "mean":
            raise ConfigError(f'{where}.rule = "{about.rule}": {unseen}; use rule = "mean"')
        if about.max_update_norm > 0:
            raise ConfigError(
                f"{where}.max_update_norm = {about.max_update_norm:g}: {unseen}, nor its norm; set it to 0"
            )
        if about.max_share < 1:
            raise ConfigError(
                f"{where}.max_share = {about.max_share:g}: {unseen}, nor its samples; set it to 1. In a private "
                "sum no device weighs more than 4 times another"
            )
        if about.is_bounded:
            raise ConfigError(
                f'{where}.influence_bound = "adaptive": {unseen}, nor its norm; use influence_bound = "none". '
                "The terms bound what each device can add"
            )
        if about.buffer_size > self.devices_max:
            raise ConfigError(
                f"{where}.buffer_size = {about.buffer_size}: {self.bits} bits with levels = {self.levels} hold sums of "
                f"at most {self.devices_max} devices; use a buffer_size of {self.devices_max} or less, or more "
                "private.bits"
            )
        if about.buffer_size < self.min:
            raise ConfigError(
                f"{where}.buffer_size = {about.buffer_size}: a sum is of at least private.min = {self.min} devices; "
                f"use a buffer_size of {self.min} or more, or a smaller private.min"
            )


def plan_with_codec(plan: Mapping[str, Any], private: PrivateSettings | None, where: str) -> dict[str, Any]:
    """The plan with the codec of private sums, if the federation has these; ConfigError for another one."""
    codec = plan.get("codec")
    if private is None:
        if codec == PRIVATE:
            raise ConfigError(
                f'{where}.codec = "{PRIVATE}" needs helpers: make the federation with `ternbus aggregator init '
                "--private --helper FILE`, or use another codec"
            )
        if plan.get("dp") == SUM:
            raise ConfigError(
                f'{where}.dp = "{SUM}" needs private sums, whose draws are the noise: make the federation with '
                f'`ternbus aggregator init --private --helper FILE`, or use dp = "{DEVICE}" or "{SAMPLE}"'
            )
        return dict(plan)
    if codec not in (None, PRIVATE):
        raise ConfigError(
            f'{where}.codec = "{codec}": with private.helpers devices send nothing but private updates; use '
            f'"{PRIVATE}", or leave it out'
        )
    return {**plan, "codec": PRIVATE}


def _helpers(table: object, where: str) -> dict[str, str]:
    if not isinstance(table, Mapping) or len(table) > HELPERS_MAX:
        raise ConfigError(f"{where} must be a table of at most {HELPERS_MAX} names, each with a public key")
    for name, text in table.items():
        check_helper(name)
        if not isinstance(text, str) or not is_public_key(text):
            raise ConfigError(f"{where}.{name} is not a public key of 64 hex digits, as in the helper's card.toml")
    if len({text.lower() for text in table.values()}) != len(table):
        raise ConfigError(f"{where}: two helpers have the same key")
    return {name: text.lower() for name, text in table.items()}
