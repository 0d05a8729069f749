"""Statistics are averaged and no variance is below 0: what is published is what a plain reader can use."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from support.small_world import Bench, accepted_update
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.settings import (
    OPTIMIZERS,
    RULES,
    DownlinkSettings,
    MergeSettings,
    OptimizerSettings,
    Settings,
)
from ternbus.aggregator.shell import administration, cli, repairing
from ternbus.aggregator.store import control
from ternbus.aggregator.store.ledger import KINDS
from ternbus.aggregator.store.rows import set_fact
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_metadata, load_safetensors, save_safetensors
from ternbus.broker.protocol.schema import Schema, Vector, to_tensors, to_vector
from ternbus.broker.protocol.tensor_kinds import TensorKinds, matching
from ternbus.broker.protocol.ternary import CODECS, VALUE_MAX, Block, nearest_block
from ternbus.edge.learn.kinds import tensor_kinds
from ternbus.edge.learn.task_loader import load_task

SHAPES: Mapping[str, tuple[int, ...]] = {"w": (16, 40), "norm.running_mean": (300,), "norm.running_var": (300,)}
KINDS_OF = TensorKinds.by_name(SHAPES)
SCHEMA = Schema.of(SHAPES)


def first_model() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    model = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return model | {"norm.running_var": np.ones(300, np.float32)}


def model_of(settings: Settings, kinds: TensorKinds = KINDS_OF, schema: Schema = SCHEMA) -> Model:
    vector = to_vector(schema, first_model())
    server = optimizer.init(settings.optimizer, vector)
    return Model(settings=settings, schema=schema, version=0, published=vector, server=server, kinds=kinds)


def settings_of(name: str = "fedavg", codec: str = "ternary", **merge: object) -> Settings:
    return Settings(
        federation="lab",
        broker="mqtt://127.0.0.1:1",
        merge=MergeSettings(**merge),  # type: ignore[arg-type]
        optimizer=OptimizerSettings(name=name, learning_rate=0.5),
        downlink=DownlinkSettings(codec=codec),
    )


def change(seed: int, scale: float = 1.0) -> Vector:
    """A change that takes most variances far below 0, some of them further than one delta can carry."""
    generator = np.random.default_rng(seed)
    found = generator.normal(scale=scale, size=SCHEMA.elements).astype(np.float32)
    found[-300:] -= generator.choice([0.0, 1.0, 2.0 * VALUE_MAX], size=300).astype(np.float32)
    return found


def merged(model: Model, seed: int, devices: int = 3) -> None:
    for index in range(devices):
        block = nearest_block(model.schema, change(10 * seed + index))
        model.accept(accepted_update(f"d{index}", samples=1 + index, seq=10 * seed + index), block)
    model.merge()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_published_variance_is_below_zero_whatever_the_optimizer(name: str, codec: str) -> None:
    model = model_of(settings_of(name, codec))
    lowest = []
    for seed in range(8):
        merged(model, seed)
        lowest.append(to_tensors(SCHEMA, model.published)["norm.running_var"].min())
    assert min(lowest) == 0  # it was tried, and went no further


@pytest.mark.parametrize("rule", RULES)
def test_no_published_variance_is_below_zero_whatever_the_rule(rule: str) -> None:
    model = model_of(settings_of(rule=rule, byzantine=0))
    for seed in range(4):
        merged(model, seed)
        assert to_tensors(SCHEMA, model.published)["norm.running_var"].min() >= 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_statistics_follow_the_mean_of_the_updates_and_weights_the_optimizer(name: str) -> None:
    model, alone = model_of(settings_of(name, "float32")), model_of(settings_of(name, "float32"), TensorKinds())
    expected = first_model()["norm.running_mean"].astype(np.float64)
    for seed in range(3):
        for each in (model, alone):
            merged(each, seed)
        changes = [to_tensors(SCHEMA, change(10 * seed + index))["norm.running_mean"] for index in range(3)]
        expected += sum((1 + index) * one.astype(np.float64) for index, one in enumerate(changes)) / 6
    found, other = (to_tensors(SCHEMA, each.published) for each in (model, alone))
    np.testing.assert_allclose(found["norm.running_mean"], expected, rtol=1e-5, atol=1e-5)
    assert found["w"].tobytes() == other["w"].tobytes()
    assert not np.allclose(other["norm.running_mean"], expected)


def test_a_published_variance_below_zero_of_before_is_healed_by_the_next_version() -> None:
    model = model_of(settings_of("fedavgm"))
    model.published[-300:] = model.server.target[-300:] = -0.25
    model.accept(accepted_update(), nearest_block(SCHEMA, np.zeros(SCHEMA.elements, np.float32)))
    model.merge()
    assert (to_tensors(SCHEMA, model.published)["norm.running_var"] == 0).all()


# --- a federation's home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    create(tmp_path / "agg")
    return tmp_path / "agg"


def create(home: Path, kinds: TensorKinds | None = None, model: dict[str, np.ndarray] | None = None) -> None:
    administration.create(
        home,
        federation="lab",
        broker="mqtt://127.0.0.1:1",
        model=model or first_model(),
        kinds=kinds,
        settings={"merge.buffer_size": 1, "optimizer.name": "fedavgm", "merge.influence_bound": "none"},
    )


@pytest.fixture
def bench(home: Path) -> Iterator[Bench]:
    bench = Bench(home)
    bench.start()
    yield bench
    bench.close()


def test_kinds_are_kept_with_the_model_and_go_into_what_is_exported(tmp_path: Path) -> None:
    """A scale is no variance by its name; a home that an export founds knows it all the same."""
    model = first_model() | {"scale": np.ones(400, np.float32)}
    kinds = KINDS_OF | TensorKinds(nonnegative=frozenset({"scale"}))
    save_safetensors(tmp_path / "first.safetensors", model, {"ternbus": "own, seed 1", **kinds.metadata()})
    runner = CliRunner()
    for made, source in (("one", "first"), ("two", "one")):
        arguments = ["--federation", "lab", "--broker", "mqtt://127.0.0.1:1"]
        begun = ["init", str(tmp_path / made), *arguments, "--model", str(tmp_path / f"{source}.safetensors")]
        assert runner.invoke(cli.app, begun).exit_code == 0
        written = runner.invoke(cli.app, ["export", str(tmp_path / made), str(tmp_path / f"{made}.safetensors")])
        assert written.exit_code == 0
        bench = Bench(tmp_path / made)
        assert bench.core.model.kinds == bench.ledger.kinds() == kinds
        assert {tensor.name: tensor.role for tensor in bench.schema.tensors}["scale"] == "dense"
        bench.close()
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_restart_and_a_repair_keep_the_kinds(tmp_path: Path) -> None:
    kinds = TensorKinds(statistics=frozenset({"norm.running_mean"}), nonnegative=frozenset({"norm.running_var"}))
    create(tmp_path / "agg", kinds)
    bench = Bench(tmp_path / "agg")
    bench.start()
    device = bench.join("pi")
    for seed in range(3):
        bench.send(device, Block.of_float32(bench.schema, change(seed, 0.1)), seed)
    before = bench.core.model.server.target.tobytes()
    bench.restart()
    assert bench.core.model.server.target.tobytes() == before
    bench.ledger.db.execute("UPDATE devices SET state = 'x'")  # as a damaged page would have it
    bench.close()
    repairing.repair(tmp_path / "agg", clock_s=0.0)
    bench = Bench(tmp_path / "agg")
    assert bench.core.model.kinds == kinds
    bench.close()


def test_a_ledger_of_before_is_replayed_to_the_same_bits_and_then_averages(bench: Bench) -> None:
    device = bench.join("pi")
    as_it_was = Recipe(
        merge=bench.core.settings.merge, optimizer=bench.core.settings.optimizer, averages_statistics=False
    )
    found = json.loads(as_it_was.dumps())
    del found["averages_statistics"]  # nobody wrote it
    set_fact(bench.ledger.db, "recipe", json.dumps(found))
    bench.ledger.db.execute("DELETE FROM facts WHERE name = ?", (KINDS,))
    bench.core.model.kinds = TensorKinds()
    lower = np.where(np.arange(SCHEMA.elements) < SCHEMA.elements - 300, 0.1, -0.5).astype(np.float32)
    for version in range(3):
        bench.send(device, Block.of_float32(bench.schema, lower), version)
    before = [vector.tobytes() for vector in (*bench.core.model.server.vectors, bench.core.model.published)]
    assert to_tensors(bench.schema, bench.core.model.published)["norm.running_var"].min() < 0
    bench.restart()
    model = bench.core.model
    assert [vector.tobytes() for vector in (*model.server.vectors, model.published)] == before
    assert model.kinds == KINDS_OF
    was = bench.core.published.recipe.averages_statistics
    bench.start()
    assert not was
    assert bench.core.published.recipe.averages_statistics
    bench.send(device, Block.of_float32(bench.schema, np.zeros(bench.schema.elements, np.float32)), bench.version)
    variance = to_tensors(bench.schema, bench.core.model.published)["norm.running_var"]
    assert variance.min() == 0
    after = bench.core.model.server.target.tobytes()
    bench.restart()
    assert bench.core.model.server.target.tobytes() == after


def test_a_home_of_before_that_is_closed_by_a_command_averages_at_once(bench: Bench) -> None:
    set_fact(
        bench.ledger.db, "recipe", json.dumps(json.loads(bench.ledger.fact("recipe")) | {"averages_statistics": False})
    )
    bench.close()
    administration.change_state(bench.directory, control.CLOSE, "test")
    bench.recover()
    assert bench.core.published.recipe.averages_statistics


# --- what may be wrong in a file or a task


@pytest.mark.parametrize("text", ["{", '{"w": 1}', "[1]", "[" * 10_000])
def test_metadata_that_are_no_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"m.safetensors: its metadata 'statistics' is no JSON array of names"):
        TensorKinds.of_metadata({"statistics": text}, SHAPES, "m.safetensors")


def test_metadata_that_name_another_model_s_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="'nonnegative' names 'scale', which is no tensor of the model"):
        TensorKinds.of_metadata({"nonnegative": '["scale"]'}, SHAPES, "m.safetensors")


def test_a_file_that_states_no_kinds_goes_by_names_and_one_that_states_none_has_none() -> None:
    assert TensorKinds.of_metadata({"version": "3"}, SHAPES, "m") == KINDS_OF
    assert TensorKinds.of_metadata(TensorKinds().metadata(), SHAPES, "m") == TensorKinds()


def test_kinds_survive_their_text_and_names_are_no_patterns() -> None:
    kinds = TensorKinds(statistics=frozenset({"a"}), nonnegative=frozenset({"b[0]", "*"}))
    assert TensorKinds.loads(kinds.dumps()) == kinds
    assert TensorKinds.of_metadata(kinds.metadata(), ["a", "b[0]", "*"], "m") == kinds
    assert matching(["b[0]", "b0", "*", "a"], kinds.dense) == {"b[0]", "*"}


def test_an_initial_model_with_a_variance_below_zero_is_refused(tmp_path: Path) -> None:
    model = first_model() | {"norm.running_var": np.full(300, -1, np.float32)}
    with pytest.raises(ConfigError, match=r"the model's norm.running_var has a negative element"):
        create(tmp_path / "agg", model=model)
    assert not (tmp_path / "agg").exists()


class Stating:
    """A task without PyTorch that states kinds by patterns."""

    statistics = ("*mean",)
    nonnegative = ("w*",)

    def __init__(self) -> None:
        self._task = load_task("digits-numpy")

    def __getattr__(self, name: str) -> object:
        return getattr(self._task, name)


def test_a_task_without_torch_states_kinds_by_patterns() -> None:
    model = {"w": np.ones(3, np.float32), "mean": np.zeros(3, np.float32), "a.running_var": np.ones(3, np.float32)}
    assert tensor_kinds(Stating(), model) == TensorKinds(  # type: ignore[arg-type]
        statistics=frozenset({"mean", "a.running_var"}), nonnegative=frozenset({"w", "a.running_var"})
    )
    with pytest.raises(
        ConfigError, match=r"statistics has '\*mean', which matches no tensor of its model; the first is"
    ):
        tensor_kinds(Stating(), {"w": model["w"]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="w has a negative element"):
        tensor_kinds(Stating(), model | {"w": -model["w"]})  # type: ignore[arg-type]


# --- files


def test_equal_models_are_equal_files_whatever_the_order_of_their_parts(tmp_path: Path) -> None:
    model, about = first_model(), {"version": "3", "digest": "ab", **KINDS_OF.metadata(), "name": 'a "ü" \x07 \\'}
    contents = set()
    for turn in range(20):
        turned = dict(sorted(about.items(), key=lambda item: hash((turn, item))))
        path = tmp_path / f"{turn}.safetensors"
        save_safetensors(path, dict(reversed(model.items())) if turn % 2 else model, turned)
        contents.add(path.read_bytes())
        assert load_metadata(path) == about
    assert len(contents) == 1
    back = load_safetensors(path)
    assert {name: array.tobytes() for name, array in back.items()} == {
        name: array.tobytes() for name, array in model.items()
    }


def test_metadata_of_a_file_that_cannot_be_read_is_an_error_in_words(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "m.safetensors", first_model(), {})
    assert load_metadata(tmp_path / "m.safetensors") == {}
    (tmp_path / "torn.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="cannot read"):
        load_metadata(tmp_path / "torn.safetensors")
