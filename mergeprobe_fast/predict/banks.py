"""Several files of labelled merges as one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.labels import Adapter, Labels, read_labels


def read_banks(
    paths: Sequence[str | os.PathLike[str]],
    *,
    target: str | None = None,
    operators: Sequence[str] = (),
    features: Sequence[str | os.PathLike[str]] = (),
    at: float | None = None,
) -> Labels:
    """The labels of one or more files, in the order given; arguments as ``read_labels`` has them.

    Adapters of one name are one adapter. A column that one of the files lacks is NaN in its rows.

    Args:
        features: none, or a file for each of ``paths``.

    Raises:
        InputError: what ``read_labels`` says; a number of feature files that is neither; a file
            that is given twice; files that say different things of one adapter.
    """
    if features and len(features) != len(paths):
        reason = f"{len(paths)} files of labels and {len(features)} of columns; give one for each"
        raise InputError(f"{reason}, in order", key="features")
    found = [
        read_labels(path, target=target, operators=operators, features=beside, at=at)
        for path, beside in zip(paths, features or [None] * len(paths), strict=True)
    ]
    return found[0] if len(found) == 1 else _together(found, paths)


def _together(found: Sequence[Labels], paths: Sequence[str | os.PathLike[str]]) -> Labels:
    digests = [labels.digest for labels in found]
    for k, digest in enumerate(digests):
        if digest in digests[:k]:  # each label twice would look like two measurements
            reason = f"holds the same labels as {paths[digests.index(digest)]}"
            raise InputError(reason, path=paths[k], key="labels")
    known: dict[str, Adapter] = {}
    for labels, path in zip(found, paths, strict=True):
        for adapter in labels.adapters:
            # Of one that is nobody's row in a file, that file knows only the name.
            bare = Adapter(adapter.name, adapter.name)
            before = known.get(adapter.name, bare)
            if before not in (bare, adapter) and adapter != bare:
                reason = "says otherwise of this adapter than a file before"
                raise InputError(reason, path=path, key=adapter.name)
            known[adapter.name] = adapter if before == bare else before
    names = sorted(known)
    widest = max(labels.members.shape[1] for labels in found)
    columns = sorted({name for labels in found for name in labels.columns})
    merges = np.cumsum([0, *(int(labels.merge.max()) + 1 for labels in found)])
    return Labels(
        tuple(known[name] for name in names),
        np.concatenate([_renumbered(labels, names, widest) for labels in found]),
        np.concatenate([labels.merge + n for labels, n in zip(found, merges, strict=False)]),
        *(np.concatenate([getattr(labels, n) for labels in found])
          for n in ("operator", "y", "se")),
        {n: np.concatenate([labels.columns.get(n, np.full(len(labels), np.nan))
                            for labels in found]) for n in columns},
        np.concatenate([_weights(labels, widest) for labels in found])
        if any(labels.weights is not None for labels in found) else None,
        *(tuple(sorted({v for labels in found for v in getattr(labels, n)}))
          for n in ("bases", "fingerprints")),
        " ".join(sorted(digests)),
        np.concatenate([np.full(len(labels), None, object) if labels.methods is None
                        else labels.methods for labels in found]),
    )  # fmt: skip


def _renumbered(labels: Labels, names: Sequence[str], widest: int) -> np.ndarray:
    number = np.array([*(names.index(a.name) for a in labels.adapters), -1], np.int32)
    return _wide(number[labels.members], widest, -1)


def _weights(labels: Labels, widest: int) -> np.ndarray:
    if labels.weights is None:
        return np.full((len(labels), widest), np.nan)
    return _wide(labels.weights, widest, np.nan)


def _wide(values: np.ndarray, widest: int, fill: float) -> np.ndarray:
    gap = widest - values.shape[1]
    return np.pad(values, ((0, 0), (0, gap)), constant_values=fill)
