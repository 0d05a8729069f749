"""docs/reference/api.md: the public names of Python, with the signatures and docstrings of the source.

griffe reads the source without running it, so a signature is shown as it is written there.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

from manual.errors import ManualError
from manual.markdown import paragraphs, table

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# Python

<!-- python -m manual --write -->

This page is made from the docstrings. The names here are public, as are the built-in tasks,
`ternbus.edge.tasks.NAME`. Everything else is private and may change.
[tasks.md](../tasks.md) and [notebook.md](../notebook.md) show how the names are used together.
"""
PACKAGES = {
    "ternbus.lab": "Federations on arrays and scenarios: [notebook.md](../notebook.md), [lab.md](../lab.md).",
    "ternbus.edge": "What a task is made of: [tasks.md](../tasks.md).",
    "ternbus.edge.adapters": "Tasks of models of other libraries: [adapters.md](../adapters.md).",
    "ternbus.broker": "The wire format, for a device in Python of your own: [protocol.md](../protocol.md).",
}
Found = Any  # griffe's types do not say which of its objects has which members
COMPONENTS = ("broker", "edge_client", "aggregator", "helper", "lab")


def page() -> str:
    """The text of the page."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT / each) for each in COMPONENTS], allow_inspection=False)
    source = loader.load("ternbus")
    loader.resolve_aliases()
    lines = [HEAD]
    for package, about in PACKAGES.items():
        lines += [f"## {package}", "", about, ""]
        places = _places(package)
        names = {name: source[f"{place.removeprefix('ternbus.')}.{name}"] for place, name in places}
        for name in sorted(names, key=str.lower):
            lines += _entry(package, name, names[name])
    return "\n".join(lines).rstrip("\n") + "\n"


def _places(package: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each public name: what the package's `__init__.py` tells type checkers."""
    inner = "/".join(package.split(".")[1:])
    path = next(path for each in COMPONENTS if (path := ROOT / each / "ternbus" / inner / "__init__.py").exists())
    block = next(node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)


def _entry(package: str, name: str, found: Found) -> Iterator[str]:
    """The part about one public name."""
    yield f"### {package}.{name}"
    yield ""
    if found.is_class:
        yield from _class(name, found)
    elif found.is_function:
        yield from _function(name, found)
    else:
        yield from _block(f"{name} = {found.value}" if found.is_attribute else name)
        yield from _docstring(found)


def _class(name: str, found: Found) -> Iterator[str]:
    init = found.members.get("__init__")
    bases = ", ".join(str(each) for each in found.bases)
    made = _parameters(init) if init else ""
    yield from _block(
        f"class {name}({bases})" + (f"\n\n{name}{made}" if made else "") if bases else f"class {name}{made}"
    )
    yield from _docstring(found)
    if (doc := init.docstring if init else None) and doc.value.strip():
        yield from (paragraphs(doc.value), "")
    public = [each for each in found.members.values() if not each.name.startswith("_") and not each.is_alias]
    given = {each.name for each in init.parameters} if init else set()
    fields = [(f"`{each.name}`", f"`{each.annotation}`" if each.annotation else "", _one_line(each))
              for each in public if each.is_attribute and (_one_line(each) or each.name not in given)]  # fmt: skip
    if fields:
        yield from (table(["attribute", "type", "meaning"], fields), "")
    for each in public:
        if each.is_function:
            yield from (f"#### {name}.{each.name}", "")
            yield from _function(each.name, each)


def _one_line(found: Found) -> str:
    return found.docstring.value.replace("``", "`") if found.docstring else ""


def _function(name: str, found: Found) -> Iterator[str]:
    returns = f" -> {found.returns}" if found.returns is not None else ""
    yield from _block(f"{name}{_parameters(found)}{returns}")
    yield from _docstring(found)


def _docstring(found: Found) -> Iterator[str]:
    """The docstring. A public class or function without one is an error of the source."""
    if found.docstring is None or not found.docstring.value.strip():
        if found.is_attribute or (found.parent is not None and found.parent.is_class):
            return
        raise ManualError(f"{found.filepath}:{found.lineno}: {found.path} is public and has no docstring: add one")
    yield from (paragraphs(found.docstring.value), "")


def _block(text: str) -> Iterator[str]:
    yield from ("```py", text, "```", "")


def _parameters(function: Found) -> str:
    """The parameters in brackets, one a line if they are longer than a line."""
    shown: list[str] = []
    star = False
    for each in function.parameters:
        if each.name in ("self", "cls"):
            continue
        if each.kind is griffe.ParameterKind.keyword_only and not star:
            shown, star = [*shown, "*"], True
        star = star or each.kind is griffe.ParameterKind.var_positional
        shown.append(_parameter(each))
    line = f"({', '.join(shown)})"
    return line if len(line) <= 80 else "(\n    " + ",\n    ".join(shown) + ",\n)"


def _parameter(found: Any) -> str:
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(found.kind, "")
    kind = f": {found.annotation}" if found.annotation is not None else ""
    if stars or found.default is None:
        return f"{stars}{found.name}{kind}"
    return f"{found.name}{kind}{' = ' if kind else '='}{found.default}"
