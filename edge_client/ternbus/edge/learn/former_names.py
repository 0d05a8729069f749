"""The current names of version 0.1's modules, so that the error for an old task shows its new import."""

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Final

PACKAGES: Final[Mapping[str, str]] = {
    "edge_client": "ternbus.edge",
    "broker": "ternbus.broker",
    "aggregator": "ternbus.aggregator",
    "lab": "ternbus.lab",
}
MODULES: Final[Mapping[str, str]] = {
    "edge_client.accountant": "ternbus.edge.learn.accountant",
    "edge_client.narrow": "ternbus.edge.learn.subnetwork",
    "edge_client.noise": "ternbus.edge.learn.noise",
    "edge_client.partition": "ternbus.edge.learn.partition",
    "edge_client.privacy": "ternbus.edge.plan.privacy",
    "edge_client.schedule": "ternbus.edge.plan.schedule",
    "edge_client.tasks": "ternbus.edge.tasks",
    "edge_client.torch_model": "ternbus.edge.torch.travelling_state",
    "edge_client.torch_trainer": "ternbus.edge.torch.trainer",
    "edge_client.torchvision_ops": "ternbus.edge.torch.torchvision_ops",
    "edge_client.trainer": "ternbus.edge.learn.task",
    "broker.errors": "ternbus.broker.errors",
    "broker.frame": "ternbus.broker.protocol.frame",
    "broker.identity": "ternbus.broker.protocol.identity",
    "broker.invitation": "ternbus.broker.protocol.invitation",
    "broker.link": "ternbus.broker.link.link",
    "broker.messages": "ternbus.broker.protocol.messages",
    "broker.parts": "ternbus.broker.protocol.parts",
    "broker.schema": "ternbus.broker.protocol.schema",
    "broker.ternary": "ternbus.broker.protocol.ternary",
    "broker.topics": "ternbus.broker.protocol.topics",
    "lab.hostile": "ternbus.lab.hostile",
    "lab.scenario": "ternbus.lab.scenario.scenario",
    "lab.simulate": "ternbus.lab.virtual.simulate",
    "lab.training": "ternbus.lab.virtual.training",
}
RENAMED: Final[Mapping[str, str]] = {"Chance": "RandomSource", "Promise": "PrivacyPolicy"}


def current(module: str) -> str:
    """The current name of a module of version 0.1; empty for any other module."""
    if module.startswith("edge_client.tasks."):
        return module.replace("edge_client", "ternbus.edge", 1)
    return MODULES.get(module) or PACKAGES.get(module, "")


def rewritten(source: str | bytes, line: int) -> str:
    """The import statement in this line of a task's source with current names; empty if it imports no old name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno <= line <= (node.end_lineno or line):
            return "; ".join(_statements(node))
    return ""


def _statements(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if new := _module(alias.name):
                yield f"import {new}{_as(alias)}"
        return
    module = node.module or ""
    package = PACKAGES.get(module.partition(".")[0])
    if package is None or node.level:
        return
    public = getattr(import_module(package), "__all__", ())
    by_module: dict[str, list[str]] = {}
    for alias in node.names:
        name = RENAMED.get(alias.name, alias.name)
        if inner := current(f"{module}.{alias.name}"):  # from edge_client import torch_trainer
            place, _, name = inner.rpartition(".")
        else:
            place = package if name in public else _module(module)
        kept = f" as {alias.asname or alias.name}" if alias.asname or name != alias.name else ""
        by_module.setdefault(place, []).append(name + kept)
    for place, names in by_module.items():
        yield f"from {place} import {', '.join(names)}"


def _module(name: str) -> str:
    """The current name of a module, or the package to which it belonged."""
    return current(name) or PACKAGES.get(name.partition(".")[0], "")


def _as(alias: ast.alias) -> str:
    return f" as {alias.asname}" if alias.asname else ""
