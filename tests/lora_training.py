"""LoRA trainings of tiny models, and the gradients they must have had, by autograd in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_bases import VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mergeprobe_fast.io.probe import Snapshot

LORA = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM"}  # fmt: skip


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of two layers whose loss depends on every module."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.to(dtype)


def make_lora(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The Llama with a fresh adapter "default"."""
    base = make_llama(seed, dtype)
    return get_peft_model(base, LoraConfig(**LORA | config), autocast_adapter_dtype=False)


def draw_texts(rng: np.random.Generator, count: int, length: int = 8) -> list[dict[str, Any]]:
    """Sequences of a few tokens, of which a different number has a label."""
    texts = []
    for _ in range(count):
        ids = torch.from_numpy(rng.integers(0, VOCABULARY, length))
        labels = ids.clone()
        labels[: int(rng.integers(0, length - 2))] = -100
        texts.append({"input_ids": ids, "labels": labels})
    return texts


def collate(texts: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([text[key] for text in texts]) for key in texts[0]}


@dataclass
class Kept:
    """A collator that remembers what it gave out, in order."""

    batches: list[dict[str, torch.Tensor]]

    def __call__(self, texts: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        self.batches.append({key: value.clone() for key, value in collate(texts).items()})
        return collate(texts)


def make_trainer(
    model: Any, texts: Sequence[Any], folder: Path, *callbacks: Any, **arguments: Any
) -> tuple[Trainer, list[dict[str, torch.Tensor]]]:
    """A Trainer of two texts a batch, and the list that its batches will be added to."""
    given = {
        "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "dataloader_pin_memory": False, "seed": 7,
    }  # fmt: skip
    kept = Kept([])
    trainer = Trainer(
        model, TrainingArguments(str(folder), **given | arguments), train_dataset=list(texts),
        data_collator=kept, callbacks=list(callbacks),
    )  # fmt: skip
    return trainer, kept.batches


def batches_of(rng: np.random.Generator, count: int, size: int = 2) -> list[dict[str, Any]]:
    """Batches as a loop of one's own gets them."""
    return [collate(draw_texts(rng, size)) for _ in range(count)]


def trained_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(
    model: Any,
    batches: Sequence[Mapping[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    accumulation: int = 1,
    scaler: Any = None,
    clip: float | None = None,
    before: Callable[[int], None] | None = None,
    autocast: torch.dtype | None = None,
    set_to_none: bool = True,
) -> None:
    """A loop like everybody's: a step per ``accumulation`` batches; ``before`` is told which."""
    for first in range(0, len(batches), accumulation):
        if before:
            before(first // accumulation)
        for batch in batches[first : first + accumulation]:
            with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                loss = model(**batch).loss / accumulation
            (scaler.scale(loss) if scaler else loss).backward()
        if clip:
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained_parameters(model), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def overflowing(model: Any, at: int) -> Callable[[int], None]:
    """To be called before each attempt at a step: the gradient of that one is not finite."""
    parameter = trained_parameters(model)[0]
    state = {}
    parameter.register_hook(lambda g: g * torch.inf if state["attempt"] == at else g)
    return lambda attempt: state.update(attempt=attempt)


def sgd(model: Any, **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained_parameters(model), **{"lr": 0.5} | arguments)


def mean_loss(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over all tokens with a label in all batches of -log p(label), in float64."""
    total, count = 0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        log_p = torch.log_softmax(logits, -1)
        here = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        total = total - here[labels != -100].sum()
        count += int((labels != -100).sum())
    return total / count


def mean_of_losses(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over batches of their mean losses, as a loop that divides by their number has it."""
    losses = [mean_loss(model, [batch]) for batch in batches]
    return sum(losses) / len(losses)


@dataclass
class Truth:
    """What autograd in float64 says at a snapshot's factors, loaded by PEFT."""

    loss: float
    a: dict[str, np.ndarray]  # module -> dLoss/dA
    b: dict[str, np.ndarray]
    full: dict[str, np.ndarray]  # module -> dLoss/dW of the base weight: of the delta
    delta: dict[str, np.ndarray]
    factor_a: dict[str, np.ndarray]


def truth(
    snapshot: Snapshot,
    loss: Callable[[Any], torch.Tensor],
    base: Any = None,
) -> Truth:
    """Gradients of ``loss(model)`` at the factors of a snapshot, on a fresh base."""
    model = PeftModel.from_pretrained(base or make_llama(), str(snapshot.path)).double().eval()
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
    }  # fmt: skip
    for layer in layers.values():
        for weight in (layer.lora_A.default.weight, layer.lora_B.default.weight, layer.weight):
            weight.requires_grad_(True)
    found = loss(model)
    found.backward()

    def each(get: Callable[[Any], torch.Tensor]) -> dict[str, np.ndarray]:
        return {name: get(layer).detach().numpy().copy() for name, layer in layers.items()}

    return Truth(
        found.item(),
        each(lambda x: x.lora_A.default.weight.grad), each(lambda x: x.lora_B.default.weight.grad),
        each(lambda x: x.weight.grad), each(lambda x: x.get_delta_weight("default")),
        each(lambda x: x.lora_A.default.weight),
    )  # fmt: skip


def last(snapshot: Snapshot, which: Any = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    """Recorded gradients by A and by B, float64."""
    pairs = {m: snapshot.gradients(m, which) for m in snapshot.info.modules}
    return tuple({m: pair[i].astype(np.float64) for m, pair in pairs.items()} for i in (0, 1))


def error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Largest over modules of |found - expected| / |expected|, Frobenius."""
    assert list(found) == list(expected)
    return max(
        float(np.linalg.norm(found[m] - expected[m]) / np.linalg.norm(expected[m]))
        for m in expected
    )


def gradient_error(snapshot: Snapshot, expected: Truth, which: str = "last") -> float:
    """The same for all recorded gradients of A and B."""
    a, b = last(snapshot, which)
    return max(error(a, expected.a), error(b, expected.b))


def factors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Copies of all factors of an adapter, by parameter."""
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
        if f".{adapter}" in name and "lora_" in name
    }  # fmt: skip
