"""The loader of tasks by name: built-in tasks, tasks of installed modules, and tasks in the user's folder.

digits                    a built-in task
my_task:TASK              the attribute TASK of my_task.py in the current folder, or of an installed module
my_task                   the only task in my_task.py
./my_task.py:TASK         a file by its path; ~/my_task.py:TASK and /home/pi/my_task:TASK likewise
"""

import importlib
import linecache
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, Self

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import expanded
from ternbus.broker.own_code import OURS, is_own, own_frames
from ternbus.broker.printable import printable
from ternbus.edge.learn import former_names, task_folder
from ternbus.edge.learn.task import Task

BUILT_IN_TASKS: Mapping[str, str] = {
    "digits": "ternbus.edge.tasks.digits:TASK",
    "digits-numpy": "ternbus.edge.tasks.digits_numpy:TASK",
    "digits-linear": "ternbus.edge.tasks.digits_numpy:LINEAR_TASK",
    "fashion-mnist": "ternbus.edge.tasks.fashion_mnist:TASK",
    "mnist-by-writer": "ternbus.edge.tasks.mnist_by_writer:TASK",
    "emnist-62": "ternbus.edge.tasks.emnist_62:TASK",
    "hapt": "ternbus.edge.tasks.hapt:TASK",
    "hapt-unseen": "ternbus.edge.tasks.hapt:UNSEEN_TASK",
    "cifar10-cnn": "ternbus.edge.tasks.cifar10_cnn:TASK",
    "cifar10-resnet": "ternbus.edge.tasks.cifar10_resnet:TASK",
    "cifar10-finetune": "ternbus.edge.tasks.cifar10_finetune:TASK",
    "cifar10-features": "ternbus.edge.tasks.cifar10_features:TASK",
    "reviews-lora": "ternbus.edge.tasks.movie_reviews:LORA_TASK",
    "reviews-ffa-lora": "ternbus.edge.tasks.movie_reviews:FFA_LORA_TASK",
    "reviews-head": "ternbus.edge.tasks.movie_reviews:HEAD_TASK",
    "reviews-full": "ternbus.edge.tasks.movie_reviews:FULL_TASK",
}
NEEDED: Final = "a task needs name, default_plan, initial(), trainer() and evaluator()"
SHOWN_CHARS: Final = 300  # of the message of an error of a task


def load_task(spec: str) -> Task:
    """The built-in task of this name, or the user's own: `module:attribute`, or the path of its file.

    Raises `ConfigError`, with what to write, or with the file and line at which the code of the module failed.
    """
    return _Reference.parse(spec).load(spec)


def absolute(spec: str) -> str:
    """The name of the same task for any current folder: with the path of its module, unless it is installed.

    Raises `ConfigError` if there is no such module.
    """
    reference = _Reference.parse(spec)
    if reference.folder is None:
        return spec
    return f"{reference.folder / reference.module}{reference.attribute and ':'}{reference.attribute}"


def source_of(spec: str) -> tuple[Path | None, str]:
    """The folder of a task's module, None if it is installed, and the module's name from there. Imports nothing.

    Raises `ConfigError` if there is no such module.
    """
    reference = _Reference.parse(spec)
    return reference.folder, reference.module


def from_folder(spec: str, folder: Path) -> str:
    """The name, for the current folder, of a task that a file in `folder` names: a relative path counts from there.

    So does a module that `folder` has. Any other name is unchanged.
    """
    module = spec.partition(":")[0]
    if folder == Path() or spec in BUILT_IN_TASKS or spec[:1] in ("~", "/") or "\0" in spec:
        return spec
    is_path = "/" in spec or module.endswith(".py")
    return str(folder / spec) if is_path or task_folder.holds(folder, module) else spec


def location_of(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame of the user's own code in the traceback; None if it has none."""
    if isinstance(error, SyntaxError):
        file, line = _read(error, "filename"), _read(error, "lineno")
        if isinstance(file, str) and isinstance(line, int) and file and line and is_own(file):
            return file, line
    return next(((frame.f_code.co_filename, line) for frame, line in reversed([*own_frames(error)])), None)


def import_hint(error: BaseException) -> str:
    """The import to write instead of one with a name of version 0.1; empty for any other error."""
    missing = _missing(error)
    if not former_names.current(missing):
        return ""
    place = location_of(error)
    if place is None or not (isinstance(error, ModuleNotFoundError) or _read(error, "path") is None):
        return ""  # not None: the user's own broker.py lacks the name, for example
    linecache.checkcache(place[0])
    new = former_names.advice("".join(linecache.getlines(place[0])), place[1])
    package = missing.partition(".")[0]
    return new and f"{package} is now {former_names.PACKAGES[package]}: {new}"


def code_errors() -> tuple[type[BaseException], ...]:
    """What to catch around the code of a task: in a thread of its own, whatever there is to raise.

    An exception that ended the thread of the trainings would leave a device that waits for good. The main thread has
    Ctrl-C too, which is not the task's.
    """
    if threading.current_thread() is threading.main_thread():
        return (Exception, SystemExit)  # it may call sys.exit
    return (BaseException,)


def described(error: BaseException) -> str:
    """Type and message of an error of a task's code, which may be of any kind: one printable line of limited length.

    Raises nothing, though the error's own methods may.
    """
    if isinstance(error, SystemExit):
        return _line(f"sys.exit({_text(_read(error, 'code'), repr)})")
    text = _text(_read(error, "msg") if isinstance(error, SyntaxError) else error, str)
    return _line(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _read(error: BaseException, name: str) -> object:
    """The attribute of an error; None if the error has none, or raises when it is read."""
    try:
        return getattr(error, name, None)
    except code_errors():  # a property of the task's own class may raise anything
        return None


def _text(value: object, convert: Callable[[object], str]) -> str:
    """The value as text. A value that cannot be converted is replaced by a remark."""
    try:
        return "".join(convert(value))  # of the class `str` itself, not of a class of the task
    except code_errors():  # a method of the task's own class may raise anything
        return f"({convert.__name__}() of it failed)"


def _line(text: str) -> str:
    """The text on one line, without control characters, and shortened to `SHOWN_CHARS`."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"


def _missing(error: BaseException) -> str:
    """The name of the module of an `ImportError`; empty for any other error, or if it has none."""
    name = _read(error, "name") if isinstance(error, ImportError) else None
    return name if isinstance(name, str) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """A module and an attribute; empty for the module's only task. `folder` is None for an installed module."""

    module: str
    attribute: str
    folder: Path | None = None

    @classmethod
    def parse(cls, spec: str) -> Self:
        try:
            return cls._parse(spec)
        except OSError as error:  # of a name that is too long, or of a current folder that has been deleted
            raise ConfigError(f"invalid task {_line(spec)!r}: {error.strerror}") from error

    @classmethod
    def _parse(cls, spec: str) -> Self:
        module, colon, attribute = BUILT_IN_TASKS.get(spec, spec).partition(":")
        if spec in BUILT_IN_TASKS:
            return cls(module=module, attribute=attribute)
        if ("/" in module or module.endswith(".py")) and "\0" not in spec:
            return cls._of_path(spec)
        if not all(module.split(".")) or "\0" in spec or (colon and not attribute):
            hint = ", or the path of its file, as ../my_task.py" if module[:1] == "." else ""
            raise ConfigError(f"invalid task {spec!r}: write MODULE:ATTRIBUTE{hint}")
        here = Path.cwd()
        _refuse_our_name(here, module)
        if task_folder.holds(here, module):
            return cls(module=module, attribute=attribute, folder=here)
        if not colon:
            names, file = ", ".join(BUILT_IN_TASKS), here / f"{module.replace('.', '/')}.py"
            raise ConfigError(
                f"unknown task {spec!r}: {_absence(file)}; choose {names}, or your own as MODULE:ATTRIBUTE"
            )
        return cls(module=module, attribute=attribute)

    @classmethod
    def _of_path(cls, spec: str) -> Self:
        """Parse FOLDER/MODULE or a file. The reference's folder is the one above the file's package."""
        text, _, attribute = spec.rpartition(":")
        if not text or "/" in attribute:
            text, attribute = spec, ""
        path = Path(os.path.abspath(expanded(Path(text))))  # noqa: PTH100 - links stay as they are
        folder, module = path.parent, path.name.removesuffix(".py")
        is_file = path.name != module
        if is_file and path.is_file() and "." in module:
            raise ConfigError(f"{path} has a dot in its name, so it cannot be imported as a module: rename it")
        _refuse_our_name(folder, module)
        if not task_folder.holds(folder, module) or (is_file and not path.is_file()):
            wanted = path if is_file else folder / f"{module.replace('.', '/')}.py"
            raise ConfigError(f"task {spec}: {_absence(wanted)}; correct the path")
        while (folder / "__init__.py").exists():
            folder, module = folder.parent, f"{folder.name}.{module}"
        return cls(module=module, attribute=attribute, folder=folder)

    def load(self, spec: str) -> Task:
        if self.folder is not None and (taken := task_folder.taken_by(self.folder, self.module)):
            name = self.module.partition(".")[0]
            other = _other_name(self.folder, self.module)
            raise ConfigError(f"cannot import {name!r} from {self.folder}: {taken} has the same name; {other}")
        try:
            if self.folder is None:
                return self._task(spec, importlib.import_module(self.module))
            return self._task(spec, task_folder.import_from(self.folder, self.module))
        except (ConfigError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too: a script may call sys.exit
            if message := self._explain(error, spec):
                raise ConfigError(message) from error
            raise

    def _task(self, spec: str, module: ModuleType) -> Task:
        """The task in the module. Raises `ConfigError`, or what the module's or the task's own code raises."""
        if not self.attribute:
            return _checked(_only_task(spec, module), spec)
        task = getattr(module, self.attribute, None)
        if task is None:
            names = ", ".join(_tasks(module)) or "none"
            raise ConfigError(f"task {spec}: {_file(module)} has no {self.attribute!r}; its tasks are: {names}")
        if isinstance(task, type):
            raise ConfigError(f"{spec} is a class: add a line such as TASK = {task.__name__}(), and name TASK")
        if not isinstance(task, Task):
            raise ConfigError(f"{spec} is not a task: {NEEDED}")
        return _checked(task, spec)

    def _explain(self, error: BaseException, spec: str) -> str:
        """The error message for the task's author; empty for a bug in Ternbus."""
        missing = _missing(error)
        if missing in ("torch", "torchvision") and isinstance(error, ModuleNotFoundError):
            return f"the task {spec} needs {missing}: pip install torch torchvision, or use --task digits-numpy"
        if (
            self.folder is None
            and isinstance(error, ModuleNotFoundError)
            and f"{self.module}.".startswith(f"{missing}.")
        ):
            if new := former_names.current(self.module):
                return f"{self.module} is now {new[0]}: write {spec.replace(self.module, new[0], 1)}"
            return f"task {spec}: no module {missing!r} is in {Path.cwd()} or installed; go to its folder or install it"
        place = location_of(error)
        if place is None and self.module.startswith("ternbus."):
            return ""
        file, line = place or (self.module, 0)
        file = printable(file)
        message = import_hint(error) or described(error) + self._hint(error, missing)
        return f"{file}, line {line}: {message}" if place else f"{file}: {message}"

    def _hint(self, error: BaseException, missing: str) -> str:
        if isinstance(error, SystemExit):
            return " during the import; put the script below `if __name__ == '__main__':`"
        if isinstance(error, ModuleNotFoundError):
            return self._hint_of_missing(missing) if missing else ""
        if isinstance(error, ImportError) and "relative import" in described(error):
            return "; write PACKAGE.MODULE:ATTRIBUTE, and run the command in the folder above the package"
        path = _read(error, "path") if isinstance(error, ImportError) else None
        if self.folder is not None and isinstance(path, str) and not task_folder.is_of(self.folder, missing, path):
            return (
                f"; another {missing} is imported than {missing}.py of the task: rename it"
                if self._is_beside(missing)
                else ""
            )
        return ""

    def _hint_of_missing(self, module: str) -> str:
        package = module.rpartition(".")[0]
        if package:  # Python imports the package first, so that one is there
            return f"; there is no such module in {_line(package)}: correct its name"
        if self._is_beside(module):  # a library has tried to import it, for example to load a pickle
            return f"; add `import {_line(module)}` at the top of the task"
        return f"; install it, or put {_line(module)}.py beside the task"

    def _is_beside(self, module: str) -> bool:
        return self.folder is not None and task_folder.holds(self.folder, module)


def _refuse_our_name(folder: Path, module: str) -> None:
    if module == OURS and (folder / f"{module}.py").exists():
        raise ConfigError(f"{folder / module}.py: {module} is the name of this library: rename the file")


def _other_name(folder: Path, module: str) -> str:
    """What to do where another module has the name of the task's module or package."""
    package, dot, _ = module.partition(".")
    if not dot:
        return "rename your file"
    if (folder / package / "__init__.py").exists():
        return "rename your folder"
    return f"name the task by its path, {module.replace('.', '/')}.py"


def _absence(file: Path) -> str:
    """Why there is no such file."""
    if file.is_symlink() and not file.exists():
        return f"{file} is a link to a file that does not exist"
    if file.is_dir():
        return f"{file} is a folder"
    if (folder := file.with_suffix("")).is_dir():
        return f"no file {file}, and the folder {folder} is not a module"
    return f"no file {file}"


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _tasks(module: ModuleType) -> dict[str, Task]:
    return {
        name: value
        for name, value in vars(module).items()
        if name[:1] != "_" and not isinstance(value, type) and isinstance(value, Task)
    }


def _checked(task: Task, spec: str) -> Task:
    """The task, if its name and its plan are of the right types: what a protocol checks is only that they exist."""
    for name, kind, wanted in (("name", str, "a text"), ("default_plan", Mapping, "a dict of keys and values")):
        if not isinstance(value := getattr(task, name), kind):
            raise ConfigError(f"the task {spec}: {name} is {type(value).__name__}, but must be {wanted}")
    return task


def _only_task(spec: str, module: ModuleType) -> Task:
    """The task of a module that has exactly one. Raises `ConfigError` otherwise."""
    found = _tasks(module)
    if not found:
        raise ConfigError(f"{_file(module)} has no task: {NEEDED}")
    if len({id(value) for value in found.values()}) > 1:
        raise ConfigError(
            f"{_file(module)} has more than one task: write {' or '.join(f'{spec}:{name}' for name in found)}"
        )
    return next(iter(found.values()))
