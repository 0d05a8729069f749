"""The device: it follows the model, trains on its own data, and sends compressed updates.

The names in `__all__` are the public API for the author of a task. The built-in tasks are modules of
`ternbus.edge.tasks`. Everything else is private and may change.
"""

from typing import TYPE_CHECKING

from ternbus.broker.exports import exports

if TYPE_CHECKING:
    from ternbus.broker.errors import ConfigError
    from ternbus.edge.learn.accountant import epsilon
    from ternbus.edge.learn.metric import Metric, higher, lower
    from ternbus.edge.learn.noise import RandomSource
    from ternbus.edge.learn.partition import select
    from ternbus.edge.learn.subnetwork import channels
    from ternbus.edge.learn.task import Evaluation, PrivateTrainer, SharingTask, Task, Trained, Trainer, TrainingError
    from ternbus.edge.learn.task_loader import load_task
    from ternbus.edge.plan.plan import Plan
    from ternbus.edge.plan.privacy import Cost
    from ternbus.edge.plan.tensors import FloatArray, Tensors
    from ternbus.edge.torch.augmentation import per_sample
    from ternbus.edge.torch.torch_task import TorchTask
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "ternbus.broker.errors": ["ConfigError"],
            "ternbus.edge.learn.accountant": ["epsilon"],
            "ternbus.edge.learn.metric": ["Metric", "higher", "lower"],
            "ternbus.edge.learn.task_loader": ["load_task"],
            "ternbus.edge.learn.noise": ["RandomSource"],
            "ternbus.edge.learn.partition": ["select"],
            "ternbus.edge.learn.subnetwork": ["channels"],
            "ternbus.edge.learn.task": [
                "Evaluation",
                "PrivateTrainer",
                "SharingTask",
                "Task",
                "Trained",
                "Trainer",
                "TrainingError",
            ],
            "ternbus.edge.plan.plan": ["Plan"],
            "ternbus.edge.plan.privacy": ["Cost"],
            "ternbus.edge.plan.tensors": ["FloatArray", "Tensors"],
            "ternbus.edge.torch.augmentation": ["per_sample"],
            "ternbus.edge.torch.torch_task": ["TorchTask"],
        },
    )

__all__ = [
    "ConfigError",
    "Cost",
    "Evaluation",
    "FloatArray",
    "Metric",
    "Plan",
    "PrivateTrainer",
    "RandomSource",
    "SharingTask",
    "Task",
    "Tensors",
    "TorchTask",
    "Trained",
    "Trainer",
    "TrainingError",
    "channels",
    "epsilon",
    "higher",
    "load_task",
    "lower",
    "per_sample",
    "select",
]
