"""How a task is found by its name: one that ships with Ternbus, or the user's own module."""

import importlib
import sys
from collections.abc import Mapping

from ternbus.broker.errors import ConfigError
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


def load_task(spec: str) -> Task:
    """The task of that name, or the user's own as `module:attribute`. Raises `ConfigError`, which says the names."""
    own = ":" in spec
    if not own and spec not in BUILT_IN_TASKS:
        raise ConfigError(f"no task {spec!r}: choose {', '.join(BUILT_IN_TASKS)}, or your own as MODULE:ATTRIBUTE")
    module_name, _, attribute = (spec if own else BUILT_IN_TASKS[spec]).partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{spec!r} names no task: write MODULE:ATTRIBUTE")
    if own and "" not in sys.path:
        sys.path.insert(0, "")  # an installed command does not look in the folder that it is started in; people do
    task = getattr(_module(spec, module_name), attribute, None)
    if isinstance(task, type) or not isinstance(task, Task):
        raise ConfigError(f"{spec} is no task: it needs name, default_plan, initial(), trainer() and evaluator()")
    return task


def _module(spec: str, name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "torchvision"):
            raise ConfigError(
                f"the task {spec} needs {error.name}: pip install torch torchvision (or take --task digits-numpy)"
            ) from error
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(f"no module {error.name!r} for the task {spec}: is it here, or installed?") from error
        raise
