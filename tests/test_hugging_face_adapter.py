"""Hugging Face's models as tasks: what travels with LoRA and FFA-LoRA, and that it learns."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from support.simulated import simulated
from ternbus.broker.errors import ConfigError
from ternbus.edge.adapters import HuggingFaceTask
from ternbus.edge.learn.failure import describe
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import check
from ternbus.edge.torch.travelling_state import TravellingState

peft, transformers = (importlib.import_module(name) for name in ("peft", "transformers"))  # after torchvision_ops

WORDS = ["pad", "good", "fine", "great", "bad", "poor", "awful", "the", "film", "was", "a", "of"]
PLAN = {"optimizer": "adamw", "learning_rate": 5e-3, "batch_size": 16}


class Tokenizer:
    """Words by their number."""

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [[WORDS.index(word) for word in text.split()][:max_length] for text in texts]}


def base() -> Any:
    """A small BERT, drawn with a fixed seed in place of a checkpoint, with a new head."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = transformers.BertModel(config).state_dict()
    net = transformers.BertForSequenceClassification(config)
    net.bert.load_state_dict(encoder)
    return net


def sentences(folder: Path | None, split: str) -> tuple[list[str], list[int]]:
    """Sentences with one word that tells the label, in a random place."""
    random = np.random.RandomState({"train": 0, "test": 1}[split])
    texts, labels = [], []
    for number in range(320):
        words = list(random.choice(WORDS[7:], random.randint(3, 9)))
        words[random.randint(len(words))] = str(random.choice(WORDS[1:4] if number % 2 else WORDS[4:7]))
        texts.append(" ".join(words))
        labels.append(number % 2)
    return texts, labels


def lora(**changed: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", "target_modules": ["query", "value"], **changed}
    )


def task_of(**arguments: Any) -> HuggingFaceTask:
    common = {"name": "small", "base": base, "tokenizer": Tokenizer, "data": sentences, "default_plan": PLAN}
    return HuggingFaceTask(**{**common, **arguments})


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"peft": lora()}, 2 * 2 * 2 * 4 * 32 + 66),  # layers, matrices, A and B; and the head
        ({"peft": lora(), "ffa": True}, 2 * 2 * 4 * 32 + 66),
        ({"trained": ("classifier.*",)}, 66),
    ],
    ids=["lora", "ffa-lora", "head"],
)
def test_only_what_is_trained_travels(arguments: dict[str, Any], parameters: int) -> None:
    task = task_of(**arguments)
    assert sum(tensor.size for tensor in task.initial(0).values()) == parameters
    assert not check(task).problems


def test_the_whole_model_travels_without_peft() -> None:
    assert sum(tensor.size for tensor in task_of().initial(0).values()) == sum(p.numel() for p in base().parameters())


def test_what_does_not_travel_is_the_same_on_every_device() -> None:
    for arguments in ({"peft": lora()}, {"peft": lora(), "ffa": True}):
        task = task_of(**arguments)
        torch.manual_seed(5)
        first = TravellingState(task.model()).fixed
        torch.manual_seed(6)
        assert TravellingState(task.model()).fixed == first
        assert first


def test_the_frozen_a_of_ffa_lora_is_drawn_as_peft_draws_it() -> None:
    frozen = {
        name: value for name, value in task_of(peft=lora(), ffa=True).model().named_parameters() if ".lora_A." in name
    }
    drawn = {name: value for name, value in task_of(peft=lora()).model().named_parameters() if ".lora_A." in name}
    assert frozen.keys() == drawn.keys()
    assert not any(value.requires_grad for value in frozen.values())
    limit = 1 / np.sqrt(32)
    for values in (frozen, drawn):  # uniform within 1/sqrt(inputs)
        flat = torch.cat([value.detach().reshape(-1) for value in values.values()])
        assert 0.9 * limit < float(flat.abs().max()) <= limit
        assert abs(float(flat.std()) - limit / np.sqrt(3)) < 0.1 * limit
    first, other = list(frozen.values())[:2]
    assert not torch.equal(first, other)


def test_the_mean_of_devices_is_exact_with_ffa_lora_and_not_with_lora() -> None:
    """Of the matrices that are added to the weights: mean(B·A) against mean(B)·mean(A)."""

    def gap(**arguments: Any) -> float:
        task = task_of(peft=lora(), **arguments)
        start, plan = task.initial(0), Plan.from_meta({**PLAN, "local_steps": 20})
        trained = [
            task.trainer(data=None, partition=f"dirichlet:0.1:{index}/2:0")
            .train(start, plan, version=0, seed=index)
            .tensors
            for index in range(2)
        ]
        mean = {name: (trained[0][name] + trained[1][name]) / 2 for name in start}

        def added(tensors: Any) -> dict[str, Any]:
            values = {name: value.detach() for name, value in task.trained_model(tensors).named_parameters()}
            return {
                name: values[name] @ values[name.replace("lora_B", "lora_A")] for name in values if ".lora_B." in name
            }

        one, other, merged = added(trained[0]), added(trained[1]), added(mean)
        errors = [float((merged[name] - (one[name] + other[name]) / 2).norm() / merged[name].norm()) for name in merged]
        return max(errors)

    assert gap(ffa=True) < 1e-5
    assert gap() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("ffa", "rate"), [(False, 0.03), (True, 0.1)])
def test_a_federation_learns_as_central_training_does(ffa: bool, rate: float) -> None:
    task = task_of(peft=lora(), ffa=ffa, default_plan={**PLAN, "learning_rate": rate})
    found = simulated(task, devices=4, versions=8, local_epochs=3)
    plan = Plan.from_meta({**task.default_plan, "local_epochs": 6})
    central = task.trainer(data=None, partition="all").train(task.initial(0), plan, version=0, seed=0)
    reached = task.evaluator(data=None).evaluate(central.tensors).values["accuracy"]
    assert found.evaluation.values["accuracy"] > 0.8
    assert found.evaluation.values["accuracy"] > reached - 0.15


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_trained_model_is_saved_for_hugging_face_s_libraries(tmp_path: Path) -> None:
    task = task_of(peft=lora())
    plan = Plan.from_meta({**PLAN, "local_steps": 5})
    trained = task.trainer(data=None, partition="all").train(task.initial(0), plan, version=0, seed=0)
    save_file(dict(trained.tensors), tmp_path / "model.safetensors")
    net: Any = task.trained_model(load_file(tmp_path / "model.safetensors"))
    net.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    batch = task.collate([task.dataset(None, "test")[number] for number in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, net(**batch).logits)


def test_a_language_model_learns_from_texts_alone() -> None:
    def model() -> Any:
        torch.manual_seed(1)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=1, n_head=2)
        )

    task = task_of(base=model, data=lambda folder, split: sentences(folder, split)[0], causal=True, max_tokens=6,
                   peft=lora(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True))  # fmt: skip
    trainer, start = task.trainer(data=None, partition="iid:0/2"), task.initial(0)
    before = trainer.evaluate(start)
    trained = trainer.train(start, Plan.from_meta({**PLAN, "local_epochs": 5}), version=0, seed=0)
    after = trainer.evaluate(trained.tensors)
    assert before.values.keys() == {"loss"}
    assert after.values["loss"] < before.values["loss"] - 0.1
    batch = task.collate(task.dataset(None, "test")[:8])
    assert batch["input_ids"].shape[1] == 6
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ffa": True}, r"ffa is for LoRA: give peft=LoraConfig"),
        ({"peft": lora(), "trained": ("classifier.*",)}, "give peft or trained, and not both"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_of(**arguments)


def test_a_model_that_peft_cannot_adapt_is_told_in_words() -> None:
    with pytest.raises(ConfigError, match="PEFT cannot adapt BertForSequenceClassification: No modules were targeted"):
        task_of(peft=lora(target_modules=["nonsense"])).initial(0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["good film"], "returned list: return a tuple of texts, labels"),
        ((["good film"], [0, 1]), "returned 1 texts and 2 labels"),
        (([1, 2], [0, 1]), "returned a int among the texts"),
        (([], []), "returned no texts"),
    ],
)
def test_data_that_are_no_labelled_texts_are_told_with_file_and_line(given: Any, words: str) -> None:
    def data(folder: Path | None, split: str) -> Any:
        return given

    with pytest.raises(ConfigError, match=rf"^test_hugging_face_adapter.py, line \d+: data\(folder, 'train'\) {words}"):
        task_of(data=data).trainer(data=None, partition="all")


def test_without_peft_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the library peft: pip install 'ternbus\[hf\]'"):
        task_of(peft=lora).initial(0)


def test_an_exception_of_base_names_its_own_line() -> None:
    def broken() -> Any:
        raise OSError("no such checkpoint")

    with pytest.raises(OSError, match="no such checkpoint") as caught:
        task_of(base=broken).initial(0)
    assert "test_hugging_face_adapter.py" in describe(caught.value)


def test_a_base_that_is_no_model_is_said_with_its_place() -> None:
    base: Any = lambda: None  # noqa: E731 - it stands for a user's
    task = HuggingFaceTask(name="mine", base=base, tokenizer=base, data=base)
    with pytest.raises(ConfigError, match=r"line \d+: base\(\) returned NoneType: it must return a model$"):
        task.initial(0)
