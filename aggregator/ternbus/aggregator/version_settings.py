"""The section [versions] of aggregator.toml: which versions of the model can still be had."""

from dataclasses import dataclass

from ternbus.aggregator.sections import key


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSettings:
    """How many versions are kept, besides those with a tag."""

    keep: int = key(0, "number of the newest versions kept, to export or to go back to; 0 = downlink.slots", low=0)
    keep_best: int = key(
        0,
        "number of versions kept beside them: those with the best metric of the first evaluator, in DIR/tagged",
        low=0,
        high=1000,
    )
