"""Launch policy of the Triton kernels, as data. Imports neither torch nor triton."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GramConfig:
    """One way to launch the block Gram. A tile is `block` x `block` rows of the two stacks."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8  # tile rows that share the columns they read, for the L2 cache
    precision: str = "ieee"  # tl.dot input_precision; matters for fp32 operands only
    maxnreg: int | None = None  # only where ptxas would rather spill than give up a program


@dataclass(frozen=True)
class FoldConfig:
    """Launch of the second stage: partial sums to scaled float64 output. Unmeasured."""

    block_i: int = 32
    block_j: int = 32
    num_warps: int = 4
    num_stages: int = 2  # its loops run once or twice: nothing to pipeline


FOLD = FoldConfig()

# Every line is unmeasured: chosen by register and shared-memory count from compilation, so that no
# variant spills (README.md has the table, tests/test_triton_gram_compiled.py keeps it true). Both
# Grams of a tile stay in registers: 128 x 128 takes 8 warps and 128 of the 255 registers of a
# thread, and one program then fills a multiprocessor's register file. "small" is for problems with
# fewer tile pairs than multiprocessors.
#
# sm_80 multiplies from registers: fp32 at full precision (tf32x3: three products, each operand
# split in two) spills at 128 even with block_k=16, and at 64 on 4 warps.
AMPERE = {
    ("half", "large"): GramConfig(block=128, block_k=32, num_warps=8, num_stages=4),
    ("half", "small"): GramConfig(block=64, block_k=64, num_warps=4, num_stages=4),
    ("high", "large"): GramConfig(128, 32, num_warps=8, num_stages=3, precision="tf32"),
    ("high", "small"): GramConfig(64, 32, num_warps=4, num_stages=4, precision="tf32"),
    ("highest", "large"): GramConfig(64, 16, num_warps=8, num_stages=4, precision="tf32x3"),
    ("highest", "small"): GramConfig(64, 16, num_warps=8, num_stages=4, precision="tf32x3"),
    ("fp64", "large"): GramConfig(64, 32, num_warps=8, num_stages=3),
    ("fp64", "small"): GramConfig(32, 32, num_warps=4, num_stages=3, maxnreg=128),
}
# sm_90 multiplies from shared memory (wgmma): fewer registers, so wider tiles and one more stage
# (4 x 32 KiB of the 227 KiB). Its fp64 instruction is the one of sm_80; there block_k=32 spills.
HOPPER = {
    ("half", "large"): GramConfig(block=128, block_k=64, num_warps=8, num_stages=4),
    ("half", "small"): GramConfig(block=64, block_k=64, num_warps=4, num_stages=4),
    ("high", "large"): GramConfig(128, 32, num_warps=8, num_stages=4, precision="tf32"),
    ("high", "small"): GramConfig(64, 32, num_warps=4, num_stages=4, precision="tf32"),
    ("highest", "large"): GramConfig(128, 16, num_warps=8, num_stages=4, precision="tf32x3"),
    ("highest", "small"): GramConfig(64, 32, num_warps=4, num_stages=4, precision="tf32x3"),
    ("fp64", "large"): GramConfig(64, 16, num_warps=8, num_stages=3),
    ("fp64", "small"): GramConfig(32, 32, num_warps=4, num_stages=3),
}

# Small tiles, so that small test problems still have many of them.
INTERPRETER = GramConfig(block=32, block_k=32, num_warps=1, num_stages=1, group=2)


@dataclass(frozen=True)
class TileConfig:
    """Launch of a kernel on tiles of deltas, `block_i` rows of `block_j` entries. Unmeasured."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int = 1  # nothing goes through shared memory
    tiles: int = 1  # tiles side by side that one program takes in turn


@dataclass(frozen=True)
class PackConfig:
    """Launch of the copy of factors to float32 rows. Unmeasured."""

    block: int = 1024
    num_warps: int = 4


# Packed factors are padded to these, so that the loop over the rank has no masks.
PAD = 256  # columns: a multiple of every tile
RANK_STEP = 4  # rows per delta: loads in flight at once
TENSOR_STEP = 16  # the same where the tensor core multiplies: its smallest depth
PACK = PackConfig()
# Unmeasured: chosen by compilation, so that no variant spills (README.md). A tile is in registers
# once per accumulator, 1 for "sum", 2 for "fisher", 3 to 5 for "ties", and once more for the delta
# at work. "chain": entries are multiply-adds in order. "tensor": products of the tensor core, by
# mma.m16n8k16 in both kernels: tiles of 64 rows would get wgmma on sm_90, and perhaps other bits.
MERGE = {"chain": TileConfig(16, 128, num_warps=4), "tensor": TileConfig(16, 64, num_warps=4)}
# Larger tiles take 128 registers and more with Triton 3.6.
ORDER = dict.fromkeys(MERGE, TileConfig(16, 64, num_warps=4, tiles=16))
INTERPRETER_TILE = TileConfig(16, 32, num_warps=1, tiles=2)
ORDER_BITS = 17  # of a key, counted apart in one pass: 1 MiB per order statistic
ORDER_SLOTS = 64  # places for one count, so that fewer programs wait for each other
WORKSPACE = 1 << 28  # bytes: rows of a merged delta, limits and sorted rows of "della", or a strip


@dataclass(frozen=True)
class PairConfig:
    """Launches of the statistics of pairs: `block` x `block` pairs a program. Unmeasured."""

    block: int
    sums_warps: int
    counts_warps: int
    run: int = 256  # entries whose float32 sums are added up in float64
    sums_step: int = 4  # entries at a time, and of products of zeros and ones
    counts_step: int = 32
    programs: int = 4096  # wanted, by cutting the entries into segments


# Statistics of entries. Sums are float32 over `tiles` numbers in a row.
ENTRY = TileConfig(16, 64, num_warps=4, tiles=16)
ENTRY_SAMPLE = TileConfig(8, 16, num_warps=1, tiles=16)  # the tiles of a sample are that small
ENTRY_INTERPRETER = TileConfig(16, 64, num_warps=1, tiles=2)
# Six float32 sums of each pair in registers: 8 pairs a thread.
PAIR = PairConfig(32, sums_warps=4, counts_warps=4)
PAIR_INTERPRETER = PairConfig(16, 1, 1, run=256, sums_step=128, programs=4)


def order_sample(size):
    """Entries sampled to bracket an order statistic of `size`; 0 where all are counted at once.

    About 4.5 / sqrt(sample) of all entries then fall into the bracket. Unmeasured.
    """
    return 0 if size <= 1 << 16 else min(int(4 * size ** (2 / 3)), 1 << 22)


def choose(kind, reduce, tile_pairs_at, capability, multiprocessors):
    """The configuration for operands of `kind` ("half", "high", "highest" or "fp64").

    `tile_pairs_at(block)` counts the tile pairs of the problem. Large tiles read less per product,
    but with fewer pairs than multiprocessors part of the device is idle. Without a reduction every
    element of the tile is stored, and the addresses of a large tile spill.
    """
    if capability < (8, 0):
        major, minor = capability
        raise RuntimeError(f"the Triton block Gram needs sm_80 or newer, this is sm_{major}{minor}")
    # Parts after Hopper take the table whose shared memory they surely have; unverified there.
    table = HOPPER if capability[0] in (9, 10) else AMPERE
    large = table[kind, "large"]
    fills = tile_pairs_at(large.block) >= multiprocessors
    return large if fills and reduce != "none" else table[kind, "small"]


@dataclass(frozen=True)
class CanonicalConfig:
    """Launches of the canonical form at one height (rows of an entry, padded)."""

    block_k: int  # columns of the factor at a time
    span: int  # columns that one program writes
    rows_warps: int
    num_stages: int
    cholesky_warps: int  # all it holds, three height x height float64 matrices, is in registers
    jacobi_warps: int  # four


# Every line is unmeasured: no variant spills on sm_80 or sm_90 (tests/test_device_canonical.py).
CANONICAL = {
    16: CanonicalConfig(64, 2048, rows_warps=4, num_stages=3, cholesky_warps=2, jacobi_warps=1),
    32: CanonicalConfig(32, 1024, rows_warps=4, num_stages=3, cholesky_warps=4, jacobi_warps=2),
    64: CanonicalConfig(32, 512, rows_warps=8, num_stages=2, cholesky_warps=8, jacobi_warps=8),
}
