"""Adapters: tasks around models that were written for another library.

The names in `__all__` are public. A module of this room loads its library when it is used, and not before.
"""

from typing import TYPE_CHECKING

from ternbus.broker.exports import exports

if TYPE_CHECKING:
    from ternbus.edge.adapters.flower import Context, FlowerTask
    from ternbus.edge.adapters.hugging_face import HuggingFaceTask
    from ternbus.edge.adapters.lightning import LightningTask
    from ternbus.edge.adapters.sklearn import SklearnTask
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "ternbus.edge.adapters.flower": ["Context", "FlowerTask"],
            "ternbus.edge.adapters.hugging_face": ["HuggingFaceTask"],
            "ternbus.edge.adapters.lightning": ["LightningTask"],
            "ternbus.edge.adapters.sklearn": ["SklearnTask"],
        },
    )

__all__ = ["Context", "FlowerTask", "HuggingFaceTask", "LightningTask", "SklearnTask"]
