"""A random base of a few thousand weights that reads characters, and items for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import MadeAdapter
from tiny_bases import VOCABULARY, load, make_base, widened
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mergeprobe_fast.merge_peft.model.base import Base
from mergeprobe_fast.merge_peft.tasks.item import END_OF_TURN, Item

LETTERS = "\n abcdefghijklmnopqrstuvwxyz()[]:+-*.,<>=012345"
TOKENS = [*LETTERS, END_OF_TURN]
HIDDEN, FEED, KEYS = 16, 24, 8
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED, HIDDEN), "mlp.up_proj": (FEED, HIDDEN), "mlp.down_proj": (HIDDEN, FEED),
}  # fmt: skip


def character_tokenizer() -> Tokenizer:
    """A token a character, and the end of a turn."""
    assert len(TOKENS) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TURN])
    return tokenizer


def make_character_base(folder: Path, seed: int = 0) -> Base:
    """A random Llama of three layers that reads characters; its folder has the weights."""
    make_base(folder, seed=seed)
    model = load(folder, torch.float32)
    return Base(model, character_tokenizer(), "test/base", f"seed {seed}")


def wide_copy(base: Base, adapter: Mapping[str, np.ndarray] | MadeAdapter | None = None) -> Any:
    """The whole model in float64, with deltas added to its weights."""
    model = widened(copy.deepcopy(base.model))
    deltas = adapter or {}
    if isinstance(adapter, MadeAdapter):
        deltas = {name: m.delta for name, m in adapter.modules.items()}
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += torch.from_numpy(delta)
    return model


def token_log_likelihoods(
    model: Any, base: Base, prompt: str, answer: str
) -> tuple[np.ndarray, np.ndarray]:
    """log p of each token of an answer, and whether it is the likeliest: a text of its own."""
    head, tail = base.encode(prompt), base.encode(answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(head) - 1 : -1]
    labels = torch.tensor(tail)
    hit = rows.argmax(-1) == labels
    return rows.gather(1, labels[:, None])[:, 0].numpy(), hit.numpy()


def greedy(model: Any, base: Base, prompt: str, most: int) -> tuple[str, float]:
    """What the model writes, a token at a time by whole forward passes, and the closest call."""
    ids, written, margin = base.encode(prompt), [], np.inf
    while len(written) < most:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1].double()
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        written.append(int(logits.argmax()))
        if TOKENS[written[-1]] in ("\n", END_OF_TURN):
            return base.decode(written[:-1]), margin
    return base.decode(written), margin


def draw_text(rng: np.random.Generator, least: int, most: int) -> str:
    return "".join(rng.choice([*LETTERS[1:]], int(rng.integers(least, most + 1))))


def draw_item(rng: np.random.Generator, kind: str, domain: str = "any", **given: Any) -> Item:
    """An item of random characters; options of unequal lengths."""
    made: dict[str, Any] = {
        "domain": domain, "task": f"{domain}.{kind}", "prompt": draw_text(rng, 1, 20),
        "target": draw_text(rng, 1, 6) + END_OF_TURN, "kind": kind,
    }  # fmt: skip
    if kind in ("choice", "refusal"):
        options = [draw_text(rng, 1 + k, 3 + k) + END_OF_TURN for k in range(4)]
        made |= {"options": tuple(options), "target": options[int(rng.integers(4))]}
    if kind == "refusal":
        made["check"] = {"refuse": bool(rng.integers(2))}
    if kind == "code":
        made["check"] = {"tests": (("(1,)", "1"),)}
    made |= given
    return Item(key=made["prompt"], **made)
