"""Decision trees as plain arrays, their prediction and its attribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergeprobe_fast import _native

# csrc/include/mergeprobe/forest.hpp: ForestNode.
NODE = np.dtype([("at", "f4"), ("column", "i2"), ("missing_left", "i2"), ("child", "i4", 2)])


@dataclass(frozen=True, eq=False)
class Tree:
    """One tree, (nodes,) each. Node 0 is the root; children come after their parent.

    Attributes:
        column: that a node asks for, int32; -1 for a leaf.
        at: float32; rows below go left. Of a leaf: its value.
        left, right: children, int32; -1 for a leaf.
        missing_left: whether rows without a value go left.
        rows: rows of the training set that came by, int32.
    """

    column: np.ndarray
    at: np.ndarray
    left: np.ndarray
    right: np.ndarray
    missing_left: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.column)

    @cached_property
    def depth(self) -> int:
        """Questions on the longest way to a leaf."""
        depth = np.zeros(len(self), np.int64)
        for node in range(len(self)):
            if self.column[node] >= 0:
                depth[[self.left[node], self.right[node]]] = depth[node] + 1
        return int(depth.max())

    @cached_property
    def means(self) -> np.ndarray:
        """(nodes,) the mean of a node's leaves, by training rows; without any, of its children."""
        mean = self.at.astype(np.float64)
        for node in range(len(self) - 1, -1, -1):
            if self.column[node] >= 0:
                both = [self.left[node], self.right[node]]
                weight = self.rows[both].astype(np.float64)
                mean[node] = np.average(mean[both], weights=weight if weight.any() else None)
        return mean

    @cached_property
    def _walk(self) -> tuple[np.ndarray, ...]:
        """Column, threshold and the two children by turns; a leaf leads to itself."""
        leaf = self.column < 0
        itself = np.arange(len(self))
        child = np.stack([np.where(leaf, itself, self.left), np.where(leaf, itself, self.right)], 1)
        return (np.where(leaf, 0, self.column).astype(np.intp), self.at,
                child.ravel().astype(np.intp), ~self.missing_left)  # fmt: skip

    def leaves(self, x: np.ndarray) -> np.ndarray:
        """(n,) the leaf of each row of ``x``, (n, columns) float32."""
        column, at, child, missing_right = self._walk
        flat, row = np.ascontiguousarray(x.T).ravel(), np.arange(len(x))
        holes = bool(np.isnan(x).any())
        start = column * len(row)
        node = np.zeros(len(row), np.intp)
        for _ in range(self.depth):
            value = flat.take(row + start.take(node))
            right = value >= at.take(node)
            if holes:
                right |= np.isnan(value) & missing_right.take(node)
            node = child.take(2 * node + right)
        return node


@dataclass(frozen=True, eq=False)
class Forest:
    """``start`` plus ``scale`` times the sum of the trees."""

    trees: Sequence[Tree]
    start: float
    scale: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,) float64 from (n, columns); NaN is a value like any other. Compared in float32."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty(len(x))
        _native.core().forest_sums(*self._nodes, x, out)
        return self.start + self.scale * out

    @cached_property
    def _nodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """NODE (nodes of all trees,), where each tree begins, and how deep it is."""
        roots = np.cumsum([0, *(len(t) for t in self.trees)])
        nodes = np.zeros(roots[-1], NODE)
        for t, first in zip(self.trees, roots[:-1], strict=True):
            own = nodes[first : first + len(t)]
            column, own["at"], child, missing_right = t._walk
            own["column"], own["missing_left"] = column, ~missing_right
            own["child"] = child.reshape(-1, 2) + first
        depths = np.array([t.depth for t in self.trees], np.int64)
        return nodes, roots[:-1].astype(np.int64), depths

    def contributions(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """A constant and (columns,) what each column adds to it for one row: path attribution.

        At every question on the row's way down, what the mean of the node's training rows changes
        by is credited to the column asked for (Saabas 2014). Constant and contributions add up to
        the prediction. Unlike Shapley values they depend on the order of the questions.
        """
        row = np.asarray(x, np.float32)
        out, constant = np.zeros(len(row)), self.start
        for tree in self.trees:
            node = 0
            constant += self.scale * tree.means[0]
            while tree.column[node] >= 0:
                column = tree.column[node]
                value = row[column]
                left = tree.missing_left[node] if np.isnan(value) else value < tree.at[node]
                below = tree.left[node] if left else tree.right[node]
                out[column] += self.scale * (tree.means[below] - tree.means[node])
                node = below
        return float(constant), out

    def used(self, columns: int) -> np.ndarray:
        """(columns,) whether any question asks for it."""
        asked = np.zeros(columns, bool)
        for tree in self.trees:
            asked[tree.column[tree.column >= 0]] = True
        return asked


def between(before: np.float32, here: np.float32) -> np.float32:
    """About the middle of two values, in the fewest digits that keep them apart."""
    middle = (float(before) + float(here)) / 2
    for digits in range(2, 9):
        found = np.float32(f"{middle:.{digits}g}")
        if before < found <= here:
            return found
    return here


def rounded(tree: Tree, x: np.ndarray) -> Tree:
    """The same on (n, columns) training rows, in few digits: thresholds between their values."""
    at = np.array([np.float32(f"{v:.5g}") for v in tree.at])
    for node in np.flatnonzero(tree.column >= 0):
        values = x[:, tree.column[node]].astype(np.float32)
        below, above = values[values < tree.at[node]], values[values >= tree.at[node]]
        at[node] = tree.at[node]
        if len(below) and len(above):
            at[node] = between(below.max(), above.min())
    return dataclasses.replace(tree, at=at)


def counted(tree: Tree, x: np.ndarray) -> Tree:
    """The same tree with ``rows`` counted on (n, columns) training rows."""
    rows = np.bincount(tree.leaves(np.asarray(x, np.float32)), minlength=len(tree))
    for node in range(len(tree) - 1, -1, -1):
        if tree.column[node] >= 0:
            rows[node] = rows[tree.left[node]] + rows[tree.right[node]]
    return Tree(tree.column, tree.at, tree.left, tree.right, tree.missing_left,
                rows.astype(np.int32))  # fmt: skip
