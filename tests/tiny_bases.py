"""Random base models of a few thousand weights, and data for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VOCABULARY = 48
WORDS = [f"w{i}" for i in range(VOCABULARY - 2)]
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {**_SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    # Windows in some layers, and two kinds of rotary angles.
    "Gemma3Text": {**_SIZES, "num_hidden_layers": 7, "num_key_value_heads": 2, "head_dim": 4,
                   "sliding_window": 4},
    "GPTNeoX": {**_SIZES, "num_hidden_layers": 2},
    "OPT": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Mixtral": {**_SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2,
                "num_local_experts": 4},
}


def make_base(folder: Path, kind: str = "Llama", *, seed: int = 0, **config: Any) -> Any:
    """Write a base model with a tokenizer of words, and return the model, in evaluation mode."""
    torch.manual_seed(seed)
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, **_IDS, **CONFIGS[kind], **config
    )
    model = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)  # so that every module has something to say
    save(model, folder)
    make_tokenizer().save_pretrained(folder)
    return model


def widened(model: Any) -> Any:
    """A Llama in float64 throughout: its norms would go to float32 and back."""

    def norm(module: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            size = x.square().mean(-1, keepdim=True) + module.variance_epsilon
            return module.weight * (x * torch.rsqrt(size))
        return forward

    for module in model.double().modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm(module)
    return model


def save(model: Any, folder: Path) -> None:
    with quiet():
        model.save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The whole model as transformers loads it."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Token i is the word "w<i>"; the last two ids are <s> and <unk>."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<s>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", chat_template=chat_template
    )


def write_ids(path: Path, sequences: Iterable[Sequence[int]]) -> Path:
    """A .jsonl of token ids."""
    lines = [json.dumps({"input_ids": [int(i) for i in ids]}) + "\n" for ids in sequences]
    path.write_text("".join(lines))
    return path


def draw_sequences(rng: np.random.Generator, lengths: Sequence[int]) -> list[np.ndarray]:
    return [rng.integers(0, VOCABULARY, length) for length in lengths]


def hooked_inputs(model: Any, sequences: Iterable[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What a plain run of the whole model feeds every Linear and Conv1D: (length, d_in) each.

    On one thread, as the pass runs: the last bits depend on it.
    """
    seen: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> Any:
        def record(module: Any, args: tuple) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            seen.setdefault(name, []).append(rows.float().numpy().copy())
        return record

    handles = [
        module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.from_numpy(ids)[None])
    torch.set_num_threads(threads)
    for handle in handles:
        handle.remove()
    return seen
