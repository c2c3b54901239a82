"""What routers see of prompts: their tokens, and what enters the lowest adapted layer."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.atomic_file import AtomicFile

from ..model.base import Base
from ..model.batches import cut, pack
from ..model.suffix import Suffix, threads_of
from ..tasks.words import SPLITS, Split
from ..tiers.plan import Tier

FOLDER = "routing"


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one split of an exam, as a router sees them.

    Attributes:
        states: (n, 2 hidden) float32: the mean state of a prompt's tokens, and the last one's.
        tokens: the n prompts, token ids each.
        keys: what the n prompts ask.
    """

    states: np.ndarray
    tokens: tuple[np.ndarray, ...]
    keys: tuple[str, ...]


def read_prompts(
    run_dir: str | os.PathLike[str], tier: Tier, exam: str, base: Base, *,
    threads: int | None = None,
) -> dict[Split, Prompts]:  # fmt: skip
    """The prompts of an exam: out of ``run_dir/routing``, where they are put the first time.

    Those of the split test are all its items, of the others there are ``tier.calibration_items``.

    Args:
        base: the model, with no adapter applied.
        threads: of torch, while this runs; default: as many as it has.

    Raises:
        InputError: a file of other prompts or of another model.
    """
    counts = {split: tier.calibration_items for split in SPLITS} | {"test": tier.test_items}
    items = {
        split: tier.exams[exam].items(split, n, tier.seed) for split, n in counts.items()
    }  # fmt: skip
    tokens = [np.array(base.encode(i.prompt), np.int64) for part in items.values() for i in part]
    digest = hashlib.sha256(f"{base.fingerprint}/{tier.first_layer}".encode())
    for ids in tokens:
        digest.update(ids.tobytes() + b"\0")
    path = Path(run_dir) / FOLDER / f"{exam}.npz"
    if not path.exists():
        with threads_of(threads):
            states = prompt_states(base, tier.first_layer, tokens)
        with AtomicFile(path) as temporary, temporary.open("wb") as file:
            np.savez(file, states=states, digest=np.array(digest.hexdigest()))
    try:
        with path.open("rb") as file, np.load(file) as read:
            states, found = read["states"], str(read["digest"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot be read: {error}", path=path) from error
    if found != digest.hexdigest() or len(states) != len(tokens):
        raise InputError("is of other prompts, or of another model; remove it", path=path)
    ends = np.cumsum([len(part) for part in items.values()])
    return {
        split: Prompts(states[end - len(part) : end], tuple(tokens[end - len(part) : end]),
                       tuple(f"{i.task}/{i.key}" for i in part))
        for (split, part), end in zip(items.items(), ends, strict=True)
    }  # fmt: skip


@torch.no_grad()
def prompt_states(base: Base, first_layer: int, tokens: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 2 hidden) float32: means and last tokens of what enters a layer, prompt by prompt.

    Raises:
        InputError: a prompt without tokens, no such layer, states that are not finite.
    """
    if not all(map(len, tokens)):
        raise InputError("a prompt has no tokens", key="item")
    runner = base.runner(first_layer)
    rows = [pack(ids.tolist(), [[0]]) for ids in tokens]
    found: list[np.ndarray | None] = [None] * len(rows)
    for chosen, batch in cut(rows, base.device):
        if isinstance(runner, Suffix):
            hidden = runner.run(runner.embed(batch.ids), batch, 0, first_layer)
        else:  # by the model's own forward, to its end
            out = base.model(input_ids=batch.ids, attention_mask=batch.real.long(),
                             output_hidden_states=True, use_cache=False)  # fmt: skip
            hidden = out.hidden_states[first_layer]
        for i, state in zip(chosen, hidden, strict=True):
            found[i] = pooled(state[: len(rows[i])].double().cpu().numpy())
    states = np.stack(found)
    if not np.isfinite(states).all():
        raise InputError("gives hidden states that are not finite", path=base.name)
    return states


def pooled(state: np.ndarray) -> np.ndarray:
    """(2 hidden,) float32: mean and last of the (t, hidden) states of one prompt."""
    return np.concatenate([state.mean(0), state[-1]]).astype(np.float32)
