"""A task in a folder of the user's own: its modules are found there by the task, and by nobody else."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import former_names, task_folder
from ternbus.edge.learn.task_loader import absolute, load_task
from ternbus.edge.shell.preflight import check

# Names of Ternbus' own components in version 0.1, of what it depends on, of what it or they would import if it were
# installed, and of the standard library.
HOSTILE = [
    "broker", "lab/__init__", "aggregator/__init__", "edge_client/__init__", "safetensors", "numpy", "typer",
    "xxhash", "msgpack", "zstandard", "nacl", "paho/__init__", "rich", "click", "cryptography", "matplotlib", "opacus",
    "dp_accounting", "ternbus_rows", "attr", "IPython", "yaml", "onnx", "pandas", "tensorboard", "json", "queue",
    "sqlite3", "tempfile", "socket", "copy", "random", "statistics", "multiprocessing", "concurrent/__init__",
]  # fmt: skip
NOTES_AND_RAISES = """
import pathlib
with pathlib.Path({folder!r}, "IMPORTED").open("a") as notes:
    notes.write(__name__ + chr(10))
raise RuntimeError("somebody has imported " + __name__)
"""
TASK = """
import statistics, features  # Python's, and one's own
from ternbus.edge.tasks import digits_numpy

class Own(type(digits_numpy.TASK)):
    def trainer(self, **given):
        import in_time  # while it trains, not while it is imported
        return super().trainer(**given)

TASK = Own()
"""
IN_A_PACKAGE = """
from . import rates
from .rates import RATE
import features
from ternbus.edge.tasks.digits_numpy import TASK
"""
WITH_TORCH = """
import features
from ternbus.edge import TorchTask
from ternbus.edge.tasks.digits import data, model

TASK = TorchTask(name="own", model=model, data=data)
"""
# As pip's script `ternbus` starts it: the folder in which it runs is nowhere on sys.path.
SCRIPT = [sys.executable, "-P", "-c", "import sys; sys.path[:0] = ['/bin']; from ternbus.command import main; main()"]
MODULE = [sys.executable, "-m", "ternbus"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task of one's own among files whose names are those of other modules, each of which raises."""
    folder = tmp_path / "own folder"
    for name in HOSTILE:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTES_AND_RAISES.format(folder=str(folder)))
    (folder / "ternbus").mkdir()  # a namespace package would take it for a part of itself
    (folder / "ternbus" / "edge.py").write_text(NOTES_AND_RAISES.format(folder=str(folder)))
    (folder / "features.py").write_text("import deeper\n")
    (folder / "deeper.py").write_text("")
    (folder / "in_time.py").write_text("")
    (folder / "my_task.py").write_text(TASK)
    (folder / "torch_task.py").write_text(WITH_TORCH)
    (folder / "mytasks").mkdir()
    (folder / "mytasks" / "__init__.py").write_text("")
    (folder / "mytasks" / "rates.py").write_text("RATE = 0.05\n")
    (folder / "mytasks" / "digits.py").write_text(IN_A_PACKAGE)
    return folder


def ternbus(cwd: Path, *arguments: object, how: list[str] = MODULE, **environment: str) -> tuple[int, str, str]:
    ran = subprocess.run(
        [*how, *map(str, arguments)], cwd=cwd, env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is loaded from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "path_hooks", [*sys.path_hooks])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_task(spec)
    return str(caught.value)


def imported(folder: Path) -> str:
    """Which of the hostile modules somebody has imported."""
    notes = folder / "IMPORTED"
    return notes.read_text() if notes.exists() else ""


def test_the_hostile_modules_say_when_they_are_imported(folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "import queue"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert "somebody has imported queue" in ran.stderr
    assert imported(folder) == "queue\n"


@pytest.mark.parametrize("how", [MODULE, SCRIPT], ids=["python -m ternbus", "ternbus"])
@pytest.mark.parametrize("spec", ["my_task:TASK", pytest.param("torch_task:TASK", marks=pytest.mark.slow)])
def test_check_works_among_files_with_the_names_of_other_modules(folder: Path, how: list[str], spec: str) -> None:
    code, out, err = ternbus(folder, "edge", "check", spec, how=how)
    assert (code, err) == (0, "")
    assert out.endswith("ready\n")
    assert imported(folder) == ""


def test_a_task_may_be_named_in_any_of_these_ways(folder: Path) -> None:
    specs = [
        "my_task", "my_task:TASK", "my_task.py", "my_task.py:TASK", "./my_task:TASK", "./my_task.py:TASK",
        f"{folder}/my_task.py:TASK", f"{folder}/my_task", "~/my_task.py:TASK", "mytasks.digits:TASK",
        "mytasks/digits.py:TASK", "mytasks/digits", f"{folder}/mytasks.digits:TASK",
    ]  # fmt: skip
    program = f"from ternbus.edge import load_task\nfor spec in {specs}: print(load_task(spec).name)"
    command = [sys.executable, "-P", "-c", program]
    ran = subprocess.run(
        command, cwd=folder, env={**os.environ, "HOME": str(folder)}, capture_output=True, text=True, check=False
    )
    assert (ran.stdout.splitlines(), ran.stderr) == (["digits-numpy"] * len(specs), "")


def test_the_absolute_name_is_the_same_task_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert absolute("digits") == "digits"
    assert absolute("ternbus.edge.tasks.digits:TASK") == "ternbus.edge.tasks.digits:TASK"
    for spec in ("my_task:TASK", "./my_task.py:TASK", f"{folder}/mytasks/../my_task:TASK"):
        assert absolute(spec) == f"{folder}/my_task:TASK"
    assert absolute("my_task") == f"{folder}/my_task"
    for spec in ("mytasks.digits:TASK", "mytasks/digits.py:TASK"):
        assert absolute(spec) == f"{folder}/mytasks.digits:TASK"
        assert absolute(absolute(spec)) == absolute(spec)
    (folder / "a:b").mkdir()
    (folder / "a:b" / "my_task.py").write_text(TASK)
    assert absolute("./a:b/my_task.py:TASK") == f"{folder}/a:b/my_task:TASK"
    assert absolute("./a:b/my_task.py") == f"{folder}/a:b/my_task"


def test_it_is_found_from_another_folder(folder: Path, tmp_path: Path) -> None:
    for spec in (f"{folder}/my_task:TASK", f"{folder}/mytasks.digits:TASK"):
        assert ternbus(tmp_path, "edge", "init-model", spec, tmp_path / "m.st", "--force")[::2] == (0, "")


COMMANDS = {
    "check": ("edge", "check", "my_task:TASK"),
    "workers": ("lab", "simulate", "--task", "my_task:TASK", "--devices", "2", "--versions", "1", "--jobs", "2"),
    "run": ("lab", "run", "--task", "my_task:TASK", "--devices", "2", "--versions", "1"),
}


@pytest.mark.parametrize(
    "command", ["check", pytest.param("workers", marks=pytest.mark.slow), pytest.param("run", marks=pytest.mark.slow)]
)
def test_what_an_installed_library_imports_is_never_beside_the_task(folder: Path, command: str) -> None:
    """`not_installed` stands for something optional that a library tries to import, in an environment without it."""
    (folder / "not_installed.py").write_text(NOTES_AND_RAISES.format(folder=str(folder)))
    (folder / "library").mkdir()
    (folder / "library" / "third_party.py").write_text(
        "try:\n    import not_installed\nexcept ModuleNotFoundError:\n    pass\n"
        "def later():\n    import importlib, importlib.util\n"
        "    assert importlib.util.find_spec('not_installed') is None\n"
        "    importlib.import_module('not_installed')\n"
    )
    called = "import third_party\ntry:\n    third_party.later()\nexcept ModuleNotFoundError:\n    pass\n"
    (folder / "my_task.py").write_text(called + TASK)
    path = os.pathsep.join(filter(None, [str(folder / "library"), os.environ.get("PYTHONPATH")]))
    code, _, err = ternbus(folder, *COMMANDS[command], PYTHONPATH=path)
    assert (code, err, imported(folder)) == (0, "", "")


def test_a_task_finds_its_modules_by_importlib_and_its_pickles(folder: Path) -> None:
    (folder / "deeper.py").write_text("class Kept:\n    pass\n")
    lines = (
        "import importlib, pickle\nKept = importlib.import_module('deeper').Kept\npickle.loads(pickle.dumps(Kept()))\n"
    )
    (folder / "my_task.py").write_text(lines + TASK)
    assert ternbus(folder, "edge", "init-model", "my_task:TASK", "m.st")[::2] == (0, "")


@pytest.mark.parametrize("name", ["queue", "safetensors", "sys"])
@pytest.mark.parametrize("spec", ["{}:TASK", "./{}.py:TASK"])
def test_a_task_with_the_name_of_another_module_is_refused_in_words(here: Path, name: str, spec: str) -> None:
    (here / f"{name}.py").write_text(TASK)
    words = refused(spec.format(name))
    assert words.startswith(f"cannot import '{name}' from {here}: ")
    assert words.endswith(" has the same name; rename your file")


@pytest.fixture
def installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a virtual environment inside the task's folder has its libraries."""
    packages = here / ".venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.syspath_prepend(packages)
    return packages


def test_a_virtual_environment_in_the_task_s_folder_has_names_that_are_taken_too(here: Path, installed: Path) -> None:
    (installed / "a_library").mkdir()
    library = installed / "a_library" / "__init__.py"
    library.write_text("")
    (here / "a_library.py").write_text(TASK)
    taken = f"cannot import 'a_library' from {here}: {library} has the same name; "
    assert refused("a_library:TASK") == f"{taken}rename your file"
    (here / "my_task.py").write_text("from a_library import own_reader\n")
    assert refused("my_task:TASK").endswith("; another a_library is imported than a_library.py of the task: rename it")


def test_a_task_in_a_folder_with_a_library_s_name_is_named_by_its_path(here: Path, installed: Path) -> None:
    """As opacus, which installs a package `examples`."""
    for folder in (installed, here):
        (folder / "a_package").mkdir()
    library = installed / "a_package" / "__init__.py"
    library.write_text("")
    (here / "a_package" / "my_task_in_it.py").write_text("from ternbus.edge.tasks.digits_numpy import TASK\n")
    taken = f"cannot import 'a_package' from {here}: {library} has the same name; "
    assert refused("a_package.my_task_in_it:TASK") == f"{taken}name the task by its path, a_package/my_task_in_it.py"
    assert load_task("a_package/my_task_in_it.py").name == "digits-numpy"
    (here / "a_package" / "__init__.py").write_text("")
    assert refused("a_package/my_task_in_it.py") == f"{taken}rename your folder"


RAISES = """
class Own:
    default_plan = {}
    initial = trainer = evaluator = lambda self: None
    @property
    def name(self): raise OSError("no disk")
TASK = Own()
"""
WRONG = {
    "a syntax error": ("import json\n\ndef f(:\n", "line 3: SyntaxError: invalid syntax"),
    "a name": ("x = 1\nTASK = undefined\n", "line 2: NameError: name 'undefined' is not defined"),
    "a module that is not there": (
        "\nimport no_such_lib\n",
        "line 2: ModuleNotFoundError: No module named 'no_such_lib'; install it, or put no_such_lib.py beside the task",
    ),
    "an exception": ("if True:\n    raise ValueError('bad luck')\n", "line 2: ValueError: bad luck"),
    "an exception in the standard library": ("import json\njson.loads('{')\n", "line 2: JSONDecodeError: Expecting "),
    "an assertion": ("assert 1 == 2\n", "line 1: AssertionError"),
    "sys.exit": (
        "import sys\nsys.exit(3)\n",
        "line 2: sys.exit(3) during the import; put the script below `if __name__ == '__main__':`",
    ),
    "recursion": ("def f():\n    return f()\nf()\n", "line 2: RecursionError: maximum recursion depth exceeded"),
    "a relative import": (
        "from . import features\n",
        "line 1: ImportError: attempted relative import with no known parent package; write PACKAGE.MODULE:ATTRIBUTE",
    ),
    "a name that a library lacks": (
        "from safetensors import trees\n",
        "line 1: ImportError: cannot import name 'trees' from 'safetensors'",
    ),
    "bytes that are no UTF-8": ("\udcff", "line 1: SyntaxError: (unicode error) 'utf-8' codec can't decode"),
    "a module that an installed package lacks": (
        "import numpy.nope\n",
        "line 1: ModuleNotFoundError: No module named 'numpy.nope'; there is no such module in numpy: correct its name",
    ),
    "a module that this library lacks": (
        "import ternbus.edge.nope\n",
        "line 1: ModuleNotFoundError: No module named 'ternbus.edge.nope'; there is no such module in ternbus.edge: ",
    ),
    "an exception whose text cannot be made": (
        "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E\n",
        "line 4: E: (str() of it failed)",
    ),
    "an exception whose text ends the process": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E\n",
        "line 4: E: (str() of it failed)",
    ),
    "an import error whose name raises": (
        "class E(ImportError):\n    name = path = property(lambda self: 1 / 0)\nraise E('odd')\n",
        "line 3: E: odd",
    ),
    "a syntax error with no file name": ("raise SyntaxError('odd', (5, 'x', 1, ''))\n", "line 1: SyntaxError: odd"),
    "an exit code whose text cannot be made": (
        "class C:\n    def __repr__(self):\n        raise ValueError\nraise SystemExit(C())\n",
        "line 4: sys.exit((repr() of it failed)) during the import; ",
    ),
    "control characters": (
        "raise ValueError('\\x1b[2J\\nred\\x00' + 5000 * 'x')\n",
        f"line 1: ValueError: ?[2J red?{(300 - len('ValueError: ?[2J red?') - 1) * 'x'}…",
    ),
    "a NUL byte": ("x = 1\ny = '\0'\n", "line 2: SyntaxError: the file has a NUL byte"),
    "a module that raises for a name": (
        "def __getattr__(name):\n    raise ValueError(name)\n",
        "line 2: ValueError: TASK",
    ),
    "a task that raises": (RAISES, "line 6: OSError: no disk"),
    "an old name": (
        "import json\n\nfrom edge_client.torch_trainer import TorchTask\n",
        "line 3: edge_client is now ternbus.edge: write `from ternbus.edge import TorchTask`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_fails_while_a_task_is_imported_is_one_line_with_the_task_s_own_line(here: Path, case: str) -> None:
    source, words = WRONG[case]
    (here / "my_task.py").write_bytes(source.encode("utf-8", "surrogateescape"))
    said = refused("my_task:TASK")
    assert said.startswith(f"{here}/my_task.py, {words}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("case", ["a syntax error", "sys.exit", "an old name"])
def test_the_command_prints_that_line_and_ends_with_exit_code_2(tmp_path: Path, case: str) -> None:
    source, words = WRONG[case]
    (tmp_path / "my_task.py").write_text(source)
    assert ternbus(tmp_path, "edge", "check", "my_task:TASK") == (2, "", f"ternbus: {tmp_path}/my_task.py, {words}\n")


def test_a_module_with_a_nul_byte_is_named_if_the_task_imports_it(here: Path) -> None:
    (here / "features.py").write_text("\n\0")
    (here / "my_task.py").write_text("import features\n")
    assert refused("my_task:TASK") == f"{here}/features.py, line 2: SyntaxError: the file has a NUL byte"


def test_the_only_task_of_a_module_may_raise_when_it_is_looked_at(here: Path) -> None:
    (here / "my_task.py").write_text(RAISES)
    assert refused("my_task") == f"{here}/my_task.py, line 6: OSError: no disk"


def test_a_module_beside_the_task_that_a_library_asks_for_is_to_be_imported_by_the_task(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "library").mkdir()
    (here / "library" / "unpickler.py").write_text(
        "import importlib\ndef load():\n    importlib.import_module('nets')\n"
    )
    monkeypatch.syspath_prepend(here / "library")
    (here / "nets.py").write_text("")
    (here / "my_task.py").write_text("import unpickler\nunpickler.load()\n")
    assert refused("my_task:TASK").endswith("No module named 'nets'; add `import nets` at the top of the task")
    (here / "good_task.py").write_text(
        "import nets, unpickler\nunpickler.load()\nfrom ternbus.edge.tasks.digits_numpy import TASK\n"
    )
    assert load_task("good_task:TASK").name == "digits-numpy"


def test_ctrl_c_while_a_task_is_imported_is_ctrl_c(here: Path) -> None:
    (here / "my_task.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_task("my_task:TASK")


def test_the_line_is_that_of_the_module_beside_the_task_if_it_is_that_one_s_fault(here: Path) -> None:
    (here / "features.py").write_text("\n\n1 / 0\n")
    (here / "my_task.py").write_text("import features\n")
    assert refused("my_task:TASK") == f"{here}/features.py, line 3: ZeroDivisionError: division by zero"


def test_a_name_that_an_installed_module_hides_is_explained(here: Path) -> None:
    (here / "safetensors.py").write_text("own_reader = 1\n")
    (here / "my_task.py").write_text("from safetensors import own_reader\n")
    assert refused("my_task:TASK").endswith(
        "; another safetensors is imported than safetensors.py of the task: rename it"
    )


UNCLEAR = {
    "none": "unknown task 'none': no file {here}/none.py; choose digits, ",
    "folder": "unknown task 'folder': no file {here}/folder.py, and the folder {here}/folder is not a module; choose ",
    "dangling": "unknown task 'dangling': {here}/dangling.py is a link to a file that does not exist; choose digits, ",
    "./dangling.py": "task ./dangling.py: {here}/dangling.py is a link to a file that does not exist; correct the path",
    "./folder": "task ./folder: no file {here}/folder.py, and the folder {here}/folder is not a module; correct",
    "folder/inner.py": "task folder/inner.py: {here}/folder/inner.py is a folder; correct the path",
    "ternbus": "{here}/ternbus.py: ternbus is the name of this library: rename the file",
    "ternbus:TASK": "{here}/ternbus.py: ternbus is the name of this library: rename the file",
    "./ternbus.py:TASK": "{here}/ternbus.py: ternbus is the name of this library: rename the file",
    "..two:TASK": "invalid task '..two:TASK': write MODULE:ATTRIBUTE, or the path of its file, as ../my_task.py",
    "two..one:TASK": "invalid task 'two..one:TASK': write MODULE:ATTRIBUTE",
    "./two\0.py:TASK": "invalid task './two\\x00.py:TASK': write MODULE:ATTRIBUTE",
    f"./{300 * 'x'}.py": f"invalid task './{297 * 'x'}…': File name too long",
    "sys:TASK": "task sys:TASK: sys has no 'TASK'; its tasks are: none",
    "none:TASK": "task none:TASK: no module 'none' is in {here} or installed; go to its folder or install it",
    "./none.py": "task ./none.py: no file {here}/none.py; correct the path",
    "./none:TASK": "task ./none:TASK: no file {here}/none.py; correct the path",
    "my.task.py:TASK": "{here}/my.task.py has a dot in its name",
    "two": "{here}/two.py has more than one task: write two:ONE or two:OTHER",
    "two:THIRD": "task two:THIRD: {here}/two.py has no 'THIRD'; its tasks are: ONE, OTHER",
    "two:copy": "two:copy is not a task: a task needs name, ",
    "classes:Mine": "classes:Mine is a class: add a line such as TASK = Mine(), and name TASK",
    "empty": "{here}/empty.py has no task: a task needs name, ",
    ":TASK": "invalid task ':TASK': write MODULE:ATTRIBUTE",
    "two:": "invalid task 'two:': write MODULE:ATTRIBUTE",
    "edge_client.tasks.digits:TASK": "edge_client.tasks.digits is now ternbus.edge.tasks.digits: write ternbus.edge.",
}


@pytest.mark.parametrize("spec", UNCLEAR)
def test_a_name_that_is_not_clear_is_answered_with_what_to_write(here: Path, spec: str) -> None:
    (here / "empty.py").write_text("")
    (here / "classes.py").write_text("class Mine:\n    pass\n")
    (here / "my.task.py").write_text("")
    (here / "ternbus.py").write_text("")
    (here / "dangling.py").symlink_to(here / "nowhere.py")
    (here / "folder" / "inner.py").mkdir(parents=True)
    two = "import copy\nfrom ternbus.edge.tasks.digits_numpy import TASK as ONE\nOTHER = copy.copy(ONE)\n"
    (here / "two.py").write_text(two)
    assert refused(spec).startswith(UNCLEAR[spec].format(here=here))


REWRITTEN = {
    "from edge_client.trainer import Evaluation, Plan as P": "write `from ternbus.edge import Evaluation, Plan as P`",
    "from edge_client.trainer import load_task, BUILT_IN_TASKS": (
        "write `from ternbus.edge import load_task; from ternbus.edge.learn.task_loader import BUILT_IN_TASKS`"
    ),
    "from edge_client.noise import Chance": "write `from ternbus.edge import RandomSource as Chance`",
    "from edge_client.terngrad import ternarize": "write `from ternbus.edge.learn.terngrad import ternarize`",
    "from edge_client.torch_model import TravellingState, hidden": (
        "write `from ternbus.edge.torch.travelling_state import TravellingState`; "
        "edge_client.torch_model.hidden is no longer public; see docs/tasks.md"
    ),
    "from edge_client.tasks.digits import data, model": "write `from ternbus.edge.tasks.digits import data, model`",
    "from edge_client.tasks import digits": "write `from ternbus.edge.tasks import digits`",
    "from edge_client.tasks import none": "edge_client.tasks.none is no longer public; see docs/tasks.md",
    "from edge_client import torch_trainer": "write `from ternbus.edge.torch import trainer as torch_trainer`",
    "import edge_client.partition as part": "write `import ternbus.edge.learn.partition as part`",
    "import edge_client.follower": "edge_client.follower is no longer public; see docs/tasks.md",
    "import edge_client": "write `import ternbus.edge`",
    "import json; import edge_client.torch_trainer, numpy as np": (
        "write `import ternbus.edge.torch.trainer, numpy as np`"
    ),
    "from broker.errors import ConfigError": "write `from ternbus.broker import ConfigError`",
    "from lab.scenario import End, load": (
        "write `from ternbus.lab import End; from ternbus.lab.scenario.scenario import load`"
    ),
    "from aggregator.ledger import Ledger": "aggregator.ledger.Ledger is no longer public; see docs/tasks.md",
    "from somewhere import Task": "",
    "x = 1": "",
}


@pytest.mark.parametrize("old", REWRITTEN)
def test_an_import_of_version_0_1_is_rewritten(old: str) -> None:
    assert former_names.advice(f"import json\nif True:\n    {old}\n", 3) == REWRITTEN[old]


def test_the_advice_for_an_old_import_loads_no_torch() -> None:
    code = (
        "import sys\nfrom ternbus.edge.learn.former_names import advice\n"
        f"for old in {list(REWRITTEN)}: advice(old, 1)\nprint('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


@pytest.mark.parametrize("old", former_names.MODULES)
def test_every_import_that_is_advised_for_an_old_module_works(old: str) -> None:
    former = {new: name for name, new in former_names.RENAMED.items()}
    names = {name for new in former_names.MODULES[old] for name in former_names.names_in(new)}
    advised = former_names.advice(f"import {old}", 1)
    if names:
        advised += former_names.advice(
            f"from {old} import {', '.join(former.get(name, name) for name in sorted(names))}", 1
        )
    assert "no longer" not in advised
    for statement in advised.split("`")[1::2]:
        exec(statement, {})


def test_every_new_package_exists() -> None:
    for package in former_names.PACKAGES.values():
        importlib.import_module(package)


def test_an_old_name_that_a_folder_of_the_same_name_lacks_is_explained(here: Path) -> None:
    (here / "edge_client").mkdir()
    (here / "edge_client" / "__init__.py").write_text("")
    (here / "my_task.py").write_text("from edge_client.terngrad import ternarize\n")
    assert refused("my_task:TASK").endswith("write `from ternbus.edge.learn.terngrad import ternarize`")
    (here / "other_task.py").write_text("from edge_client.mine import ternarize\n")
    assert refused("other_task:TASK").endswith("; there is no such module in edge_client: correct its name")


def test_an_old_name_below_a_folder_of_the_same_name_is_explained(here: Path) -> None:
    (here / "edge_client").mkdir()
    (here / "edge_client" / "mine.py").write_text("")
    (here / "my_task.py").write_text("import edge_client.mine\nimport edge_client.torch_trainer\n")
    said = refused("my_task:TASK")
    assert "line 2: edge_client is now ternbus.edge: write `import ternbus.edge.torch.trainer`" in said


def test_a_broker_py_of_the_user_s_own_that_lacks_a_name_is_not_taken_for_ternbus_s(here: Path) -> None:
    (here / "broker.py").write_text("")
    (here / "my_task.py").write_text("from broker import Link\n")
    assert "line 1: ImportError: cannot import name 'Link' from 'broker'" in refused("my_task:TASK")


def test_an_old_import_inside_a_function_is_explained_by_check(here: Path) -> None:
    late = TASK.replace("import in_time", "from edge_client.partition import select").replace(", features", "")
    (here / "my_task.py").write_text(late)
    (said,) = check(load_task("my_task:TASK")).problems
    assert said == "edge_client is now ternbus.edge: write `from ternbus.edge import select` (my_task.py, line 7)"


def test_an_error_whose_text_cannot_be_made_is_a_problem_of_check(here: Path) -> None:
    unclear = "class E(Exception):\n            def __str__(self): raise ValueError\n        raise E"
    (here / "my_task.py").write_text(TASK.replace("import in_time", unclear).replace(", features", ""))
    (said,) = check(load_task("my_task:TASK")).problems
    assert said == "trainer() raised E: (str() of it failed) (my_task.py, line 9)"


def test_the_user_s_own_broker_and_lab_are_the_task_s_if_it_imports_them(folder: Path) -> None:
    for name in ("broker.py", "lab/__init__.py"):
        (folder / name).write_text("OWN = 1\n")
    (folder / "my_task.py").write_text(f"from broker import OWN\nimport lab\nassert lab.OWN\n{TASK}")
    assert ternbus(folder, "edge", "check", "my_task:TASK")[::2] == (0, "")
    assert imported(folder) == ""


def test_a_second_folder_s_module_of_the_same_name_is_not_taken_for_the_first_s(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_task.py").write_text("from ternbus.edge.tasks.digits_numpy import TASK\n")
    program = """
from ternbus.edge import ConfigError, load_task
load_task("one/same_task:TASK")
load_task("one/same_task.py:TASK")
try:
    load_task("other/same_task:TASK")
except ConfigError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == (
        f"cannot import 'same_task' from {tmp_path}/other: {tmp_path}/one/same_task.py has the same name; "
        "rename your file\n"
    )


def test_nothing_is_imported_to_see_whether_a_folder_holds_a_module(folder: Path) -> None:
    for name in ("safetensors", "lab", "mytasks.digits"):
        assert task_folder.holds(folder, name)
    assert not task_folder.holds(folder, "mytasks.nothing")
    assert not task_folder.holds(folder, "nothing.digits")
    assert not task_folder.holds(folder, "ternbus.edge")
    assert imported(folder) == ""


@pytest.mark.slow
@pytest.mark.parametrize("how", [MODULE, SCRIPT], ids=["python -m ternbus", "ternbus"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_simulate_works_there_in_workers_too(folder: Path, jobs: int, how: list[str]) -> None:
    arguments = ["--task", "my_task:TASK", "--devices", "4", "--versions", "2", "--jobs", str(jobs), "--json"]
    code, out, err = ternbus(folder, "lab", "simulate", *arguments, "--out", "out", how=how)
    assert code == 0, err
    assert json.loads(out)["scenario"]["task"] == "my_task:TASK"
    assert imported(folder) == ""


@pytest.mark.slow
def test_run_works_there_with_hostile_devices(folder: Path) -> None:
    (folder / "scenario.toml").write_text(
        'task = "my_task:TASK"\ndevices = 3\n[end]\nversions = 2\n[[hostile]]\nkind = "free-rider"\nshare = 0.34\n'
    )
    code, _, err = ternbus(folder, "lab", "run", "scenario.toml", "--out", "out")
    assert code == 0, err
    assert imported(folder) == ""
    settings = (folder / "out" / "devices" / "device-0" / "edge.toml").read_text()
    assert f"{folder}/my_task:TASK" in settings


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "simulate"])
def test_a_task_that_cannot_be_imported_ends_the_lab_with_its_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "my_task.py").write_text("\nimport no_such_lib\n")
    code, _, err = ternbus(tmp_path, "lab", command, "--task", "my_task:TASK", "--out", "out")
    assert code == 2
    assert f"{tmp_path}/my_task.py, line 2: ModuleNotFoundError" in err
    assert len(err.splitlines()) == 1
