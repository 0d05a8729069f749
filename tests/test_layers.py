"""The house rules of ARCHITECTURE.md that can be read off the source: who imports whom, sizes, names."""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each package may import besides itself; ternbus.py is checked with them, as if it were a package.
LAYERS = {
    "broker": set[str](),
    "aggregator": {"broker"},
    "edge_client": {"broker"},
    "lab": {"broker", "aggregator", "edge_client"},
    "ternbus": {"broker"},  # the packages' commands it imports by name, when one is run
}

# A core is handed time and chance and hands back actions. What it uses of ours must not reach for these either.
CLOCK_CHANCE_NETWORK = {
    "asyncio", "concurrent", "multiprocessing", "paho", "queue", "random", "secrets", "select", "selectors", "signal",
    "socket", "sqlite3", "ssl", "subprocess", "threading", "time", "torch",
}  # fmt: skip
# Files too, for the core itself only: broker.identity, which knows names and signatures, also keeps the key files.
FILES = {"io", "os", "pathlib", "shutil", "tempfile"}

# Libraries that one place in the house knows about.
CONFINED = {
    "paho": {"broker/connection.py"},
    "torch": {
        "edge_client/torch_model.py",
        "edge_client/torch_private.py",
        "edge_client/torch_speed.py",
        "edge_client/torch_trainer.py",
        "edge_client/torchvision_ops.py",
        "edge_client/tasks/",
    },
    "torchvision": {"edge_client/torchvision_ops.py", "edge_client/tasks/"},
    "matplotlib": {"lab/"},
    "cryptography": {"broker/certificates.py"},
    "dp_accounting": {"edge_client/accountant.py"},
    "opacus": {"edge_client/torch_private.py"},
    "ternbus_rows": {"aggregator/accumulator.py"},
    "efficientnet_lite_pytorch": {"edge_client/tasks/cifar10_features.py"},
}
WITHOUT_TORCH = {
    "edge_client/tasks/__init__.py",
    "edge_client/tasks/digits_data.py",
    "edge_client/tasks/digits_numpy.py",
    "edge_client/tasks/idx.py",
}

FILE_LINES = 400
FUNCTION_LINES = 60
VAGUE = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def files() -> list[Path]:
    packages = [file for package in LAYERS for file in sorted((ROOT / package).rglob("*.py"))]
    return [*packages, ROOT / "ternbus.py"]


def name_of(file: Path) -> str:
    """Its path from the root, as shown in messages and in the tables above."""
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Every dotted name that the module imports, anywhere in it; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield base
                yield from (f"{base}.{alias.name}" for alias in names)


@cache
def imported_by(file: Path) -> frozenset[str]:
    module = module_of(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(imports(parsed(file), package))


def tops(modules: Iterable[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def within(file: Path, places: set[str]) -> bool:
    return any(name_of(file) == place or (place.endswith("/") and name_of(file).startswith(place)) for place in places)


def reached_from(start: Path, by_module: dict[str, Path]) -> dict[Path, tuple[str, ...]]:
    """The files of ours that importing ``start`` runs, each with the chain of names that leads to it."""
    found = {start: (name_of(start),)}
    waiting = [start]
    while waiting:
        file = waiting.pop()
        for module in imported_by(file):
            target = by_module.get(module)
            if target is not None and target not in found:
                found[target] = (*found[file], name_of(target))
                waiting.append(target)
    return found


CORES = [file for file in files() if file.name == "core.py"]


def test_both_state_machines_are_checked() -> None:
    assert {"aggregator/core.py", "edge_client/core.py"} <= {name_of(core) for core in CORES}


def test_packages_import_one_way() -> None:
    wrong = {
        name_of(file): beyond
        for file in files()
        if (top := module_of(file).partition(".")[0])
        if (beyond := (tops(imported_by(file)) & LAYERS.keys()) - LAYERS[top] - {top})
    }
    assert not wrong


@pytest.mark.parametrize("core", CORES, ids=name_of)
def test_a_core_touches_no_clock_no_chance_no_network_and_no_file(core: Path) -> None:
    assert not tops(imported_by(core)) & (CLOCK_CHANCE_NETWORK | FILES)


@pytest.mark.parametrize("core", CORES, ids=name_of)
def test_nothing_that_a_core_imports_knows_clock_chance_or_network(core: Path) -> None:
    by_module = {module_of(file): file for file in files()}
    wrong = {
        " imports ".join(chain): found
        for file, chain in reached_from(core, by_module).items()
        if (found := tops(imported_by(file)) & CLOCK_CHANCE_NETWORK)
    }
    assert not wrong


@pytest.mark.parametrize("library", CONFINED)
def test_a_library_is_known_in_one_place(library: str) -> None:
    users = [file for file in files() if library in tops(imported_by(file))]
    assert [name_of(file) for file in users if not within(file, CONFINED[library])] == []
    if library.startswith("torch"):
        assert [name_of(file) for file in users if within(file, WITHOUT_TORCH)] == []


def test_torch_does_not_follow_the_trainer_that_does_without() -> None:
    by_module = {module_of(file): file for file in files()}
    start = by_module.get("edge_client.tasks.digits_numpy")
    assert start is not None
    assert not [chain for file, chain in reached_from(start, by_module).items() if "torch" in tops(imported_by(file))]


def test_only_the_command_mounts_the_packages_commands() -> None:
    by_module = {module_of(file): file for file in files()}
    commands = {module for module in by_module if module.endswith(".cli")}
    users = {name_of(file): commands & imported_by(file) for file in files() if commands & imported_by(file)}
    assert not users


def test_files_and_functions_stay_small() -> None:
    long_files = {
        name_of(file): count for file in files() if (count := len(file.read_text().splitlines())) > FILE_LINES
    }
    assert not long_files
    long_functions = {
        f"{name_of(file)}:{node.lineno} {node.name}": length
        for file in files()
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long_functions


def test_names_say_what_a_thing_is() -> None:
    vague = [name_of(file) for file in files() if set(file.stem.split("_")) & VAGUE]
    vague += [
        f"{name_of(file)}: class {node.name}"
        for file in files()
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ClassDef) and node.name.lower().endswith(tuple(VAGUE))
    ]
    assert vague == []


def test_relative_and_nested_imports_are_seen() -> None:
    source = "from . import core\nfrom .tasks import digits\ndef f():\n    import paho.mqtt.client as mqtt\n"
    assert set(imports(ast.parse(source), "edge_client")) == {
        "edge_client",
        "edge_client.core",
        "edge_client.tasks",
        "edge_client.tasks.digits",
        "paho.mqtt.client",
    }
    assert set(imports(ast.parse("from ..errors import ConfigError"), "broker.engines")) == {
        "broker.errors",
        "broker.errors.ConfigError",
    }
