"""Models that are not put together like a Llama: run whole, every time, by their own forward.

The same methods as :class:`mergeprobe_fast.merge_peft.suffix.Suffix`, slower: nothing is kept, and
every answer to a prompt is a text of its own, since a model may place and mask tokens as it likes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from mergeprobe_fast.errors import InputError

from .batches import Batch, Row, by_length

if TYPE_CHECKING:
    from .base import Base

_AGREEMENT = 1e-4  # of the largest logit: a text alone, and one that is padded in a batch


def layer_prefix(model: Any) -> str:
    """What the paths of a model's layers begin with, as "model.layers."; InputError: none found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return f"{name}."
    raise InputError(f"is a {type(model).__name__}: its layers are no list", key="base")


class WholeModel:
    """A causal language model whose forward is all that is known of it.

    ``reason`` says why it cannot be a suffix.

    Raises:
        InputError: its logits of a text depend on what else is in a batch.
    """

    first = 0  # the lowest layer that may be changed

    def __init__(self, base: Base, reason: str) -> None:
        self.base, self.reason = base, reason
        self._check()

    def states(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Nothing a row: there is no prefix."""
        return [torch.empty(0)] * len(rows)

    def forget(self) -> None:
        """Nothing is kept."""

    def holds(self, module: str) -> bool:
        """Whether a module of this path would be run again, with another weight: always."""
        return True

    def walk(self, states: Sequence[torch.Tensor], batch: Batch) -> None:
        """Run the model over rows of one answer for what its hooks see."""
        mask = batch.real.long()
        self.base.model(input_ids=batch.ids, attention_mask=mask, use_cache=False)

    def logits(self, states: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Logits (u, vocabulary) where the batch reads any."""
        texts = [
            row.ids[(row.answer == 0) | (row.answer == k + 1)]
            for row in batch.rows for k in range(row.answers)
        ]  # fmt: skip
        before = np.cumsum([0, *(row.answers for row in batch.rows)])
        which, place = [], []  # of each read: the text, and where in it
        for read in batch.reads.tolist():
            i, at = divmod(read, batch.ids.shape[1])
            row = batch.rows[i]
            which.append(before[i] + max(int(row.answer[at]) - 1, 0))
            place.append(int(row.positions[at]))
        found, order = [], []
        for chosen in by_length([len(text) for text in texts]):
            logits = self._forward([texts[n] for n in chosen])
            mine = [k for k, n in enumerate(which) if n in chosen]
            found.append(logits[[chosen.index(which[k]) for k in mine], [place[k] for k in mine]])
            order += mine
        return torch.cat(found)[np.argsort(order)]

    def token_losses(self, states: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Minus the log-likelihood of every token of every answer, (q,)."""
        return cross_entropy(self.logits(states, batch)[batch.at], batch.labels, reduction="none")

    def _forward(self, texts: Sequence[np.ndarray]) -> torch.Tensor:
        """Logits (n, t, vocabulary) of texts that are padded behind their ends."""
        ids = [torch.from_numpy(text) for text in texts]
        mask = pad_sequence([torch.ones_like(text) for text in ids], True)
        padded, mask = (x.to(self.base.device) for x in (pad_sequence(ids, True), mask))
        return self.base.model(input_ids=padded, attention_mask=mask, use_cache=False).logits

    @torch.no_grad()
    def _check(self) -> None:
        size = self.base.model.get_input_embeddings().num_embeddings
        texts = [np.array([(17 * i + 5) % size for i in range(n)]) for n in (12, 7)]
        together = self._forward(texts)
        for text, ours in zip(texts, together, strict=True):
            alone = self._forward([text])[0]
            if not bool((ours[: len(text)] - alone).abs().max() <= _AGREEMENT * alone.abs().max()):
                reason = "its logits of a text depend on what else is in the batch"
                raise InputError(reason, path=self.base.name)


class WholeGenerator:
    """What :class:`mergeprobe_fast.merge_peft.generate.Generator` does, by a model's own cache.

    Texts of one length are written together, so that nothing is ever padded.
    """

    def __init__(self, whole: WholeModel, rows: Sequence[Row], stops: Collection[int]) -> None:
        self._base, self._stops = whole.base, frozenset(stops)
        self._prompts = [row.ids[row.answer == 0].tolist() for row in rows]

    @torch.no_grad()
    def write(
        self, chosen: Sequence[int], given: Sequence[Sequence[int]], most: int
    ) -> list[list[int]]:
        """Continue rows ``chosen`` behind the tokens ``given``, as Generator.write does."""
        written = [list(tokens) for tokens in given]
        groups: dict[int, list[int]] = {}
        for k, i in enumerate(chosen):
            groups.setdefault(len(self._prompts[i]) + len(written[k]), []).append(k)
        for group in groups.values():
            ids = [self._prompts[chosen[k]] + written[k] for k in group]
            self._write_group([written[k] for k in group], ids, most)
        return written

    def _write_group(self, written: list[list[int]], ids: list[list[int]], most: int) -> None:
        """Append to each of ``written`` what comes behind ``ids``, which are of one length."""

        def goes_on(tokens: list[int]) -> bool:
            return len(tokens) < most and tokens[-1] not in self._stops

        new, cache, length = torch.tensor(ids).to(self._base.device), None, len(ids[0])
        while any(goes_on(tokens) for tokens in written):
            mask = torch.ones(len(ids), length, dtype=torch.long, device=new.device)
            out = self._base.model(
                input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                kind = type(self._base.model).__name__
                raise InputError(f"is a {kind}: it returns no past_key_values", key="base")
            new, length = out.logits[:, -1].argmax(-1)[:, None], length + 1
            for tokens, token in zip(written, new[:, 0].tolist(), strict=True):
                if goes_on(tokens):
                    tokens.append(token)
