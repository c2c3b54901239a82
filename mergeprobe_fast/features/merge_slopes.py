"""Derivatives of losses along adapters, and what a combination of adapters does to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast.features.merge_declare import AtPoint
from mergeprobe_fast.features.points import columns_of
from mergeprobe_fast.io.points import LABELS
from mergeprobe_fast.zoo import Zoo

if TYPE_CHECKING:
    from mergeprobe_fast.io.points import Points


@dataclass(frozen=True, eq=False)
class Slopes:
    """Derivatives at one kind of point, victims first; NaN where unknown."""

    first: np.ndarray  # (N, N) mean over texts, labels the data's
    model: np.ndarray  # (N, texts, N) root of the text's label tokens times it, model's labels
    data: np.ndarray  # the same with the data's labels
    texts: np.ndarray  # (N,) how many are known; both are 0 beyond


def slopes_of(zoo: Zoo, points: Points, keys: Sequence[str | None]) -> Slopes:
    """Of each adapter at the point with its key; NaN where that is None."""
    count = len(zoo)
    texts = np.array([0 if key is None else points.points[key].sequences for key in keys])
    first = np.full((count, count), np.nan)
    phi = {labels: np.full((count, int(texts.max(initial=1)), count), np.nan) for labels in LABELS}
    known, at = columns_of(zoo, points, np.arange(count))
    for i, key in enumerate(keys):
        if key is None:
            continue
        root = np.sqrt(points.losses(key)[2])[:, None]
        for labels, values in phi.items():
            own = points.phi(key, labels)[:, at]
            values[i][:, known] = 0.0
            values[np.ix_([i], range(len(own)), known)] = root * own
            if labels == "data":
                first[i, known] = own.mean(axis=0)
    return Slopes(first, phi["model"], phi["data"], np.maximum(texts, 1))


def at_point(slopes: Slopes, members: np.ndarray, d: np.ndarray) -> AtPoint:
    """Of victims ``members`` (sets, k), along ``sum_j d_j W_j``, d (sets, k, k)."""
    rows, columns = members[:, :, None], members[:, None, :]
    texts, k = slopes.texts[members], members.shape[1]

    def mean(values: np.ndarray) -> np.ndarray:
        return values.sum(axis=-1) / texts

    phi = slopes.model[rows, :, columns]  # (sets, k, k, texts)
    along = (phi * d[..., None]).sum(axis=2)
    own = phi[:, np.arange(k), np.arange(k)]
    observed = (slopes.data[rows, :, columns] * d[..., None]).sum(axis=2)
    return AtPoint(
        first=(slopes.first[rows, columns] * d).sum(axis=-1), curvature=mean(along**2) / 2,
        absolute=mean(np.abs(along)) ** 2 / 2, observed=mean(observed**2) / 2,
        self_curvature=mean(own**2) / 2, with_self=mean(along * own),
    )  # fmt: skip
