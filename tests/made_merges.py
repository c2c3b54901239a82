"""Labelled merges of adapters that do not exist, whose truth is known."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np

from mergeprobe_fast.predict import Adapter, Labels, Recipe

BASE = "made/base"
# Enough to find a planted signal, and quick.
QUICK = Recipe(boost_rounds=60, boost_seeds=1, extra_count=15, folds=4, scale_rounds=20)
LINEAR = dataclasses.replace(QUICK, boosted_share=0.0, extra_share=0.0, scale_rounds=0)


def made_labels(
    rng: np.random.Generator, *, pairs: int = 150, adapters: int = 40, noise: float = 0.03,
    signal: bool = True, operators: tuple[str, ...] = ("sum",), triples: int = 0,
) -> Labels:  # fmt: skip
    """Sums of different twos whose damage grows with the norm ratio, less where the cosine is high.

    Families are of two adapters, there are 4 domains, 2 seeds and 2 ranges of layers. Without
    ``signal``, labels are noise about 0.5 that no column knows anything of.
    """
    norm = np.exp(rng.normal(0, 0.4, adapters))
    every = np.array([*combinations(range(adapters), 2)])
    sets = [*rng.permuted(every[rng.choice(len(every), pairs, replace=False)], axis=1)]
    sets += [rng.choice(adapters, 3, replace=False) for _ in range(triples)]
    members, merge, operator = [], [], []
    for number, row in enumerate(sets):
        for k, name in enumerate(operators):
            for own in range(len(row)):
                rolled = np.roll(row, -own)
                members.append([*rolled, *[-1] * (3 - len(row))])
                merge.append(number * len(operators) + k)
                operator.append(name)
    members = np.array(members, np.int32)
    if not triples:
        members = members[:, :2]
    others = np.where(members[:, 1:] >= 0, norm[members[:, 1:]] ** 2, 0.0).sum(axis=1)
    ratio = np.sqrt(others) / norm[members[:, 0]]
    shrunk = np.array([operators.index(o) for o in operator]) * 0.3
    ratio = ratio * (1 - shrunk)
    cosine = rng.uniform(-0.5, 0.5, len(ratio))
    error = rng.normal(0, noise if signal else 0.2, len(ratio))
    truth = 1 - 0.25 * ratio * np.exp(-cosine) if signal else np.full(len(ratio), 0.5)
    columns = {
        "size": np.count_nonzero(members >= 0, axis=1).astype(float),
        "member_norm": norm[members[:, 0]], "change_to_self": ratio, "change_cosine": cosine,
        "merged_cosine": rng.uniform(0, 1, len(ratio)), "kept": rng.normal(1, 0.1, len(ratio)),
    }  # fmt: skip
    about = tuple(
        Adapter(f"a{i}", f"family{i // 2}", f"domain{i // 2 % 4}", str(i % 2), f"{i // 4 % 2}-5",
                {"train_rank": float(2 ** (i // 2 % 3)), "train_steps": norm[i] // 0.5})
        for i in range(adapters)
    )  # fmt: skip
    return Labels(
        about, members, np.array(merge), np.array(operator, object),
        np.clip(truth + error, -1, 1.2), np.full(len(ratio), noise), columns, None, (BASE,),
    )  # fmt: skip


def with_calibration(labels: Labels, rng: np.random.Generator) -> Labels:
    """The labels with two columns of the level "calibration", known of four rows in five."""
    error = np.square(labels.columns["change_to_self"]) * np.exp(rng.normal(0, 0.1, len(labels)))
    error[rng.random(len(labels)) < 0.2] = np.nan
    more = {"error": error, "disturbance": np.sqrt(error)}
    return dataclasses.replace(labels, columns={**labels.columns, **more})


def changed(labels: Labels, **fields: Any) -> Labels:
    """The labels with other fields."""
    return dataclasses.replace(labels, **fields)
