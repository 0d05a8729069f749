"""Write the examples from_….py as notebooks beside them: python examples/notebooks.py.

A notebook has no command line: where the script reads its option --data, the reader may write a folder.
"""

import ast
from pathlib import Path
from typing import Any

import nbformat

FOLDER = Path(__file__).parent
NAMES = ("from_secretflow", "from_tff", "from_fate")
FOLDER_OF_DATA = 'folder: Path | None = None  # or Path("DIR")'
LAST = "run.plot()"


def without_command_line(source: str) -> str:
    """A cell's text; empty for one that only a command line needs."""
    if "argparse" not in source:
        return source
    return FOLDER_OF_DATA if "--data" in source else ""


def notebook(script: Path) -> Any:
    """A notebook with a cell for each group of lines between blank ones, and a figure of the run at the end."""
    text = script.read_text(encoding="utf-8")
    title, *statements = ast.parse(text.replace("import argparse\n", "\n", 1)).body
    lines = text.splitlines()
    groups: list[list[ast.stmt]] = []
    for statement in statements:
        is_next = groups and not any(not line for line in lines[groups[-1][-1].end_lineno or 0 : statement.lineno - 1])
        of_imports = groups and isinstance(statement, ast.Import | ast.ImportFrom)
        if is_next or of_imports:
            groups[-1].append(statement)
        else:
            groups.append([statement])
    sources = ["\n".join(lines[group[0].lineno - 1 : group[-1].end_lineno]) for group in groups]
    sources = [source for source in map(without_command_line, sources) if source]
    about = ast.literal_eval(title.value) if isinstance(title, ast.Expr) else ""
    cells = [nbformat.v4.new_markdown_cell(about.strip()), *map(nbformat.v4.new_code_cell, [*sources, LAST])]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def main() -> None:
    for name in NAMES:
        nbformat.write(notebook(FOLDER / f"{name}.py"), FOLDER / f"{name}.ipynb")
        print(f"examples/{name}.ipynb")


if __name__ == "__main__":
    main()
