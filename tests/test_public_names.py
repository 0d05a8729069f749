"""What `ternbus.edge`, `ternbus.broker` and `ternbus.lab` offer; README, docs and examples use nothing else."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ternbus.edge.learn.task_loader import BUILT_IN_TASKS

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {
    "ternbus.edge": """
        ConfigError Cost Evaluation FloatArray Metric Plan PrivateTrainer RandomSource SharingTask Task Tensors
        TorchTask Trained Trainer TrainingError channels epsilon higher load_task lower per_sample select
    """,
    "ternbus.edge.adapters": "Context FlowerTask HuggingFaceTask LightningTask SklearnTask",
    "ternbus.broker": """
        AGGREGATOR Arrived Block Collector ConfigError Connected Delta Disconnected Endpoint Enroll FRAME_BYTES
        FederationError Frame Grant Head Identity Invitation KeyId Link LinkError LinkEvent Metrics Offer ProtocolError
        Published Receipt Refused Schema Snapshot SnapshotRef Status Tensor Tls Token Update Vector Whole build cut
        decode encode enroll_proof key_id load_safetensors nearest_block parse save_safetensors seal to_tensors
        to_vector topics vector_digest vector_of verify whole
    """,
    "ternbus.lab": """
        Availability Baseline BestModel Callback ClientError Comparison EarlyStopping End Fault Federation
        Hostile Job Lines Local MLflow MetricLimit Narrow PartitionTable Parts Private Progress Run Scenario
        Simulated Simulation Speeds State Sweep TensorBoard Tuning Update Workers by ca2fl compare dirichlet
        fadas iid mae natural quantity r2 shards sweep tune
    """,
}
# The tasks that ship are public as modules, and so are the digits that ship.
TASK_MODULES = {spec.partition(":")[0] for spec in BUILT_IN_TASKS.values()} | {"ternbus.edge.tasks.digits_data"}
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_offers_exactly_these_names(package: str) -> None:
    names = set(PUBLIC[package].split())
    module = importlib.import_module(package)
    assert set(module.__all__) == names
    assert names <= set(dir(module))
    assert all(getattr(module, name) is not None for name in names)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


@pytest.mark.parametrize("package", PUBLIC)
def test_a_type_checker_is_told_the_names_that_there_are_and_their_modules(package: str) -> None:
    path = importlib.import_module(package).__file__
    assert path is not None
    block = next(node for node in ast.parse(Path(path).read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (places,) = (node for node in ast.walk(block) if isinstance(node, ast.Dict))
    there = {name: module for module, names in ast.literal_eval(places).items() for name in names}
    assert told == there
    assert set(there) == set(PUBLIC[package].split())


def test_importing_the_packages_loads_none_of_their_rooms() -> None:
    loaded = python("import sys, ternbus.edge, ternbus.lab, ternbus.broker; print(*sys.modules)").split()
    ours = {name for name in loaded if name.startswith("ternbus.")}
    assert ours == {"ternbus.edge", "ternbus.lab", "ternbus.broker", "ternbus.broker.exports"}
    assert not {"numpy", "typer", "paho", "torch"} & set(loaded)


def test_nothing_of_the_device_but_its_torch_room_tasks_and_two_adapters_loads_torch() -> None:
    root = ROOT / "edge_client"
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(root.rglob("*.py"))
    ]
    with_torch = (
        "ternbus.edge.torch.",
        "ternbus.edge.tasks.",
        "ternbus.edge.adapters.hugging_face",
        "ternbus.edge.adapters.lightning",
    )
    without = [name for name in names if not name.startswith(with_torch)]
    without += ["ternbus.edge.tasks.digits_numpy", "ternbus.edge.tasks.digits_data", "ternbus.edge.tasks.idx"]
    assert {"ternbus.edge.torch", "ternbus.edge.shell.cli", "ternbus.edge.core.core"} <= set(without)
    code = f"""
import importlib, sys
for name in {without!r}:
    importlib.import_module(name)
print(sorted({{name.partition('.')[0] for name in sys.modules}} & {{'torch', 'torchvision', 'opacus'}}))
"""
    assert python(code).strip() == "[]"


def snippets(text: str) -> Iterator[str]:
    """The Python in a Markdown file: its blocks, and what `python -c` is given."""
    yield from re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    yield from re.findall(r'python -c "([^"]*)"', text)


def private_imports(code: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("ternbus"):
                public = set(PUBLIC.get(module, "").split())
                found += [
                    f"{module}.{alias.name}"
                    for alias in names
                    if alias.name not in public and f"{module}.{alias.name}" not in TASK_MODULES
                ]
                if module in TASK_MODULES:
                    found = [name for name in found if not name.startswith(f"{module}.")]
            case ast.Import(names=names):
                found += [
                    alias.name
                    for alias in names
                    if alias.name.startswith("ternbus") and alias.name not in {*PUBLIC, *TASK_MODULES}
                ]
            case _:
                pass
    return found


def test_readme_docs_and_examples_import_public_names_only() -> None:
    code = {path.name: list(snippets(path.read_text(encoding="utf-8"))) for path in TEXTS}
    code |= {path.name: [path.read_text(encoding="utf-8")] for path in EXAMPLES}
    imported = "\n".join(text for texts in code.values() for text in texts)
    assert imported.count("from ternbus.edge import") >= 4  # it looks where there is something to find
    assert {name: found for name, texts in code.items() for text in texts if (found := private_imports(text))} == {}


def test_a_private_import_is_seen() -> None:
    assert private_imports("from ternbus.edge.plan.plan import Plan") == ["ternbus.edge.plan.plan.Plan"]
    assert private_imports("import ternbus.edge.learn.task") == ["ternbus.edge.learn.task"]
    assert private_imports("from ternbus.edge import Outbox, Plan") == ["ternbus.edge.Outbox"]


def test_prose_names_no_private_module() -> None:
    """`ternbus.edge.select` in a sentence is an import that somebody will write."""
    dotted = re.compile(r"`(ternbus\.(?:edge|lab|broker|aggregator)\.[\w.]+)")
    found = {
        name
        for path in TEXTS
        for name in dotted.findall(path.read_text(encoding="utf-8"))
        if name.rpartition(".")[2] not in PUBLIC.get(name.rpartition(".")[0], "").split()
        and name not in {*PUBLIC, *TASK_MODULES}
    }
    assert not {name for name in found if not name.startswith("ternbus.edge.tasks.")}


def test_a_name_that_needs_torch_says_so_where_there_is_none() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "try:\n    from ternbus.edge import TorchTask\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == "ternbus.edge.TorchTask needs torch: pip install torch torchvision\n"
