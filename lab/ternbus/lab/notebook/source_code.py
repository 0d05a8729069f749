"""The source of functions and classes that a notebook defines, with the names that they need, for a file of its own."""

import ast
import builtins
import inspect
import linecache
import symtable
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ternbus.broker.errors import ConfigError

OURS: Final = "ternbus."
PLAIN: Final = (int, float, complex, str, bytes, bool, type(None))


@dataclass(slots=True)
class Source:
    """Imports and definitions, each once, in the order in which they are needed."""

    imports: dict[str, None] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    _objects: dict[str, Any] = field(default_factory=dict)

    def function(self, function: Any, name: str) -> str:
        """The name by which the file has this function or class. Raises `ConfigError` if it has no source."""
        if isinstance(function, type | types.FunctionType | types.BuiltinFunctionType):
            own = getattr(function, "__name__", name)
            if isinstance(function, types.FunctionType) and own == "<lambda>":
                return self._lambda(function, name)
            if _is_importable(function):
                return self._import(function, own)
            return self._defined(function, own)
        raise ConfigError(
            f"to_task: {name} is {type(function).__name__}, whose source cannot be written to a file: write a function "
            "that makes or calls it"
        )

    def _import(self, function: Any, name: str) -> str:
        self._keep(name, function)
        self.imports[f"from {function.__module__} import {name}"] = None
        return name

    def _defined(self, function: Any, name: str) -> str:
        if self._keep(name, function):
            try:
                text = textwrap.dedent(_text_of(function))
            except (OSError, TypeError, SyntaxError) as error:
                raise ConfigError(f"to_task: {name} has no source that Python knows: define it in a file") from error
            self._needs(text, _names_of(function), name)
            self.definitions[name] = text.rstrip()
        return name

    def _lambda(self, function: types.FunctionType, name: str) -> str:
        if self._keep(name, function):
            node, text = _lambda_of(function, name)
            self._needs(ast.unparse(node), _names_of(function), name)
            body = ast.get_source_segment(text, node.body) or ast.unparse(node.body)
            if "\n" in body:
                body = f"({body})"
            self.definitions[name] = f"def {name}({ast.unparse(node.args)}):\n    return {body}"
        return name

    def _needs(self, text: str, known: Mapping[str, Any], by: str) -> None:
        """Take in what the code reads beside its own names."""
        for name in _read_names(symtable.symtable(text, "<source>", "exec")):
            if name in known and name not in self._objects:
                self._value(name, known[name], by)

    def _value(self, name: str, value: Any, by: str) -> None:
        if isinstance(value, types.ModuleType):
            self._objects[name] = value
            parent, _, last = value.__name__.rpartition(".")
            plain = f"import {value.__name__}" + ("" if name == value.__name__ else f" as {name}")
            self.imports[f"from {parent} import {last}" if parent and last == name else plain] = None
        elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            found = self.function(value, name)
            if found != name:
                self.definitions[name] = f"{name} = {found}"
        elif _is_plain(value):
            self._objects[name] = value
            self.definitions[name] = f"{name} = {value!r}"
        else:
            raise ConfigError(
                f"to_task: {by} uses {name}, {type(value).__name__}, which cannot be written to a file: make it in a "
                "function, or import it from a module"
            )

    def _keep(self, name: str, value: Any) -> bool:
        """Whether the name is new. Raises `ConfigError` if it means something else already."""
        if name in self._objects and self._objects[name] is not value:
            raise ConfigError(f"to_task: two functions are named {name}: rename one of them")
        is_new = name not in self._objects
        self._objects[name] = value
        return is_new


def _text_of(function: Any) -> str:
    """The source. Raises `OSError`, `TypeError` or `SyntaxError` if there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # before Python 3.13 a class of a notebook has none, but its methods know their cells
        own = [inspect.unwrap(getattr(each, "__func__", each)) for each in getattr(function, "__dict__", {}).values()]
        for code in (each.__code__ for each in own if isinstance(each, types.FunctionType)):
            if (text := _class_around(code, function.__name__)) is not None:
                return text
        raise


def _class_around(code: types.CodeType, name: str) -> str | None:
    """The source of the class of this name, with its decorators, that the code is a method of."""
    lines = linecache.getlines(code.co_filename)
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.ClassDef) and node.name == name:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            if first <= code.co_firstlineno <= (last := node.end_lineno or first):
                return "".join(lines[first - 1 : last])
    return None


def _is_importable(function: Any) -> bool:
    """Whether a module of another's has it by its name: not a notebook, and nothing private of ours."""
    module, place = function.__module__ or "", getattr(function, "__qualname__", "<")
    return module != "__main__" and not module.startswith(OURS) and "." not in place and "<" not in place


def _names_of(function: Any) -> dict[str, Any]:
    """The values of the names outside that its code may read."""
    if isinstance(function, type):
        own = [each for each in vars(function).values() if isinstance(each, types.FunctionType)]
        module = inspect.getmodule(function)
        found = {} if module is None else dict(vars(module))
        for each in own:
            found |= _names_of(each)
        found.pop(function.__name__, None)
        return found
    closure = inspect.getclosurevars(function).nonlocals
    return {**function.__globals__, **closure}


def _read_names(scope: symtable.SymbolTable) -> Iterator[str]:
    """What is read of the names outside: no arguments and variables of the code's own, whatever is outside with it."""
    outermost = scope.get_type() == "module"
    for symbol in scope.get_symbols():
        outside = not symbol.is_assigned() if outermost else symbol.is_global()
        if symbol.is_referenced() and outside and not hasattr(builtins, symbol.get_name()):
            yield symbol.get_name()
    for inner in scope.get_children():
        yield from _read_names(inner)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list) and all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _lambda_of(function: types.FunctionType, name: str) -> tuple[ast.Lambda, str]:
    """The lambda's node, and the text that it is in."""
    try:
        lines, _ = inspect.findsource(function)
        text = "".join(lines)
        tree = ast.parse(text)
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"to_task: {name} has no source that Python knows: write it as a function") from error
    places = [place for place in function.__code__.co_positions() if None not in place and place[3]]
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and _holds(node, places)]
    if not inside:
        raise ConfigError(f"to_task: {name} is a lambda whose source cannot be told from others: write a function")
    return min(inside, key=lambda node: len(ast.unparse(node))), text


def _holds(node: ast.Lambda, places: list[Any]) -> bool:
    first, last = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return bool(places) and all(first <= (line, left) and (end, right) <= last for line, end, left, right in places)
