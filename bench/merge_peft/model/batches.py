"""Texts as rows of tokens, several answers to one prompt in one row, and rows as batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mergeprobe_fast.errors import InputError

if TYPE_CHECKING:
    from .base import Base

_BATCH_TOKENS = 2048  # padded, of one forward pass: more is not faster on a CPU
_ACCELERATOR_TOKENS = 16384  # elsewhere; not measured: logits are what takes memory


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt and the answers to it, packed one behind the other.

    Every answer sees the prompt and itself, and is placed as if it came right after the prompt, so
    that its log-likelihood is what it would be in a row of its own. The last token of an answer is
    never an input. All arrays are int64.
    """

    ids: np.ndarray  # (t,)
    positions: np.ndarray  # (t,)
    answer: np.ndarray  # (t,) 0 in the prompt, k + 1 in answer k
    reads: np.ndarray  # (q,) where in the row each token of an answer is predicted
    labels: np.ndarray  # (q,) and which token it is
    of: np.ndarray  # (q,) in which answer

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answers(self) -> int:
        return int(self.of[-1]) + 1

    @cached_property
    def key(self) -> bytes:
        """Equal for rows of which the model sees the same."""
        return np.concatenate([self.ids, self.answer]).tobytes()


def make_row(base: Base, prompt: str, answers: Sequence[str]) -> Row:
    """A row of one prompt; prompt and answers are tokenised apart.

    Raises:
        InputError: a prompt or an answer without a single token.
    """
    head, tails = base.encode(prompt), [base.encode(answer) for answer in answers]
    if not head or not tails or not all(tails):
        raise InputError(f"a prompt or an answer has no tokens: {prompt[:60]!r}", key="item")
    return pack(head, tails)


def pack(head: Sequence[int], tails: Sequence[Sequence[int]]) -> Row:
    """:func:`make_row` from token ids."""
    ids, positions, answer = list(head), list(range(len(head))), [0] * len(head)
    reads: list[int] = []
    for k, tail in enumerate(tails):
        # The prompt's last token predicts the first of each answer.
        reads += [len(head) - 1, *range(len(ids), len(ids) + len(tail) - 1)]
        ids += tail[:-1]
        positions += range(len(head), len(head) + len(tail) - 1)
        answer += [k + 1] * (len(tail) - 1)
    labels = [token for tail in tails for token in tail]
    of = [k for k, tail in enumerate(tails) for _ in tail]
    return Row(*(np.array(x, np.int64) for x in (ids, positions, answer, reads, labels, of)))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to the longest, ``n`` of length ``t``."""

    rows: tuple[Row, ...]
    ids: torch.Tensor  # (n, t), 0 where padded
    positions: torch.Tensor  # (n, t)
    mask: torch.Tensor  # (n, 1, t, t) float32, 0 where a query (third axis) may look, else -inf
    real: torch.Tensor  # (n, t) bool: no padding
    reads: torch.Tensor  # (u,) positions in (n * t) that predict anything, each once, ascending
    at: torch.Tensor  # (q,) which of them predicts each token of an answer
    labels: torch.Tensor  # (q,)
    answer: torch.Tensor  # (q,) which answer of the whole batch, rows after each other

    def __len__(self) -> int:
        return len(self.rows)


def collate(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
    """A batch of rows, put together on the CPU and moved as it is."""
    ids, positions, answer = (
        pad_sequence(
            [torch.from_numpy(getattr(row, name)) for row in rows], True, padding_value=fill
        )
        for name, fill in (("ids", 0), ("positions", 0), ("answer", -1))
    )
    length = ids.shape[1]
    # Rows without a second answer need no more than what hides the future: padding is behind it.
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if any(row.answers > 1 for row in rows):
        seen = seen & ((answer[:, None] == 0) | (answer[:, None] == answer[:, :, None]))
    mask = torch.zeros(len(rows), 1, length, length).masked_fill_(~seen[:, None], -torch.inf)
    reads = np.concatenate([i * length + row.reads for i, row in enumerate(rows)])
    unique, at = np.unique(reads, return_inverse=True)
    before = np.cumsum([0, *(row.answers for row in rows)])
    owner = np.concatenate([before[i] + row.of for i, row in enumerate(rows)])
    labels = np.concatenate([row.labels for row in rows])
    indices = (torch.from_numpy(x) for x in (unique, at.reshape(-1), labels, owner))
    tensors = (ids, positions, mask, answer >= 0, *indices)
    return Batch(tuple(rows), *(x.to(device) for x in tensors))


def by_length(lengths: Sequence[int], tokens: int = _BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices cut into batches of similar lengths, each of at most so many padded tokens."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    batch: list[int] = []
    for i in map(int, order):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def cut(rows: Sequence[Row], device: torch.device) -> Iterator[tuple[list[int], Batch]]:
    """All rows as batches on a device, of similar lengths each; which rows, and the batch."""
    lengths = [len(row) for row in rows]
    on_cpu = device.type == "cpu"
    for chosen in by_length(lengths) if on_cpu else by_length(lengths, _ACCELERATOR_TOKENS):
        yield chosen, collate([rows[i] for i in chosen], device)
