"""Gradient-boosted trees: xgboost fits them, and they become plain arrays."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.predict.forest import Forest, Tree, counted, rounded

NEEDS = "needs xgboost: pip install 'mergeprobe-fast[fit]'"


def xgboost() -> Any:
    """The module; InputError naming the extra where it is not installed."""
    try:
        import xgboost
    except ImportError:
        raise InputError(NEEDS, key="fit") from None
    return xgboost


def fit_boosted(
    x: np.ndarray, t: np.ndarray, weights: np.ndarray, *, rounds: int, depth: int, rate: float,
    rows: float, columns: float, child_weight: float, ridge: float, seed: int,
) -> Forest:  # fmt: skip
    """Squared error on (n, columns) and (n,), NaN allowed in ``x``; the same for the same seed."""
    xgb = xgboost()
    start = float(np.float32(np.average(t, weights=weights)))
    settings = {
        "objective": "reg:squarederror", "base_score": start, "max_depth": depth, "eta": rate,
        "subsample": rows, "colsample_bynode": columns, "min_child_weight": child_weight,
        "lambda": ridge, "tree_method": "hist", "nthread": 1, "seed": seed, "verbosity": 0,
    }  # fmt: skip
    data = xgb.DMatrix(np.asarray(x, np.float32), label=t, weight=weights, nthread=1)
    forest = forest_of(xgb.train(settings, data, rounds), start, x)
    return dataclasses.replace(forest, trees=[rounded(tree, x) for tree in forest.trees])


def forest_of(booster: Any, start: float, x: np.ndarray) -> Forest:
    """The trees of a booster fitted with ``base_score`` = start, counted on its training rows."""
    model = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]
    return Forest([counted(_tree(t), x) for t in model["trees"]], start, 1.0)


def _tree(value: dict[str, Any]) -> Tree:
    """Renumbered, so that children follow parents and nothing that was pruned is left."""
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        if value["left_children"][node] >= 0:
            stack += [value["right_children"][node], value["left_children"][node]]
    place = {node: n for n, node in enumerate(order)} | {-1: -1}
    left, right = (np.array([place[value[f"{side}_children"][n]] for n in order], np.int32)
                   for side in ("left", "right"))  # fmt: skip
    inner = left >= 0
    return Tree(
        np.where(inner, np.array(value["split_indices"])[order], -1).astype(np.int32),
        np.array(value["split_conditions"], np.float32)[order], left, right,
        inner & np.array(value["default_left"], bool)[order], np.zeros(len(order), np.int32),
    )  # fmt: skip
