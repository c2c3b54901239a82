"""Columns for labels that come without: computed from the adapters themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.merge_columns import level_columns
from mergeprobe_fast.io.calibration import Calibration, open_calibration
from mergeprobe_fast.merge_tables import merge_tables
from mergeprobe_fast.merges import Merge, merge_features
from mergeprobe_fast.merging import MERGE_METHODS
from mergeprobe_fast.predict.columns import EARLY
from mergeprobe_fast.predict.labels import Labels
from mergeprobe_fast.recorded import open_recorded
from mergeprobe_fast.zoo import Zoo

_PLAIN = {"sum": "one", "mean": "mean"}  # operators that are a weighted sum, and its weights


def with_columns(
    labels: Labels,
    zoo: Zoo,
    *,
    calibration: Calibration | Any = None,
    domains: Mapping[str, str] | None = None,
    early: Zoo | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Labels:
    """The labels with the columns of :func:`mergeprobe_fast.merge_features` of their merges.

    Args:
        zoo: has all members, by name.
        calibration, domains: as ``merge_features`` takes them.
        early: the same adapters early in training: gives the "early:" columns, from weights and
            calibration. They are NaN in rows with a member that it does not have, and of merges
            that are no sum with weights.

    A merge is made as its ``method`` says, or its operator where that is a method's name, with the
    row's weights, its ``rank`` and the method's own arguments otherwise.

    Raises:
        InputError: a member that the zoo does not have, an operator that is no method; as
            ``merge_features``.
    """
    opened = calibration
    if calibration is not None and not isinstance(calibration, Calibration):
        opened = open_calibration(calibration)
    known = set(zoo.names)
    for adapter in labels.adapters:
        if adapter.name not in known:
            raise InputError("is in the labels and not in the zoo", key=adapter.name)
    columns = dict(labels.columns)
    columns |= _columns(labels, zoo, opened, domains, threads, progress)
    if early is not None:
        found = _early_columns(labels, early, opened, domains, threads, progress)
        columns |= {f"{EARLY}{n}": v for n, v in found.items()}
    bases = labels.bases or ((zoo.base_model,) if zoo.base_model else ())
    prints = () if opened is None else (opened.info.config_sha256,)
    return dataclasses.replace(labels, columns=columns, bases=bases, fingerprints=prints)


def _names(labels: Labels) -> np.ndarray:
    return np.array([a.name for a in labels.adapters], dtype=object)


def _columns(
    labels: Labels, zoo: Zoo, calibration: Calibration | None, domains: Mapping[str, str] | None,
    threads: int | None, progress: Callable[[int], None] | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    names = _names(labels)
    first, number = np.unique(labels.merge, return_index=True, return_inverse=True)[1:]
    table = merge_features(
        zoo, [_merge(labels, row, names) for row in first], calibration=calibration,
        domains=domains, threads=threads, progress=progress,
    )  # fmt: skip
    place = {key: i for i, key in enumerate(zip(table["merge"], table["member"], strict=True))}
    own = names[labels.members[:, 0]]
    at = [place[key] for key in zip(number.ravel(), own, strict=True)]
    return {name: np.asarray(table[name])[at] for name in level_columns(table.level)}


def _early_columns(
    labels: Labels, zoo: Zoo, calibration: Calibration | None, domains: Mapping[str, str] | None,
    threads: int | None, progress: Callable[[int], None] | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Of snapshots; points are of the trained adapters, and so are left out."""
    if domains is not None:
        domains = {n: d for n, d in domains.items() if n in zoo.names}
    recorded = open_recorded(zoo, calibration, domains)
    tables = merge_tables(
        zoo, dataclasses.replace(recorded, points=None), threads=threads, progress=progress
    )
    names, number = _names(labels), {n: i for i, n in enumerate(zoo.names)}
    merges = [_merge(labels, row, names) for row in range(len(labels))]
    rows = [
        row for row, m in enumerate(merges)
        if m.is_sum and m.weights is not None and all(n in number for n in m.members)
    ]  # fmt: skip
    members = np.full((len(rows), labels.members.shape[1]), -1, np.int32)
    weights = np.zeros(members.shape)
    for i, row in enumerate(rows):
        m, k = merges[row], len(merges[row].members)
        members[i, :k] = [number[n] for n in m.members]
        weights[i, :k] = {"one": 1.0, "mean": 1 / k}[m.weights] if isinstance(
            m.weights, str) else m.weights  # fmt: skip
    out = {}
    for name, values in tables.features(members, weights).items():
        out[name] = np.full(len(labels), np.nan)
        out[name][rows] = values[:, 0]
    return out


def _merge(labels: Labels, row: int, names: np.ndarray) -> Merge:
    members = [str(n) for n in names[labels.members[row][labels.members[row] >= 0]]]
    operator = str(labels.operator[row])
    method = operator if labels.methods is None else str(labels.methods[row])
    weights: Any = None
    if method in _PLAIN:
        method, weights = "cat", _PLAIN[method]
    if method not in MERGE_METHODS:
        reason = f"{method!r} is no merge method; name one in a column 'method', or the columns"
        raise InputError(f"{reason} in the file", key="operator")
    if labels.weights is not None and np.isfinite(labels.weights[row][: len(members)]).all():
        weights = labels.weights[row][: len(members)].tolist()
    rank = labels.columns.get("rank", np.full(len(labels), np.nan))[row]
    return Merge(members, method, weights, None if np.isnan(rank) else int(rank))
