"""Trees in the model file: nodes in the order of reading, so that no file can hold a cycle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergeprobe_fast.io.json_fields import fields, many, number
from mergeprobe_fast.io.strict_json import Bad
from mergeprobe_fast.predict.forest import Forest, Tree

TREE = ("column", "at", "missing", "rows")
_MOST = float(np.finfo(np.float32).max)


def forest_json(forest: Forest) -> dict[str, Any]:
    """A forest as JSON has it.

    Of each tree, the root first, then all that is left of it, then all that is right: the column
    asked for, -1 for a leaf; the threshold, or the leaf's value; where rows without a value go, "l"
    or "r", "." for a leaf; and the training rows of each leaf, in order.
    """
    return {"start": forest.start, "scale": forest.scale,
            "trees": [_tree(tree) for tree in forest.trees]}  # fmt: skip


def _tree(tree: Tree) -> dict[str, Any]:
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        if tree.column[node] >= 0:
            stack += [tree.right[node], tree.left[node]]
    column = tree.column[order]
    return {
        "column": column.tolist(),
        # The shortest digits that are this float32 again.
        "at": [float(str(v)) for v in tree.at[order]],
        "missing": "".join(np.where(column < 0, ".", np.where(tree.missing_left[order], "l", "r"))),
        "rows": tree.rows[order][column < 0].tolist(),
    }


def read_forest(value: Any, where: str, columns: int) -> Forest:
    """The forest of such an object, which may ask for so many columns; ``Bad`` for any other."""
    found = fields(value, where, start=number, scale=number, trees=many(_fields))
    trees = found["trees"]
    return Forest(_trees(trees, f"{where}.trees", columns), found["start"], found["scale"])


def _fields(value: Any, where: str) -> dict[str, np.ndarray]:
    found = fields(value, where, column=_numbers, at=_numbers, missing=_sides, rows=_numbers)
    for name in ("at", "missing"):
        if len(found[name]) != len(found["column"]):
            reason = f"has {len(found[name])} nodes, column has {len(found['column'])}"
            raise Bad(reason, f"{where}.{name}")
    return found


def _trees(found: Sequence[dict[str, np.ndarray]], where: str, columns: int) -> list[Tree]:
    """Checked and linked all at once: there are some ten thousand nodes."""
    if not found:
        return []
    column, at, missing, leaf_rows = (
        np.concatenate([f[n] for f in found], dtype=np.float64) for n in TREE
    )
    size = np.array([len(f["column"]) for f in found])
    end = np.cumsum(size)
    number = np.repeat(np.arange(len(found)), size)  # the tree of each node
    leaf = column < 0
    leaves = np.add.reduceat(leaf.astype(np.int64), end - size)

    def check(wrong: np.ndarray, of: np.ndarray, reason: str, name: str) -> None:
        if wrong.any():
            raise Bad(reason, f"{where}[{of[wrong.argmax()]}].{name}")

    check((column < -1) | (column >= columns) | (column != np.rint(column)), number,
          f"asks for a column beyond the {columns}", "column")  # fmt: skip
    check(leaf != (missing == ord(".")), number, "has a side for a leaf, or none", "missing")
    check(np.abs(at) > _MOST, number, "is beyond float32", "at")
    each = np.array([len(f["rows"]) for f in found])
    check(each != leaves, np.arange(len(found)), "is not one number a leaf", "rows")
    of = np.repeat(np.arange(len(found)), each)
    check((leaf_rows < 0) | (leaf_rows != np.rint(leaf_rows)), of, "is no number of rows", "rows")
    # How many nodes of the tree are still to come: 0 for the first time behind its last.
    open_ = np.cumsum(np.where(leaf, -1, 1)) + number + 1
    last = np.zeros(len(column), bool)
    last[end - 1] = True
    check((open_ == 0) != last, number, "is not one tree", "column")
    # A node's subtree ends where one node less is to come than before it.
    node = np.arange(len(column))
    width = len(column) + 1
    place = (number * width + open_) * width + node
    order = np.argsort(place)
    wanted = (number * width + open_ - np.where(leaf, 0, 2)) * width + node
    stop = order[np.searchsorted(place[order], wanted)]
    total = np.zeros(len(column) + 1)
    total[1:][leaf] = leaf_rows
    total = np.cumsum(total)
    rows = total[stop + 1] - total[node]
    check(rows >= 2**31, number, "are too many", "rows")
    start = (end - size)[number]
    left = np.where(leaf, -1, node + 1 - start)
    right = np.where(leaf, -1, stop[np.minimum(node + 1, len(column) - 1)] + 1 - start)
    arrays = (column.astype(np.int32), at.astype(np.float32), left.astype(np.int32),
              right.astype(np.int32), missing == ord("l"), rows.astype(np.int32))  # fmt: skip
    return [Tree(*parts) for parts in zip(*(np.split(a, end[:-1]) for a in arrays), strict=True)]


def _numbers(value: Any, where: str) -> np.ndarray:
    """Many finite numbers, and so checked all at once: int64 where all are integers."""
    if not isinstance(value, list) or not value:
        raise Bad("is not a list of numbers", where)
    if not {*map(type, value)} <= {int, float}:
        raise Bad("is not a list of numbers", where)
    try:
        found = np.array(value)
    except OverflowError:
        found = np.zeros(0, object)
    if found.dtype.kind not in "if" or not np.isfinite(found).all():
        raise Bad("is not a list of finite numbers", where)
    return found


def _sides(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, str) or {*value} - {*"lr."}:
        raise Bad("is not a text of l, r and .", where)
    return np.frombuffer(value.encode(), np.uint8)
