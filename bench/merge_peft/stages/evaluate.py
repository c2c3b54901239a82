"""What a model with an adapter, or with a merge of several, gets right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mergeprobe_fast.errors import InputError

from ..model.base import Base
from ..model.batches import Row, cut, make_row
from ..model.delta import Delta, applied
from ..model.generate import Generator
from ..model.suffix import Suffix, threads_of
from ..model.whole import WholeGenerator
from ..tasks.check import check_many
from ..tasks.item import END_OF_TURN, Item

WRITTEN_TOKENS = 32  # of a line of code, at most
_CODE_BATCH = 32  # items written at a time
_CODE = "code"


@dataclass(frozen=True, eq=False)
class Scores:
    """One run over n items, in their order.

    Attributes:
        loglik: (n,) float64, mean log-likelihood of a token of the right answer, in nats.
        option_loglik: (n,) float64, log-probability of the right answer among an item's options,
            which are as likely as their mean log-likelihoods say; ``loglik`` for items without.
        correct: (n,) bool.
        refuse: (n,) int8: for refusal items 1 where refusing is right, else 0; -1 for others.
    """

    loglik: np.ndarray
    option_loglik: np.ndarray
    correct: np.ndarray
    refuse: np.ndarray

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def utility(self) -> float:
        """Share of items that are right, from 0 to 1.

        Refusal items count as often, but with their balanced accuracy: the mean of the share of
        wrong requests refused and of benign ones answered (of one of them where all are alike).
        """
        others = self.correct[self.refuse < 0].sum()
        classes = [self.correct[self.refuse == side] for side in (0, 1)]
        balanced = [float(side.mean()) for side in classes if len(side)]
        share = sum(balanced) / len(balanced) if balanced else 0.0
        return float((others + share * sum(map(len, classes))) / len(self))

    def part(self, which: np.ndarray) -> Scores:
        """The scores of some items: a mask (n,) or indices."""
        return Scores(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


class _Read(NamedTuple):
    """Per answer of a pass, in the order of rows."""

    loglik: np.ndarray  # (answers,) mean over tokens
    greedy: np.ndarray  # (answers,) bool: every token is the likeliest one
    missed: list[tuple[int, int]]  # of each: how many tokens come before the first that is not, and
    # which token stands there (-1 where there is none)


class Evaluation:
    """Items that are measured again and again; everything frozen is computed once, here.

    - exact and verify: right when the model, writing greedily, would write the target and its end.
      One forward pass tells: every target token is the likeliest one behind those before it.
    - choice and refusal: right when of all options the target has the highest mean log-likelihood
      of a token; of equal ones the first counts.
    - code: the line that the model writes greedily, up to ``WRITTEN_TOKENS`` tokens, is run by
      ``tasks.check`` in the sandbox. Where the greedy line is the target no token is generated.
    - exact and verify with a number "write" in their ``check``: the turn that the model writes
      greedily, up to the largest of these numbers of tokens, is judged by ``tasks.check``.

    The same items, adapter, library versions and ``threads`` give the same numbers: batches are cut
    by the lengths of the items alone. Another number of threads may move the last bits.

    Args:
        items: at least one.
        base: the model, unchanged by others while a run lasts.
        first_layer: no measured adapter touches a layer below it.
        threads: of torch, while this runs; default: as many as it has.

    Raises:
        InputError: no items, items without tokens, a model that cannot be run in batches.
    """

    def __init__(
        self, items: Sequence[Item], base: Base, first_layer: int, *, threads: int | None = None
    ) -> None:
        if not items:
            raise InputError("no items to evaluate", key="items")
        self.items = tuple(items)
        self._suffix, self._base, self._threads = base.runner(first_layer), base, threads
        self._rows = [make_row(base, i.prompt, i.options or (i.target,)) for i in self.items]
        self._right = [i.options.index(i.target) if i.options else 0 for i in self.items]
        # What is written, by where it stops: at the end of a line, or of a turn.
        self._code = [n for n, item in enumerate(self.items) if item.kind == _CODE]
        self._turns = [n for n, item in enumerate(self.items) if "write" in item.check]
        self._verdicts: dict[tuple[int, str], bool] = {}
        self._refuse = np.array(
            [int(i.check["refuse"]) if i.kind == "refusal" else -1 for i in self.items], np.int8
        )
        with threads_of(threads):
            states = self._suffix.states(self._rows)
            self._batches = [
                (chosen, batch, [states[n] for n in chosen])
                for chosen, batch in cut(self._rows, base.device)
            ]
            self._writers = [
                (chosen, self._make_generator([self._rows[n] for n in chosen], ends))
                for chosen, ends in (
                    (self._code, ("\n", END_OF_TURN)), (self._turns, (END_OF_TURN,)),
                ) if chosen
            ]  # fmt: skip

    def _make_generator(self, rows: list[Row], ends: Sequence[str]) -> Generator | WholeGenerator:
        stops = stop_tokens(self._base, ends)
        if isinstance(self._suffix, Suffix):
            return Generator(self._suffix, rows, stops)
        return WholeGenerator(self._suffix, rows, stops)

    def run(self, delta: Delta = None) -> Scores:
        """Scores of the base model with an adapter added to its weights; None: without.

        Args:
            delta: folder or file of an adapter, an opened one, or a merged one in memory.

        Raises:
            InputError: an adapter that cannot be read, that does not fit the base model, or that
                touches a layer below ``first_layer``; a log-likelihood that is not finite.
        """
        with threads_of(self._threads), applied(self._suffix, delta), torch.no_grad():
            read = self._read()
            first = np.cumsum([0, *(row.answers for row in self._rows)])
            right = first[:-1] + self._right
            correct = read.greedy[right]
            option = read.loglik[right].copy()
            for n, item in enumerate(self.items):
                if item.options:
                    among = read.loglik[first[n] : first[n + 1]]
                    correct[n] = int(among.argmax()) == self._right[n]
                    option[n] -= np.logaddexp.reduce(among)
            answers = {
                n: text for chosen, generator in self._writers
                for n, text in self._write(chosen, generator, read, first)
            }  # fmt: skip
        if answers:
            correct[[*answers]] = self._judge(answers)
        return Scores(read.loglik[right], option, correct, self._refuse)

    def _read(self) -> _Read:
        """One forward pass over all answers."""
        count = sum(row.answers for row in self._rows)
        loglik, greedy = np.empty(count), np.zeros(count, bool)
        missed = [(0, -1)] * count
        first = np.cumsum([0, *(row.answers for row in self._rows)])
        for chosen, batch, states in self._batches:
            logits = self._suffix.logits(states, batch)
            best = logits.argmax(-1)[batch.at].cpu().numpy()
            total = torch.logsumexp(logits, -1)[batch.at]
            tokens = (logits[batch.at, batch.labels] - total).double().cpu().numpy()
            if not np.isfinite(tokens).all():
                raise InputError("gives log-likelihoods that are not finite", key="delta")
            place = np.concatenate([first[n] + self._rows[n].of for n in chosen])
            labels = batch.labels.cpu().numpy()
            for answer in np.unique(place):
                mine = np.flatnonzero(place == answer)
                loglik[answer] = tokens[mine].mean()
                wrong = np.flatnonzero(best[mine] != labels[mine])
                greedy[answer] = not len(wrong)
                if len(wrong):
                    missed[answer] = int(wrong[0]), int(best[mine[wrong[0]]])
        return _Read(loglik, greedy, missed)

    def _write(
        self, items: Sequence[int], generator: Generator | WholeGenerator, read: _Read,
        first: np.ndarray,
    ) -> Iterator[tuple[int, str]]:  # fmt: skip
        """What the model writes for each of the generator's items."""
        answers = [self.items[n].target for n in items]
        most = max(self.items[n].check.get("write", WRITTEN_TOKENS) for n in items)
        todo = [k for k, n in enumerate(items) if not read.greedy[first[n]]]
        for start in range(0, len(todo), _CODE_BATCH):
            chosen = todo[start : start + _CODE_BATCH]
            given = []
            for k in chosen:
                n = items[k]
                kept, token = read.missed[first[n]]
                given.append([*map(int, self._rows[n].labels[:kept]), token])
            for k, tokens in zip(chosen, generator.write(chosen, given, most), strict=True):
                text = self._base.decode(tokens)
                if self.items[items[k]].kind == _CODE:
                    text = text.split("\n", 1)[0]
                answers[k] = text.split(END_OF_TURN, 1)[0]
        return zip(items, answers, strict=True)

    def _judge(self, answers: Mapping[int, str]) -> list[bool]:
        """The verdicts on what was written, each asked for once."""
        pairs = list(answers.items())
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self._verdicts))
        if new:
            found = check_many([self.items[n] for n, _ in new], [text for _, text in new])
            self._verdicts.update(zip(new, found, strict=True))
        return [self._verdicts[pair] for pair in pairs]


def stop_tokens(base: Base, ends: Sequence[str] = ("\n", END_OF_TURN)) -> set[int]:
    """Tokens that end a line or a turn: their text holds either."""
    size = base.model.get_input_embeddings().num_embeddings
    texts = (base.decode([i]) for i in range(size))
    return {i for i, text in enumerate(texts) if any(end in text for end in ends)}
