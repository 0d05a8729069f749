"""The cost of private sums for device, helper and aggregator, beside the bare parts and beside plain updates.

    python -m benchmarks.private_sums [--json] [--parameters 1200000] [--updates 480] [--engine auto]

A device masks a model's update (median CPU time of one thread), a helper opens a sum of 16, and an aggregator takes in
updates of 6 bits a value on a real broker and disk, while a real helper opens their sums. Broker, aggregator, helper
and senders share the machine. `benchmarks.merge_costs` compares kinds of updates.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import nacl.bindings
import numpy as np

from benchmarks import homes
from benchmarks.ingest import FEDERATION, percentile, rate, shapes
from benchmarks.program import cpu_ms, cpu_s, one_thread, options, print_result, resident_mb, wait_until
from benchmarks.sender import PUBLISH, SENDERS, Line, Load, Target, device, identity, run_load
from ternbus.aggregator.store import status as statuses
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import FRAME_BYTES, parse
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.parts import Whole, cut, message_digest, whole
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import ZSTD, encode
from ternbus.broker.server.running import Engine, choose, start
from ternbus.broker.sums import masks
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.sets import OPEN, PREPARE, Ask, AskStep, SetMember, set_digest
from ternbus.broker.sums.terms import AGGREGATOR, MASK, Terms, context, digest_of
from ternbus.edge.core.masking import prepare_private
from ternbus.edge.core.profile import Profile
from ternbus.edge.learn import private_sum
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.sum_content import SumContent, SumJob
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.helper.core.answers import Answers
from ternbus.helper.core.profile import Profile as HelperProfile
from ternbus.helper.core.records import MemoryRecords
from ternbus.helper.core.state import State

DEVICES: Final = 16  # in a sum that a helper opens
BITS_HERE: Final = 6
BUFFER: Final = 31  # of updates of 6 bits: as many as a sum holds
LEAST: Final = 5  # devices in a sum
WITHIN_S: Final = 120.0


@dataclass(frozen=True)
class Federation:
    """A schema, an aggregator's and a helper's keys, and terms by them; all without a network."""

    parameters: int
    bits: int = BITS_HERE

    @cached_property
    def aggregator(self) -> Identity:
        return Identity(b"a" * 32)

    @cached_property
    def schema(self) -> Schema:
        return Schema.of(shapes(self.parameters))

    @cached_property
    def state(self) -> State:
        return State.new(os.urandom, 0.0)

    @cached_property
    def helper(self) -> HelperProfile:
        return HelperProfile(
            federation=FEDERATION, helper=homes.HELPER, identity=Identity(b"h" * 32), random=os.urandom, min=2,
            aggregator_public=self.aggregator.public, roster=AGGREGATOR,
        )  # fmt: skip

    @cached_property
    def terms(self) -> Terms:
        return Terms(
            kind=MASK, bits=self.bits, levels=1, helpers=(self.helper.card(self.state.box_key),), min=2, samples=0.0,
            ternary=self.schema.ternary_elements, dense=self.schema.dense_elements,
            scales=(0.002,) * len(self.schema.tensors),
        )  # fmt: skip

    @cached_property
    def job(self) -> SumJob:
        digest = digest_of(self.terms.content())
        return SumJob(terms=self.terms, context=context(version=0, model=bytes(32), plan=bytes(32), terms=digest))

    @cached_property
    def change(self) -> Any:
        return np.random.default_rng(0).normal(0.0, 0.001, self.schema.elements).astype(np.float32)

    def encoded(self) -> SumContent:
        return private_sum.encode(self.schema, self.terms, Plan(), self.change, samples=1, random_source=RandomSource())


def frames_of(
    number: int,
    job: SumJob,
    content: SumContent,
    aggregator: bytes,
    *,
    seq: int = 1,
    base: int = 0,
    frame_bytes: int = FRAME_BYTES,
) -> list[bytes]:
    """The frames of a device's private update, made by the device's own code."""
    pins = SumPolicy(helpers=tuple(each.card.public for each in job.terms.helpers), min=2, kind=job.terms.kind)
    profile = Profile(
        federation=FEDERATION, device=device(number), identity=identity(number), aggregator_public=aggregator,
        seal=lambda plain: seal(aggregator, plain), role="train", sums=pins,
    )  # fmt: skip
    update = prepare_private(content, job, profile, seq=seq, base=base, metrics={}, frame_bytes=frame_bytes)
    return [each.payload for each in profile.update(update)]


def measure_device(about: Federation) -> dict[str, float]:
    """CPU of one update: draws, mask, seal and signatures; and ChaCha20's stream alone."""
    layout, content, key = about.terms.layout, about.encoded(), identity(0).public
    words, card = layout.read(content.words), about.terms.helpers[0].card
    fresh, masked = {"context": about.job.context, "device": key}, content.words

    def mask() -> None:
        seed = masks.seed_of(words, os.urandom(32))
        masks.masked(layout, words, [(card.public, seed)], **fresh)
        masks.box(card.box_key, seed, helper=card.public, seq=1, **fresh)

    nonce, zeros = bytes(12), bytes(8 * layout.words)
    return {
        "draw_ms": cpu_ms(about.encoded),
        "mask_ms": cpu_ms(mask),
        "seal_ms": cpu_ms(lambda: seal(about.aggregator.public, masked)),
        "whole_ms": cpu_ms(lambda: frames_of(0, about.job, about.encoded(), about.aggregator.public)),
        "plain_ms": cpu_ms(lambda: plain_frames(about, ZSTD)),
        "stream_ms": cpu_ms(
            lambda: nacl.bindings.crypto_aead_chacha20poly1305_ietf_encrypt(zeros, None, nonce, bytes(32))
        ),
    }


def plain_frames(about: Federation, encoding: str, codec: str = "", *, number: int = 0, base: int = 0) -> list[bytes]:
    """The frames of the same change as a plain update of this device, the first on its base."""
    block = compress(about.schema, Plan(codec=codec) if codec else Plan(), about.change, None, 0).block
    message = Update(base=base, samples=1, codec=block.codec, encoding=encoding, sealed=False)
    return cut(
        identity(number), federation=FEDERATION, sender=device(number), kind=Update.KIND, seq=base + 1,
        meta=message.meta(), body=encode(block.content, encoding), frame_bytes=FRAME_BYTES,
    )  # fmt: skip


def measure_helper(about: Federation) -> dict[str, float]:
    """CPU of a helper's two steps for a sum; and of making the masks alone."""
    content, terms = about.encoded(), about.terms
    firsts = [parse(frames_of(number, about.job, content, about.aggregator.public)[0]) for number in range(DEVICES)]
    members = tuple(SetMember.of(identity(number).public, frame) for number, frame in enumerate(firsts))
    ask = Ask(version=0, model=bytes(32), plan=bytes(32), terms=terms.content(), members=members)
    digest = set_digest(ask.context, {frame.sender: each.digest for frame, each in zip(firsts, members, strict=True)})
    records_of = MemoryRecords(roster=AGGREGATOR)
    answers = Answers(profile=about.helper, records=records_of)

    def step(name: str) -> Any:
        meta = AskStep(step=name, set=digest, count=0).meta()
        frames = cut(
            about.aggregator, federation=FEDERATION, sender="aggregator", kind=AskStep.KIND, seq=1, meta=meta,
            body=ask.content(), frame_bytes=2**20,
        )  # fmt: skip
        asked: Whole = whole(parse(frames[0]))
        return answers.reply(asked, about.state, 0.0)

    prepared = cpu_ms(lambda: step(PREPARE))
    reply = step(PREPARE)
    records_of.write(reply.step)
    assert step(OPEN).answer.outcome == "opened", step(OPEN).answer

    def all_masks() -> None:
        total = terms.layout.zeros()
        for number in range(DEVICES):
            own = {"context": about.job.context, "device": identity(number).public, "helper": bytes(32)}
            terms.layout.add(total, masks.mask(terms.layout, bytes(32), **own))

    return {"prepare_ms": prepared, "open_ms": cpu_ms(lambda: step(OPEN)), "masks_ms": cpu_ms(all_masks)}


def bare_ingest(about: Federation, folder: Path) -> dict[str, float]:
    """CPU of what every aggregator must do with an update before its receipt: verify, hash, unseal, append."""
    frames = frames_of(0, about.job, about.encoded(), about.aggregator.public)
    parts = [parse(frame) for frame in frames]
    body = b"".join(part.body for part in parts)

    def verify() -> None:
        for part in parts:
            part.check_authentic(identity(0).public)

    with (folder / "journal").open("wb") as journal:
        return {
            "verify_ms": cpu_ms(verify),
            "hash_ms": cpu_ms(lambda: (message_digest(part.header for part in parts), blake2b(body).digest())),
            "unseal_ms": cpu_ms(lambda: about.aggregator.unseal(body)),
            "write_ms": cpu_ms(lambda: journal.write(body)),
        }


@dataclass(frozen=True, slots=True)
class PrivateTarget(Target):
    """A federation with private sums, and the words of every update."""

    terms: bytes
    context: bytes
    aggregator: bytes
    base: int

    def frames(self, number: int, frame_bytes: int) -> list[bytes]:
        terms = Terms.parse(self.terms)
        seeds = tuple(masks.seed_of(terms.layout.read(self.body), os.urandom(32)) for _ in terms.helpers)
        content = SumContent(words=self.body, seeds=seeds)
        return frames_of(
            number,
            SumJob(terms=terms, context=self.context),
            content,
            self.aggregator,
            base=self.base,
            frame_bytes=frame_bytes,
        )


def retained(about: Target, topic: str, wanted: Callable[[Any], bool]) -> Any:
    """A frame on this topic that is as wanted, as soon as there is one."""
    line, until = Line(about, "looks"), time.monotonic() + WITHIN_S
    line.subscribe(topic)
    while time.monotonic() < until:
        for kind, body in line.packets():
            if kind >> 4 == PUBLISH:
                start = 2 + int.from_bytes(body[:2], "big") + (2 if kind & 6 else 0)
                if wanted(frame := parse(body[start:])):
                    line.socket.close()
                    return frame
    raise TimeoutError(topic)


def target_of(about: Target, aggregator: bytes, parameters: int) -> PrivateTarget:
    """What senders need, by what the aggregator has published."""
    head = retained(about, topics.head(FEDERATION), lambda frame: "terms" in Head.from_meta(frame.meta).plan)
    message = Head.from_meta(head.meta)
    terms = retained(about, topics.terms(FEDERATION, 0), lambda frame: frame.parts == 1).body
    made = context(
        version=message.version, model=message.digest, plan=digest_of(plan_bytes(head.meta_bytes)),
        terms=digest_of(terms),
    )  # fmt: skip
    schema = Schema.of(shapes(parameters))
    change = np.random.default_rng(0).normal(0.0, 0.001, schema.elements).astype(np.float32)
    content = private_sum.encode(schema, Terms.parse(terms), Plan(), change, samples=1, random_source=RandomSource())
    return PrivateTarget(
        about.host, about.port, FEDERATION, "private", content.words, terms, made, aggregator, message.version
    )


def measure_ingest(parameters: int, updates: int, engine: Engine, folder: Path) -> dict[str, Any]:
    """Receipts per second for private updates, and seconds until all are merged."""
    load = Load(parameters=parameters, updates=updates, window=16, frame_bytes=FRAME_BYTES)
    settings: dict[str, object] = {
        "private.bits": BITS_HERE, "private.min": LEAST, "merge.buffer_size": BUFFER, "merge.max_wait_s": 5,
        "staleness.max": 1_000_000, "staleness.discount": "constant",
    }  # fmt: skip
    with start(choose(engine), host="127.0.0.1", port=0, directory=folder / "broker") as broker:
        about = Target(broker.endpoint.host, broker.endpoint.port, FEDERATION, "", b"")
        made = homes.make(
            folder, broker.url, parameters=parameters, devices=updates, settings=settings, private=True
        )  # fmt: skip
        with made.running() as processes:
            target = target_of(about, made.aggregator_public, parameters)
            before = [cpu_s(process.pid) for process in processes]
            answered = run_load(target, load)
            counts = _merged_counts(made.aggregator, updates)
            spent = [cpu_s(process.pid) - cpu for process, cpu in zip(processes, before, strict=True)]
            peak = resident_mb(processes[0].pid)
    return {
        "updates_per_s": rate(answered),
        "p50_ms": percentile(answered, 0.5),
        "p99_ms": percentile(answered, 0.99),
        "window": load.window,
        "counts": counts,
        "aggregator_cpu_ms": 1000 * spent[0] / updates,
        "helper_cpu_ms": 1000 * spent[1] / updates,
        "peak_mb": peak,
        "versions": statuses.read(made.aggregator)["version"],
    }


def _merged_counts(directory: Path, updates: int) -> dict[str, int]:
    """Wait until no more can be merged; how many are. The last few may be too few for a sum, and wait for company."""

    def are_settled() -> bool:
        counts = statuses.read(directory)["counts"]
        return bool(counts["merged"] + counts["dropped"] > updates - LEAST)

    wait_until(are_settled, f"more than {updates - LEAST} of {updates} updates merged or dropped", WITHIN_S)
    counts = statuses.read(directory)["counts"]
    return {name: counts[name] for name in ("accepted", "merged", "dropped")}


def show(found: Mapping[str, Any]) -> None:
    """Print a line for each figure."""
    for name, value in found.items():
        print(f"{name}: {value}")


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, Engine)
    parser.add_argument("--parameters", type=int, default=1_200_000, help="size of the model")
    parser.add_argument("--updates", type=int, default=480, help="updates that the aggregator takes in")
    given = parser.parse_args()
    one_thread()
    about = Federation(given.parameters)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "parameters": about.schema.elements,
            "bits": BITS_HERE,
            "sum": DEVICES,
            "senders": SENDERS,
            "device": measure_device(about),
            "helper": measure_helper(about),
            "bare": bare_ingest(about, Path(folder)),
            "ingest": measure_ingest(given.parameters, given.updates, given.engine, Path(folder)),
        }
    print_result(found, as_json=given.json, show=lambda: show(found))


if __name__ == "__main__":
    main()
