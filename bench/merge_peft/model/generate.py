"""What a model writes, greedily, after prompts whose lower layers have been run before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from mergeprobe_fast.errors import InputError

from .batches import Row, collate, cut
from .suffix import KeyValues, Suffix

_WORTH_KEEPING = 0.8  # of the rows of a step, below which copying the others saves time


class Generator:
    """Greedy decoding after the first tokens of some rows, of one answer each.

    The keys and values of the lower layers are kept for all rows: with SmolLM2's 26 lower layers
    40 kB a token.
    """

    def __init__(self, suffix: Suffix, rows: Sequence[Row], stops: Collection[int]) -> None:
        self._suffix, self._rows = suffix, list(rows)
        self._device = suffix.base.device
        self._stops = torch.tensor(sorted(stops)).to(self._device)
        self._states = suffix.states(self._rows)
        self._lower = self._run_lower()

    @torch.no_grad()
    def write(
        self, chosen: Sequence[int], given: Sequence[Sequence[int]], most: int
    ) -> list[list[int]]:
        """Continue rows ``chosen``, up to and with a token of ``stops``, or to ``most`` tokens.

        ``given`` are tokens that are known to come first: all but the last of them are those of the
        row's own answer. They count in ``most`` and are part of what is returned.
        """
        written = [list(tokens) for tokens in given]
        lengths = [len(tokens) for tokens in given]
        if not chosen:
            return written
        starts = [int(self._rows[i].reads[0]) + n for i, n in zip(chosen, lengths, strict=True)]
        cache, mask = self._prefill(chosen, starts, most)
        # The rows that are still written, in the cache's order.
        who = torch.arange(len(chosen), device=self._device)
        token, position, length = (
            torch.tensor(x).to(self._device)
            for x in ([tokens[-1] for tokens in given], starts, lengths)
        )
        alive = ~torch.isin(token, self._stops) & (length < most)
        while alive.any():
            # A step costs what its rows do: those that are over go, when they are enough.
            if alive.sum() <= _WORTH_KEEPING * len(alive):
                cache.keep(alive)
                who, token, position, length, mask = (
                    x[alive] for x in (who, token, position, length, mask)
                )
                alive = alive[alive]
            logits = self._step(token, position, mask[..., : cache.filled + 1], cache)
            token, position, length = logits.argmax(-1), position + 1, length + 1
            for i, new, more in zip(who.tolist(), token.tolist(), alive.tolist(), strict=True):
                if more:
                    written[i].append(new)
            alive &= ~torch.isin(token, self._stops) & (length < most)
        return written

    def _step(
        self, ids: torch.Tensor, position: torch.Tensor, mask: torch.Tensor, cache: KeyValues
    ) -> torch.Tensor:
        """Logits (n, vocabulary) after one more token a row, through all layers."""
        suffix = self._suffix
        hidden = suffix.embed(ids[:, None])
        hidden = suffix.layers_on(hidden, position[:, None], mask, 0, suffix.layers, cache)
        cache.filled += 1
        return suffix.head(hidden[:, 0])

    def _prefill(
        self, chosen: Sequence[int], starts: Sequence[int], most: int
    ) -> tuple[KeyValues, torch.Tensor]:
        """A cache of the rows up to ``starts``, and the mask of a token that comes after."""
        suffix = self._suffix
        batch = collate([self._rows[i] for i in chosen], self._device)
        length = max(starts)
        cache = KeyValues(length, most)
        for layer in range(suffix.first):
            for side in (0, 1):
                parts = [self._lower[i][layer, side].transpose(0, 1)[:length] for i in chosen]
                rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)
                missing = length + most - rows.shape[2]
                padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
                cache.layers[layer] = (*cache.layers.get(layer, ()), padded)  # type: ignore
        hidden = torch.nn.utils.rnn.pad_sequence([self._states[i] for i in chosen], True)
        suffix.layers_on(
            hidden[:, :length], batch.positions[:, :length], batch.mask[..., :length, :length],
            suffix.first, suffix.layers, cache,
        )  # fmt: skip
        cache.filled = length
        hidden_keys = torch.arange(length)[None] >= torch.tensor(starts)[:, None]
        mask = torch.zeros(len(chosen), 1, 1, length + most)
        mask[:, 0, 0, :length].masked_fill_(hidden_keys, -torch.inf)
        return cache, mask.to(self._device)

    @torch.no_grad()
    def _run_lower(self) -> list[torch.Tensor]:
        """Keys and values of the layers below the suffix: (layers, 2, heads, t, size) a row."""
        suffix = self._suffix
        found: dict[int, torch.Tensor] = {}
        for chosen, batch in cut(self._rows, self._device):
            cache = KeyValues(batch.ids.shape[1], 0)
            suffix.run(suffix.embed(batch.ids), batch, 0, suffix.first, cache)
            if sorted(cache.layers) != list(range(suffix.first)):
                raise InputError("its attention takes no cache called past_key_values",
                                 key="transformers")  # fmt: skip
            for j, i in enumerate(chosen):
                pairs = [torch.stack(cache.layers[k])[:, j] for k in range(suffix.first)]
                length = len(self._rows[i])
                found[i] = torch.stack(pairs)[..., :length, :].clone() if pairs else torch.empty(0)
        return [found[i] for i in range(len(self._rows))]
