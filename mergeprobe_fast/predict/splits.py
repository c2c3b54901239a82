"""What to hold out of labelled merges: never a merge of which one member is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.labels import Labels

Split = Literal["adapter", "seed", "domain pair", "domain", "operator", "layers"]
SPLITS: tuple[Split, ...] = ("adapter", "seed", "domain pair", "domain", "operator", "layers")
_ATTRIBUTE = {"adapter": "family", "seed": "seed", "domain": "domain", "layers": "layers"}

FEWEST = 10  # rows to learn from

Fold = tuple[np.ndarray, np.ndarray]  # masks: rows to predict, rows not to learn from


def held_out(labels: Labels, split: Split) -> list[Fold]:
    """By fold two masks: the rows to predict, and those not to learn from, which hold them.

    Each row is predicted in one fold at most. adapter, seed, domain, layers: the rows whose *own*
    adapter is of a family, a seed, a domain, a range of layers; not to learn from are the merges
    with it among any of their members. domain pair: the rows of merges of two that bring two
    domains together (or one twice); not to learn from are merges of any size that do, too. Rows of
    larger merges are asked in no fold. operator: its rows.

    Raises:
        InputError: a split that is none of ``SPLITS``; labels that do not say what it needs, or
            of which one fold would be all.
    """
    if split not in SPLITS:
        raise InputError(f"{split!r} is none of {', '.join(SPLITS)}", key="split")
    if split == "operator":
        folds = [(labels.operator == o,) * 2 for o in np.unique(labels.operator.astype(str))]
    elif split == "domain pair":
        folds = list(_by_domains(labels))
    else:
        of = labels.of(_ATTRIBUTE[split]).astype(str)
        there = labels.members >= 0
        folds = [
            (of[:, 0] == value, ((of == value) & there).any(axis=1))
            for value in np.unique(of[:, 0])
        ]
    if len(folds) < 2:
        raise InputError(f"the labels have one {split} only, or none", key=split)
    return folds


def _by_domains(labels: Labels) -> Iterator[Fold]:
    of, two = labels.of("domain").astype(str), labels.size == 2
    names = [n for n in np.unique(of) if n]
    count = {n: np.count_nonzero(of == n, axis=1) for n in names}
    for one, other in combinations_with_replacement(names, 2):
        gone = (count[one] > 1) if one == other else (count[one] > 0) & (count[other] > 0)
        if (gone & two).any():
            yield gone & two, gone


def domain_folds(labels: Labels, count: int, seed: int) -> list[Fold]:
    """The folds of "domain pair" dealt into ``count`` at random; none where there are not two."""
    folds = list(_by_domains(labels))
    if len(folds) < 2:
        return []
    count = min(count, len(folds))
    dealt = np.random.default_rng(seed).permutation(len(folds)) % count
    return [
        (np.any([test for k, (test, _) in zip(dealt, folds, strict=True) if k == n], axis=0),
         np.any([gone for k, (_, gone) in zip(dealt, folds, strict=True) if k == n], axis=0))
        for n in range(count)
    ]  # fmt: skip


def family_folds(labels: Labels, count: int, seed: int) -> list[Fold]:
    """The same with families dealt into ``count`` folds at random; as many as there are, at most.

    Raises:
        InputError: labels of one family only.
    """
    families = labels.families
    known = np.unique(families[families >= 0])
    if len(known) < 2:
        raise InputError("labels of one family of adapters only", key="family")
    fold = np.full(known[-1] + 2, -1)  # the last is that of -1, behind the last member
    dealt = np.random.default_rng(seed).permutation(len(known)) % min(count, len(known))
    fold[known] = dealt
    of = fold[families]
    found = [(of[:, 0] == k, (of == k).any(axis=1)) for k in range(min(count, len(known)))]
    return [pair for pair in found if pair[0].any()]


def predict_held_out(
    labels: Labels, folds: list[Fold], learn: Callable[[Labels, Labels], dict[str, np.ndarray]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The fold of each row and what ``learn(seen, asked)`` said of it in that fold.

    What is asked has no labels: they are NaN. Rows of folds that leave fewer than ``FEWEST`` rows,
    or one family, to learn from are NaN and their fold is -1.

    Raises:
        InputError: all folds are like that.
    """
    fold, out = np.full(len(labels), -1), {}
    for number, (test, gone) in enumerate(folds):
        families = labels.families[~gone]
        if np.count_nonzero(~gone) < FEWEST or len(np.unique(families[families >= 0])) < 2:
            continue
        asked = labels.part(test)
        blind = Labels(**{**vars(asked), "y": np.full(len(asked), np.nan),
                          "se": np.full(len(asked), np.nan)})  # fmt: skip
        for name, values in learn(labels.part(~gone), blind).items():
            out.setdefault(name, np.full(len(labels), np.nan))[test] = values
        fold[test] = number
    if not out:
        raise InputError(f"no fold leaves {FEWEST} rows of two families to learn from")
    return fold, out
