"""The current names of version 0.1's modules, so that the error for an old task shows its new import.

Only `ternbus.broker`, `ternbus.edge` and `ternbus.lab` are imported, and they load nothing heavy. The names in the
other modules are read from their source.
"""

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PACKAGES: Final[Mapping[str, str]] = {
    "edge_client": "ternbus.edge",
    "broker": "ternbus.broker",
    "aggregator": "ternbus.aggregator",
    "lab": "ternbus.lab",
}
# The modules that now have the names of a former module. The first is the one that `import` is rewritten to.
MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "edge_client.accountant": ("ternbus.edge.learn.accountant",),
    "edge_client.check": ("ternbus.edge.shell.preflight",),
    "edge_client.compress": ("ternbus.edge.learn.compress",),
    "edge_client.local_optimizer": ("ternbus.edge.learn.local_optimizer",),
    "edge_client.narrow": ("ternbus.edge.learn.subnetwork",),
    "edge_client.noise": ("ternbus.edge.learn.noise",),
    "edge_client.partition": ("ternbus.edge.learn.partition",),
    "edge_client.privacy": ("ternbus.edge.plan.privacy",),
    "edge_client.schedule": ("ternbus.edge.plan.schedule",),
    "edge_client.tasks": ("ternbus.edge.tasks",),
    "edge_client.terngrad": ("ternbus.edge.learn.terngrad",),
    "edge_client.torch_model": ("ternbus.edge.torch.travelling_state",),
    "edge_client.torch_private": ("ternbus.edge.torch.dp_sgd",),
    "edge_client.torch_speed": ("ternbus.edge.torch.autotune",),
    "edge_client.torch_trainer": ("ternbus.edge.torch.trainer",),
    "edge_client.torchvision_ops": ("ternbus.edge.torch.torchvision_ops",),
    "edge_client.trainer": (
        "ternbus.edge.learn.task",
        "ternbus.edge.learn.task_loader",
        "ternbus.edge.plan.plan",
        "ternbus.edge.plan.tensors",
    ),
    "broker.errors": ("ternbus.broker.errors",),
    "broker.frame": ("ternbus.broker.protocol.frame",),
    "broker.identity": ("ternbus.broker.protocol.identity",),
    "broker.invitation": ("ternbus.broker.protocol.invitation",),
    "broker.link": ("ternbus.broker.link.link",),
    "broker.messages": ("ternbus.broker.protocol.messages",),
    "broker.parts": ("ternbus.broker.protocol.parts",),
    "broker.schema": ("ternbus.broker.protocol.schema",),
    "broker.ternary": ("ternbus.broker.protocol.ternary",),
    "broker.topics": ("ternbus.broker.protocol.topics",),
    "lab.hostile": ("ternbus.lab.hostile",),
    "lab.scenario": ("ternbus.lab.scenario.scenario",),
    "lab.simulate": ("ternbus.lab.virtual.simulate",),
    "lab.training": ("ternbus.lab.virtual.training", "ternbus.lab.virtual.workers"),
}
RENAMED: Final[Mapping[str, str]] = {
    "Chance": "RandomSource",
    "Here": "InProcess",
    "Promise": "PrivacyPolicy",
    "Travelling": "TravellingState",
    "told": "privacy_metrics",
}


def current(module: str) -> tuple[str, ...]:
    """The modules that now have the names of this module of version 0.1; empty for any other module."""
    if module.startswith("edge_client.tasks.") and module.count(".") == 2:
        new = module.replace("edge_client", "ternbus.edge", 1)
        return (new,) if _source(new) else ()
    return MODULES.get(module) or tuple(filter(None, [PACKAGES.get(module)]))


def advice(source: str, line: int) -> str:
    """What to write instead of the imports in this line of a task's source; empty if none has an old name."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the file is not the one that was imported
        return ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    nodes = [node for node in nodes if node.lineno <= line <= (node.end_lineno or line)]
    statements: list[str] = []
    lost: list[str] = []
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        statements += _imports(node, lost) if isinstance(node, ast.Import) else _imports_from(node, lost)
    told = [f"write `{'; '.join(statements)}`"] if statements else []
    return "; ".join([*told, *(f"{name} is no longer public; see docs/tasks.md" for name in lost)])


def _imports(node: ast.Import, lost: list[str]) -> Iterator[str]:
    """The statement with current names; `lost` gets the modules that are gone."""
    new = {alias.name: current(alias.name) for alias in node.names if _is_old(alias.name)}
    lost += [name for name, found in new.items() if not found]
    if any(new.values()):
        kept = [(alias, new.get(alias.name, (alias.name,))) for alias in node.names]
        yield f"import {', '.join(found[0] + _as(alias) for alias, found in kept if found)}"


def _imports_from(node: ast.ImportFrom, lost: list[str]) -> Iterator[str]:
    """One statement for each module that now has some of the names; `lost` gets the names that are gone."""
    module = node.module or ""
    if node.level or not _is_old(module):
        return
    by_module: dict[str, list[str]] = {}
    for alias in node.names:
        place, name = _found(module, alias.name)
        if not place:
            lost.append(f"{module}.{alias.name}")
            continue
        kept = f" as {alias.asname or alias.name}" if alias.asname or name != alias.name else ""
        by_module.setdefault(place, []).append(name + kept)
    for place, names in by_module.items():
        yield f"from {place} import {', '.join(names)}"


def _found(module: str, old: str) -> tuple[str, str]:
    """The module that now has this name of a former module, and the current name; both empty if there is none."""
    if inner := current(f"{module}.{old}"):  # from edge_client import torch_trainer
        place, _, name = inner[0].rpartition(".")
        return place, name
    name = RENAMED.get(old, old)
    package = PACKAGES[module.partition(".")[0]]
    public = getattr(import_module(package), "__all__", ())
    if name in public or (name == "*" and public):
        return package, name
    place = next((new for new in current(module) if name in names_in(new)), "")
    return place, name if place else ""


def names_in(module: str) -> set[str]:
    """The names that a module of Ternbus defines, from its source; empty if there is no such module."""
    source = _source(module)
    if source is None:
        return set()
    import symtable  # noqa: PLC0415 - for an error only: a device that runs has no memory for it

    table = symtable.symtable(source.read_text(encoding="utf-8"), str(source), "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() and not symbol.is_imported()}


def _source(module: str) -> Path | None:
    """The file of a module of Ternbus, of which only the packages are imported."""
    try:
        spec = find_spec(module)
    except ImportError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _is_old(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _as(alias: ast.alias) -> str:
    return f" as {alias.asname}" if alias.asname else ""
