"""Hugging Face's models as tasks: fine-tuned whole, in a part, or by LoRA, of which only the adapters and the head
travel.

LoRA (Hu et al. 2022) adds B·A to a frozen weight, where A and B are narrow. The mean of devices' changes is
mean(B_k·A_k), but the merge takes the means of A_k and of B_k, whose product is another matrix: the more the devices
differ, the more. FFA-LoRA (Sun et al. 2024) draws A once and freezes it. Then mean(B_k·A) = mean(B_k)·A exactly, and an
update is half as large.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import ternbus.edge.torch.torchvision_ops  # noqa: F401 - before a library that imports torchvision
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.calls import place_of
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.torch.torch_task import Split, TorchTask
from ternbus.edge.torch.travelling_state import TravellingState

MAX_TOKENS: Final = 128
IGNORED: Final = -100  # of the labels of a language model: no loss is computed there
LORA_A: Final = ".lora_A."
EXTRA: Final = "pip install 'ternbus[hf]'"


class HuggingFaceTask(TorchTask):
    """A task of a Hugging Face model.

    `base()` returns the model, loaded from a folder or a package, and `tokenizer()` its tokenizer. `data(folder,
    split)` returns (texts, labels), or texts alone for a language model (`causal`). A text has at most `max_tokens`
    tokens; longer ones are cut.

    With `peft`, a LoraConfig or another configuration of PEFT, or a function that returns one, only what PEFT trains
    travels: the adapters, and the modules that it names in `modules_to_save`, such as a new head. `ffa` freezes LoRA's
    A, which every device draws alike (FFA-LoRA). Without `peft` all parameters are trained, or those whose names match
    a pattern of `trained`.

    Frozen weights do not travel: every device must load the same. Other arguments are those of `TorchTask`. Raises
    `ConfigError` if PEFT is missing, or the arguments contradict each other.
    """

    peft: Any = None
    ffa = False
    trained: Sequence[str] = ("*",)
    max_tokens = MAX_TOKENS
    causal = False

    def __init__(
        self,
        *,
        base: Callable[[], nn.Module],
        tokenizer: Callable[[], Any],
        peft: Any = None,
        ffa: bool = False,
        trained: Sequence[str] = ("*",),
        max_tokens: int = MAX_TOKENS,
        causal: bool = False,
        **arguments: Any,
    ) -> None:
        self.base, self.tokenizer, self.peft, self.ffa = base, tokenizer, peft, ffa
        self.trained, self.max_tokens, self.causal = trained, max_tokens, causal
        if causal and "metrics" not in arguments:
            arguments["metrics"] = {}  # its outputs, all words for all places, are too large to be kept
        super().__init__(**arguments)
        if ffa and peft is None:
            raise ConfigError(f"the task {self.name}: ffa is for LoRA: give peft=LoraConfig(…)")
        if peft is not None and tuple(trained) != ("*",):
            raise ConfigError(f"the task {self.name}: PEFT says what is trained: give peft or trained, and not both")

    def model(self) -> nn.Module:
        """The model with its adapters. Frozen tensors are the same at each call, on every device with this base."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a new head, of which PEFT keeps a frozen twin
            net: object = self.base()
        if not isinstance(net, nn.Module):
            raise ConfigError(f"{place_of(self.base)}base() returned {type(net).__name__}: it must return a model")
        if self.peft is not None:
            net = _adapted(net, self.peft)
        else:
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self.trained))
        if self.ffa and not _freeze_a(net):
            raise ConfigError(f"the task {self.name}: ffa is for LoRA, and the model has no parameter with {LORA_A!r}")
        return net

    def dataset(self, folder: Path | None, split: Split) -> list[dict[str, Tensor]]:
        """The samples, as token numbers; they are padded batch by batch."""
        given = super().dataset(folder, split)
        what = f"{place_of(self.data)}data(folder, {split!r})"
        texts, labels = (given, None) if self.causal else _pair(given, what)
        texts = list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ConfigError(f"{what} returned a {type(wrong[0]).__name__} among the texts: they must be str")
        if not texts:
            raise ConfigError(f"{what} returned no texts")
        rows = self.tokenizer()(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        inputs = [torch.tensor(row, dtype=torch.int64) for row in rows]
        if labels is None:
            return [{"input_ids": row} for row in inputs]
        targets = torch.as_tensor(labels)
        if len(targets) != len(texts):
            raise ConfigError(f"{what} returned {len(texts)} texts and {len(targets)} labels")
        return [{"input_ids": row, "labels": label} for row, label in zip(inputs, targets, strict=True)]

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A batch with `input_ids` and `attention_mask`, [samples, tokens of the longest], and `labels`."""
        rows = [sample["input_ids"] for sample in samples]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask}  # the mask hides padding
        if "labels" in samples[0]:
            return {**batch, "labels": torch.stack([sample["labels"] for sample in samples])}
        return {**batch, "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORED)}

    def trained_model(self, tensors: Tensors) -> nn.Module:
        """The model with a version's tensors, such as `safetensors.numpy.load_file` reads, in evaluation mode.

        Its `save_pretrained(folder)` writes what Hugging Face's libraries load.
        """
        net = self.model()
        TravellingState(net).load(tensors)
        return net.eval()


def _adapted(net: nn.Module, config: Any) -> nn.Module:
    try:
        from peft import get_peft_model  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"a task with peft needs the library {error.name}: {EXTRA}") from error
    try:
        made = config() if callable(config) else copy.deepcopy(config)  # get_peft_model writes into it
        with warnings.catch_warnings():  # of what PEFT asks transformers, which its user cannot change
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted: nn.Module = get_peft_model(net, made)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"PEFT cannot adapt {type(net).__name__}: {' '.join(str(error).split())}") from error
    return adapted


def _freeze_a(net: nn.Module) -> int:
    """Draw LoRA's A as PEFT does, from a stream that is the same on every machine, and freeze it. Returns how many."""
    random = np.random.RandomState(0)  # its stream is frozen (NEP 19), and torch's may round otherwise elsewhere
    found = 0
    for name, parameter in net.named_parameters():
        if LORA_A in name:
            drawn = (2 * random.random_sample(tuple(parameter.shape)) - 1) / np.sqrt(parameter[0].numel())
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(drawn))
            parameter.requires_grad = False
            found += 1
    return found


def _pair(given: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise ConfigError(f"{what} returned {type(given).__name__}: return a tuple of texts, labels")
    return given
