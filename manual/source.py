"""What the source says beside the values: the comments behind fields and keys, and the bounds that are checked."""

import ast
import importlib
import io
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from manual.errors import ManualError


@cache
def _text(module: ModuleType) -> str:
    if module.__file__ is None:
        raise ManualError(f"{module.__name__} has no file to read comments from")
    return Path(module.__file__).read_text(encoding="utf-8")


@cache
def _comments(module: ModuleType) -> dict[int, str]:
    """The comment behind the code of each line, by the line's number."""
    tokens = tokenize.generate_tokens(io.StringIO(_text(module)).readline)
    return {
        each.start[0]: each.string.removeprefix("#").strip()
        for each in tokens
        if each.type == tokenize.COMMENT and each.line[: each.start[1]].strip()
    }


def _named(node: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, last line) of what the node gives a value to: names, and the keys of dicts."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            yield name, node.end_lineno or node.lineno
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), value.end_lineno or value.lineno
        case _:
            pass


def comments(module: ModuleType, within: str = "") -> dict[str, str]:
    """The comment behind each name that is given a value in the module, or in one class of it."""
    tree: ast.AST = ast.parse(_text(module))
    if within:
        tree = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == within)
    found = {name: line for node in ast.walk(tree) for name, line in _named(node)}
    return {name: _comments(module)[line] for name, line in found.items() if line in _comments(module)}


def field_comments(kind: type) -> dict[str, str]:
    """The comment behind each field of a dataclass. Raises `ManualError` for a field without one."""
    module = importlib.import_module(kind.__module__)
    found = comments(module, kind.__name__)
    names = [entry.name for entry in fields(kind)]
    if missing := [name for name in names if name not in found]:
        raise ManualError(
            f"{module.__file__}: {kind.__name__}.{missing[0]} has no comment behind it that says what it is"
        )
    return {name: found[name] for name in names}


def bounds(module: ModuleType) -> dict[str, tuple[Any, Any]]:
    """(low, high) of each key that the module checks with ``within("key", value, low, high)``."""
    found = {}
    for node in ast.walk(ast.parse(_text(module))):
        match node:
            case ast.Call(func=ast.Name(id="within"), args=[ast.Constant(value=str(key)), _, low, high]):
                found[key] = (_value(low, module), _value(high, module))
            case _:
                pass
    return found


def _value(node: ast.expr, module: ModuleType) -> Any:
    return eval(compile(ast.Expression(node), "bounds", "eval"), vars(module))  # noqa: S307 - our own source
