"""The upper layers of a model alone: what enters them is computed once per text and kept.

Layers below the first adapted one are frozen, so for every adapter and every merge they say the
same. The layers' own modules are run, whatever is injected into them; only how they are chained is
written here, and checked against the model when a :class:`Suffix` is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from mergeprobe_fast.errors import InputError

from .batches import Batch, Row, collate, cut, pack

if TYPE_CHECKING:
    from .base import Base

_CHILDREN = ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"]
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_AGREEMENT = 1e-4  # of the largest logit: two ways through float32 attention


@contextmanager
def threads_of(threads: int | None) -> Iterator[None]:
    """So many threads of torch inside; None: as many as it has."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)


class KeyValues:
    """Keys and values of every layer for rows of ``length`` tokens, and of ``room`` more tokens.

    What a layer's attention calls as its cache. New tokens come right behind the padded length.
    """

    def __init__(self, length: int, room: int) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (n, heads, all, size)
        self._size, self.filled = length + room, 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer from ``filled`` on, and return all that it has."""
        first, last = self.filled, self.filled + keys.shape[2]
        if layer not in self.layers:
            shape = (*keys.shape[:2], self._size, keys.shape[3])
            self.layers[layer] = keys.new_zeros(shape), keys.new_zeros(shape)
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[:, :, first:last] = new
        kept_keys, kept_values = self.layers[layer]
        return kept_keys[:, :, :last], kept_values[:, :, :last]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (a mask)."""
        self.layers = {i: (keys[rows], values[rows]) for i, (keys, values) in self.layers.items()}


class Suffix:
    """The layers of a Llama-like model from ``first`` on, and its head.

    Raises:
        InputError: no such layer, or a model that is built in another way: its layers are not
            attention and MLP with a norm before each, or its own forward gives other logits.
    """

    def __init__(self, base: Base, first: int) -> None:
        self.base, self.first = base, first
        self._core, self._head = _parts(base.model)
        count = len(self._core.layers)
        if not 0 <= first < count:
            raise InputError(f"is {first}; the model has layers 0 to {count - 1}", key="layer")
        self._states: dict[bytes, torch.Tensor] = {}
        self._check()

    @property
    def layers(self) -> int:
        """How many layers the whole model has."""
        return len(self._core.layers)

    @torch.no_grad()
    def states(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """What enters layer ``first``: one (t, hidden) tensor a row, float32, kept for next time.

        To be asked for while the model is as it was loaded.
        """
        new = list({row.key: row for row in rows if row.key not in self._states}.values())
        for _, batch in cut(new, self.base.device):
            hidden = self.run(self._core.embed_tokens(batch.ids), batch, 0, self.first)
            for row, state in zip(batch.rows, hidden, strict=True):
                self._states[row.key] = state[: len(row)].clone()
        return [self._states[row.key] for row in rows]

    def forget(self) -> None:
        """Let go of the states that are kept."""
        self._states.clear()

    def holds(self, module: str) -> bool:
        """Whether a module of this path would be run again, with another weight."""
        parts = module.split(".")
        inside = parts[:2] == ["model", "layers"] and len(parts) > 3
        return inside and int(parts[2]) >= self.first

    def walk(self, states: Sequence[torch.Tensor], batch: Batch) -> None:
        """Run the layers over rows of one answer for what their hooks see."""
        self.run(_padded(states), batch, self.first, self.layers)

    def run(
        self, hidden: torch.Tensor, batch: Batch, first: int, last: int,
        cache: KeyValues | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states (n, t, hidden) through layers ``first`` to ``last - 1``."""
        return self.layers_on(hidden, batch.positions, batch.mask, first, last, cache)

    def layers_on(
        self, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, first: int,
        last: int, cache: KeyValues | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The same for tokens at ``positions`` (n, t) with an additive ``mask`` (n, 1, t, keys)."""
        angles = self._core.rotary_emb(hidden, positions)
        for layer in self._core.layers[first:last]:
            hidden = hidden + self._attend(layer, hidden, positions, mask, angles, cache)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def logits(self, states: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Logits (u, vocabulary) where the batch reads any, from the rows' ``states``."""
        last = self.layers - 1
        hidden = self.run(_padded(states), batch, self.first, last)
        # Of the last layer only those tokens are wanted, and its MLP is most of its work.
        angles = self._core.rotary_emb(hidden, batch.positions)
        layer = self._core.layers[last]
        hidden = hidden + self._attend(layer, hidden, batch.positions, batch.mask, angles, None)
        hidden = hidden.flatten(0, 1)[batch.reads]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.head(hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states that come out of the last layer."""
        return self._head(self._core.norm(hidden))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings."""
        return self._core.embed_tokens(ids)

    def token_losses(self, states: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Minus the log-likelihood of every token of every answer, (q,)."""
        logits = self.logits(states, batch)
        if len(logits) != len(batch.at):
            logits = logits[batch.at]
        return cross_entropy(logits, batch.labels, reduction="none")

    @staticmethod
    def _attend(
        layer: Any, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor], cache: KeyValues | None,
    ) -> torch.Tensor:  # fmt: skip
        found = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden), position_ids=positions,
            attention_mask=mask, position_embeddings=angles, past_key_values=cache,
        )  # fmt: skip
        return found[0]

    @torch.no_grad()
    def _check(self) -> None:
        """Run the model and the chain on one short text, every token of it a label."""
        size = self._core.embed_tokens.num_embeddings
        ids = [(17 * i + 5) % size for i in range(12)]
        row = pack(ids[:1], [[*ids[1:], 0]])
        batch = collate([row], self.base.device)
        hidden = self.run(self._core.embed_tokens(batch.ids), batch, 0, self.first)
        ours = self.logits(list(hidden), batch)
        theirs = self.base.model(input_ids=batch.ids, use_cache=False).logits[0]
        if not bool((ours - theirs).abs().max() <= _AGREEMENT * theirs.abs().max()):
            raise InputError(
                "its own forward gives other logits than its layers one after the other",
                path=self.base.name,
            )


def _padded(states: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)


def _parts(model: Any) -> tuple[Any, Any]:
    """The decoder and the head; InputError when it is not put together as a Llama is."""
    core = getattr(model, "model", None)
    kind = type(model).__name__
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(core, name):
            raise InputError(f"is a {kind}: its decoder has no {name}", key="base")
    for layer in core.layers:
        children = sorted(name for name, _ in layer.named_children())
        if children != _CHILDREN or not all(hasattr(layer.mlp, name) for name in _PROJECTIONS):
            reason = f"is a {kind}: a layer has {', '.join(children)}; expected a Llama's"
            raise InputError(reason, key="base")
    if getattr(model.config, "sliding_window", None):
        raise InputError(f"is a {kind} with a sliding window; not supported", key="base")
    return core, model.lm_head
