"""Host side of `gram_pass`: tables of modules, tiles and sums. Needs torch, not triton."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from ._pass_rows import PRODUCTS, padded
from ._tiles import cut, power_of_two_in

# Columns of the table that the kernels read, one row per module: MODULE, then SIDE for each stack.
# All is int64, and in one table: every pointer costs two registers where none are left.
#
# A module: its tile pairs [pair, pair_end) of all, its padded columns, where its partial sums and
# its output start, the row stride of the former, and its first block of the second stage.
MODULE = ("pair", "pair_end", "p", "q", "partial", "partial_row", "out", "block")
# Its rows in one stack: starts and row strides in elements, how many, the first of them among the
# weights; where its tiles, row owners and segments lie in the tables of _Cut; tiles and segments.
SIDE = ("u", "u_row", "v", "v_row", "rows", "weight", "tiles", "owner", "parts_of", "n_tiles",
        "count")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """What one pass computes. Tables are on the host."""

    modules: torch.Tensor  # (M, columns of MODULE, SIDE and SIDE), the dearest module first
    tables: dict[str, torch.Tensor]  # int32: rows, parts, part_of_row, parts_of, module_of_block
    sums: tuple[tuple[int, int, int], ...]  # distinct, sorted: (product, row, column)
    sum_of: torch.Tensor  # (epilogues, 2): its sum, and that of the transposed tile
    chunk_i: int
    chunk_j: int
    uniform: bool
    most_parts: int  # in a tile
    widest: int  # parts of a module
    pairs: int
    partials: int  # per sum
    blocks: int
    results: int

    def reads(self, letter):
        return any(letter in PRODUCTS[product] for product, _, _ in self.sums)


def sums_of(epilogues, symmetric):
    """The sums that the tiles hold, and for each epilogue its own and that of a transposed tile.

    Without a second stack a tile below the diagonal is the transpose of one above, so a sum whose
    weights differ needs the one with the weights exchanged.
    """
    flipped = [(product, column, row) for product, row, column in epilogues]
    sums = sorted({*epilogues, *(flipped if symmetric else ())})
    pairs = zip(epilogues, flipped if symmetric else epilogues, strict=True)
    return tuple(sums), torch.tensor([[sums.index(x) for x in pair] for pair in pairs])


def results_of(first, second):
    """Where each module's n1 x n2 results start, and the end."""
    counts = [a * b for a, b in zip(first.counts, second.counts, strict=True)]
    return list(accumulate(counts, initial=0))


def plan(first, second, p, q, epilogues, block, fold):
    """The Plan of a pass with tiles of `block` rows; `second` None: the first with itself."""
    symmetric, other = second is None, second or first
    cuts = _Cuts(block)
    cut_i = [cuts.of(bounds) for bounds in first.bounds]
    cut_j = cut_i if symmetric else [cuts.of(bounds) for bounds in other.bounds]
    at_result = results_of(first, other)
    weight_i, weight_j = (list(accumulate(side.rows, initial=0)) for side in (first, other))

    modules, module_of_block = [], []
    pairs = partials = 0
    # The dearest tiles first, so that none of them is left to a program that others wait for.
    for m in sorted(range(len(p)), key=lambda m: -p[m] - q[m]):
        i, j = cut_i[m], cut_j[m]
        n_i, n_j = cuts.tiles[i].count, cuts.tiles[j].count
        tile_pairs = n_i * (n_i + 1) // 2 if symmetric else n_i * n_j
        parts_i, parts_j = (len(cuts.tiles[t].part_rows) for t in (i, j))
        modules.append([
            pairs, pairs + tile_pairs, padded(p[m]), padded(q[m]), partials, parts_j,
            at_result[m], len(module_of_block), *_side(first, m, weight_i[m], cuts, i),
            *_side(other, m, weight_j[m], cuts, j),
        ])  # fmt: skip
        blocks = -(-first.counts[m] // fold.block_i) * -(-other.counts[m] // fold.block_j)
        module_of_block += [len(modules) - 1] * blocks
        pairs, partials = pairs + tile_pairs, partials + parts_i * parts_j

    sums, sum_of = sums_of(epilogues, symmetric)
    used_i, used_j = (
        [cuts.tiles[t] for t in set(side) if cuts.tiles[t].count] for side in (cut_i, cut_j)
    )
    chunk_i, chunk_j = (power_of_two_in(t.chunk for t in used) for used in (used_i, used_j))
    same = [rows == chunk_i for t in used_i for rows in t.part_rows]
    same += [rows == chunk_j for t in used_j for rows in t.part_rows]
    uniform = all(same)
    tables = cuts.tables() | {"module_of_block": module_of_block}
    if uniform:
        del tables["part_of_row"]
    return Plan(
        modules=torch.tensor(modules),
        tables={name: torch.tensor(x, dtype=torch.int32) for name, x in tables.items()},
        sums=sums,
        sum_of=sum_of,
        chunk_i=chunk_i,
        chunk_j=chunk_j,
        uniform=uniform,
        most_parts=max((t.most_parts for t in used_j), default=1),
        widest=max((len(t.part_rows) for t in used_j), default=0),
        pairs=pairs,
        partials=partials,
        blocks=len(module_of_block),
        results=at_result[-1],
    )


class _Cuts:
    """The tiles of modules; modules with the same bounds share one cut and its tables."""

    def __init__(self, block):
        self.tiles, self._block, self._seen = [], block, {}
        self.at = []  # of each cut: where its tiles, row owners and segments start
        self._rows, self._parts, self._owner, self._parts_of = [], [], [], []

    def of(self, bounds):
        key = tuple(bounds)
        if key not in self._seen:
            tiles = cut(bounds, self._block)
            self._seen[key] = len(self.tiles)
            self.tiles.append(tiles)
            self.at.append((len(self._rows), len(self._owner), len(self._parts_of)))
            self._rows += tiles.rows
            self._parts += tiles.parts
            for part, rows in enumerate(tiles.part_rows):
                self._owner += [part] * rows
            self._parts_of += tiles.parts_of
        return self._seen[key]

    def tables(self):
        return {
            "rows": self._rows,
            "parts": self._parts,
            "part_of_row": self._owner,
            "parts_of": self._parts_of,
        }


def _side(side, m, weight, cuts, t):
    return [
        side.starts_u[m], side.strides_u[m], side.starts_v[m], side.strides_v[m], side.rows[m],
        weight, *cuts.at[t], cuts.tiles[t].count, side.counts[m],
    ]  # fmt: skip
