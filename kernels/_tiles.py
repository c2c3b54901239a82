"""Host side of the tile loop: which rows form a tile, and which rows are summed together.

A *part* is what one tile holds of one segment: the whole segment, or a slice of a segment that is
cut by a tile boundary. A tile sums its parts on chip; the second stage adds up the parts of a
segment. Needs torch, not triton.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

# Keeping segments whole leaves the end of a tile empty. Cutting through them wastes nothing but
# gives the second stage more parts; it pays once tile pairs, the square, shrink by a fifth.
WASTE_LIMIT = 1.1


@dataclass(frozen=True)
class Tiles:
    """The tiles of one stack: `rows` and `parts` bound each tile, `parts_of` each segment.

    Without parts every row stands for itself (`parts_of` is None).
    """

    rows: list[int]
    parts: list[int]
    part_rows: list[int]
    parts_of: list[int] | None

    @property
    def count(self):
        return len(self.rows) - 1

    @cached_property
    def chunk(self):
        """Largest power of two that divides every part: rows that may be added blindly."""
        return power_of_two_in(self.part_rows)

    @cached_property
    def align(self):
        """What the compiler may assume of a tile's first row; above 16 no load gets wider."""
        return power_of_two_in([16, *self.rows[:-1]])

    @cached_property
    def uniform(self):
        return all(rows == self.chunk for rows in self.part_rows)

    @cached_property
    def most_parts(self):
        """Most parts in one tile, rounded up to a power of two."""
        most = max(b - a for a, b in pairwise(self.parts))
        return 1 << (most - 1).bit_length()

    def tables(self, device):
        """`rows`, `parts`, the part of each row, `parts_of`: int32 on `device`."""
        rows = torch.tensor(self.rows, dtype=torch.int32).to(device)
        if self.parts_of is None:
            return rows, rows, rows, None
        ids = torch.arange(len(self.part_rows), dtype=torch.int32)
        owner = torch.repeat_interleave(ids, torch.tensor(self.part_rows))
        parts, parts_of = (torch.tensor(x, dtype=torch.int32) for x in (self.parts, self.parts_of))
        return rows, parts.to(device), owner.to(device), parts_of.to(device)


def cut(offsets, block):
    """Tiles of at most `block` rows; segments stay whole unless that wastes too much."""
    starts = sorted(set(offsets))  # empty segments own no rows
    rows = _whole_segments(starts, block)
    plain = [*range(0, starts[-1], block), starts[-1]]
    if len(rows) - 1 > WASTE_LIMIT * (len(plain) - 1):
        rows = plain
    bounds = sorted({*rows, *starts})
    index = {row: part for part, row in enumerate(bounds)}
    return Tiles(
        rows=rows,
        parts=[index[row] for row in rows],
        part_rows=[b - a for a, b in pairwise(bounds)],
        parts_of=[index[row] for row in offsets],
    )


def cut_rows(total, block):
    """Tiles of a stack whose rows are not summed."""
    rows = [*range(0, total, block), total]
    return Tiles(rows=rows, parts=rows, part_rows=[1], parts_of=None)


def _whole_segments(starts, block):
    rows = [0]
    while rows[-1] < starts[-1]:
        fits = starts[bisect_right(starts, rows[-1] + block) - 1]
        rows.append(fits if fits > rows[-1] else rows[-1] + block)
    return rows


def power_of_two_in(numbers):
    union = 0
    for number in numbers:
        union |= number
    return union & -union
