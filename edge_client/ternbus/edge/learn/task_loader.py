"""The loader of tasks by name: built-in tasks, tasks of installed modules, and tasks in the user's folder.

digits                    a built-in task
my_task:TASK              the attribute TASK of my_task.py in the current folder, or of an installed module
my_task                   the only task in my_task.py
./my_task.py:TASK         a file by its path; ~/my_task.py:TASK and /home/pi/my_task:TASK likewise
"""

import importlib
import os
import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, Self

import ternbus
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import former_names, task_folder
from ternbus.edge.learn.task import Task

BUILT_IN_TASKS: Mapping[str, str] = {
    "digits": "ternbus.edge.tasks.digits:TASK",
    "digits-numpy": "ternbus.edge.tasks.digits_numpy:TASK",
    "fashion-mnist": "ternbus.edge.tasks.fashion_mnist:TASK",
    "mnist-by-writer": "ternbus.edge.tasks.mnist_by_writer:TASK",
    "emnist-62": "ternbus.edge.tasks.emnist_62:TASK",
    "hapt": "ternbus.edge.tasks.hapt:TASK",
    "hapt-unseen": "ternbus.edge.tasks.hapt:UNSEEN_TASK",
    "cifar10-cnn": "ternbus.edge.tasks.cifar10_cnn:TASK",
    "cifar10-resnet": "ternbus.edge.tasks.cifar10_resnet:TASK",
    "cifar10-finetune": "ternbus.edge.tasks.cifar10_finetune:TASK",
    "cifar10-features": "ternbus.edge.tasks.cifar10_features:TASK",
}
NEEDED: Final = "a task needs name, default_plan, initial(), trainer() and evaluator()"
OTHERS: Final = (sysconfig.get_path("stdlib"), *ternbus.__path__)  # folders of code that no task's author wrote


def load_task(spec: str) -> Task:
    """The built-in task of this name, or the user's own: `module:attribute`, or the path of its file.

    Raises `ConfigError`, with what to write, or with the file and line at which the import of the module failed.
    """
    reference = _Reference.parse(spec)
    module = reference.load(spec)
    if not reference.attribute:
        return _only_task(spec, module)
    task = getattr(module, reference.attribute, None)
    if task is None:
        names = ", ".join(_tasks(module)) or "none"
        raise ConfigError(f"task {spec}: {module.__file__} has no {reference.attribute!r}; its tasks are: {names}")
    if isinstance(task, type) or not isinstance(task, Task):
        raise ConfigError(f"{spec} is not a task: {NEEDED}")
    return task


def absolute(spec: str) -> str:
    """The name of the same task for any current folder: with the path of its module, unless it is installed.

    Raises `ConfigError` if there is no such module.
    """
    reference = _Reference.parse(spec)
    if reference.folder is None:
        return spec
    return f"{reference.folder / reference.module}{reference.attribute and ':'}{reference.attribute}"


def expanded(path: Path) -> Path:
    """The path with the home folder instead of `~`; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises RuntimeError


def location_of(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame of the user's own code in the traceback; None if it has none."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno and _is_own(error.filename):
        return error.filename, error.lineno
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next(((file, line) for file, line in reversed(frames) if _is_own(file)), None)


def import_hint(error: BaseException) -> str:
    """The import to write instead of one with a name of version 0.1; empty for any other error."""
    if not isinstance(error, ImportError) or not former_names.current(error.name or ""):
        return ""
    place = location_of(error)
    own = error.path is not None and not isinstance(error, ModuleNotFoundError)  # the user's own broker.py, for example
    if place is None or own:
        return ""
    new = former_names.rewritten(Path(place[0]).read_bytes(), place[1])
    package = str(error.name).partition(".")[0]
    return f"{package} is now {former_names.PACKAGES[package]}: write `{new}`" if new else ""


def _is_own(file: str) -> bool:
    return file[:1] != "<" and "-packages" not in file and not any(Path(file).is_relative_to(other) for other in OTHERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """A module and an attribute; empty for the module's only task. `folder` is None for an installed module."""

    module: str
    attribute: str
    folder: Path | None = None

    @classmethod
    def parse(cls, spec: str) -> Self:
        module, colon, attribute = BUILT_IN_TASKS.get(spec, spec).partition(":")
        if spec in BUILT_IN_TASKS:
            return cls(module=module, attribute=attribute)
        if "/" in module or module.endswith(".py"):
            return cls._of_path(spec)
        if not module or (colon and not attribute):
            raise ConfigError(f"invalid task {spec!r}: write MODULE:ATTRIBUTE")
        here = Path.cwd()
        if task_folder.holds(here, module):
            return cls(module=module, attribute=attribute, folder=here)
        if not colon:
            names = ", ".join(BUILT_IN_TASKS)
            raise ConfigError(f"unknown task {spec!r}: choose {names}, or your own as MODULE:ATTRIBUTE")
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
        if not task_folder.holds(folder, module) or (is_file and not path.is_file()):
            wanted = path if is_file else f"{folder / module.replace('.', '/')}.py"
            raise ConfigError(f"task {spec}: no file {wanted}; correct the path")
        while (folder / "__init__.py").exists():
            folder, module = folder.parent, f"{folder.name}.{module}"
        return cls(module=module, attribute=attribute, folder=folder)

    def load(self, spec: str) -> ModuleType:
        if self.folder is not None and (taken := task_folder.taken_by(self.folder, self.module)):
            name = self.module.partition(".")[0]
            raise ConfigError(f"cannot import {name!r} from {self.folder}: {taken} has the same name; rename your file")
        try:
            if self.folder is None:
                return importlib.import_module(self.module)
            return task_folder.import_from(self.folder, self.module)
        except (ConfigError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too: a script may call sys.exit
            if message := self._explain(error, spec):
                raise ConfigError(message) from error
            raise

    def _explain(self, error: BaseException, spec: str) -> str:
        """The error message for the task's author; empty for a bug in Ternbus."""
        missing = (error.name or "") if isinstance(error, ImportError) else ""
        if missing in ("torch", "torchvision") and isinstance(error, ModuleNotFoundError):
            return f"the task {spec} needs {missing}: pip install torch torchvision, or use --task digits-numpy"
        if (
            self.folder is None
            and isinstance(error, ModuleNotFoundError)
            and f"{self.module}.".startswith(f"{missing}.")
        ):
            if new := former_names.current(self.module):
                return f"{self.module} is now {new}: write {spec.replace(self.module, new, 1)}"
            return f"task {spec}: no module {missing!r} is in {Path.cwd()} or installed; go to its folder or install it"
        place = location_of(error)
        if place is None and self.module.startswith("ternbus."):
            return ""
        file, line = place or (self.module, 0)
        message = import_hint(error) or _describe(error) + self._hint(error, missing)
        return f"{file}, line {line}: {message}" if place else f"{file}: {message}"

    def _hint(self, error: BaseException, missing: str) -> str:
        if isinstance(error, SystemExit):
            return "; put the script below `if __name__ == '__main__':`"
        if isinstance(error, ModuleNotFoundError):
            return f"; install it, or put {missing.partition('.')[0]}.py beside the task" if missing else ""
        if isinstance(error, ImportError) and "relative import" in str(error):
            return "; write PACKAGE.MODULE:ATTRIBUTE, and run the command in the folder above the package"
        path = error.path if isinstance(error, ImportError) else None
        if self.folder is not None and path is not None and not Path(path).is_relative_to(self.folder):
            return (
                f"; another {missing} is imported than {missing}.py of the task: rename it"
                if self._is_beside(missing)
                else ""
            )
        return ""

    def _is_beside(self, module: str) -> bool:
        return self.folder is not None and task_folder.holds(self.folder, module)


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) during the import"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _tasks(module: ModuleType) -> dict[str, Task]:
    return {
        name: value
        for name, value in vars(module).items()
        if name[:1] != "_" and not isinstance(value, type) and isinstance(value, Task)
    }


def _only_task(spec: str, module: ModuleType) -> Task:
    """The task of a module that has exactly one. Raises `ConfigError` otherwise."""
    found = _tasks(module)
    if not found:
        raise ConfigError(f"{module.__file__} has no task: {NEEDED}")
    if len({id(value) for value in found.values()}) > 1:
        raise ConfigError(
            f"{module.__file__} has more than one task: write {' or '.join(f'{spec}:{name}' for name in found)}"
        )
    return next(iter(found.values()))
