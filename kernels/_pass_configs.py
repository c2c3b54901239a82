"""Launch policy of `gram_pass`, as data. Imports neither torch nor triton."""

from dataclasses import dataclass
from itertools import pairwise

from . import _configs


@dataclass(frozen=True)
class PassConfig(_configs.GramConfig):
    """One way to launch the persistent kernel. Unmeasured."""

    programs: int = 1  # per multiprocessor


def _table(block_gram):
    """The block Gram's table; programs of four warps leave registers and memory for a second."""
    return {k: PassConfig(**vars(v), programs=8 // v.num_warps) for k, v in block_gram.items()}


# Unmeasured: what the block Gram has, as far as no variant that `choose` can meet spills (but one,
# by 8 bytes: README.md). Two Grams and one weighted product fill a large tile's registers.
AMPERE = _table(_configs.AMPERE)
HOPPER = _table(_configs.HOPPER)
HOPPER["highest", "large"] = HOPPER["highest", "small"]  # at 128, 8 bytes a thread spill
INTERPRETER = PassConfig(**vars(_configs.INTERPRETER), programs=3)

EVEN_ROWS = 4  # fewer rows per segment leave more sums than registers on a large tile


def even(bounds):
    """Whether all segments (of any module) have the same number of rows, a power of two from 4."""
    ranks = {b - a for module in bounds for a, b in pairwise(module)} - {0}
    return len(ranks) < 2 and all(r >= EVEN_ROWS and r & (r - 1) == 0 for r in ranks)


def choose(kind, tile_pairs_at, is_even, capability, multiprocessors):
    """The configuration for operands of `kind` ("half", "high", "highest" or "fp64").

    `tile_pairs_at(block)` counts the tile pairs of all modules. Segments that are not `even` are
    summed in a loop over parts, which spills on large tiles (120 to 350 bytes a thread).
    """
    if capability < (8, 0):
        major, minor = capability
        raise RuntimeError(f"the Triton pass needs sm_80 or newer, this is sm_{major}{minor}")
    table = HOPPER if capability[0] in (9, 10) else AMPERE
    large = table[kind, "large"]
    fills = tile_pairs_at(large.block) >= multiprocessors
    return large if fills and is_even else table[kind, "small"]
