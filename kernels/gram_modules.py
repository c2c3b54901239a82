"""P1 over many modules on the GPU: one launch for the tiles, one for the sums of their parts."""

import torch

from . import _arguments, _configs, _pass_configs, _pass_rows
from ._pass_plan import plan, results_of
from ._pass_rows import Rows
from .gram import INTERPRETED, TRITON_DTYPE, device_guard, dot_dtype, kind_of

from ._pass_tile import gram_pass_kernel, pass_fold_kernel  # isort: skip  # after gram's check

__all__ = ["Rows", "gram_pass"]


def gram_pass(
    first,
    second,
    p,
    q,
    epilogues,
    *,
    precision="highest",
    accumulate="fp32",
    out=None,
    programs=None,
):
    """Sums of products of two Grams over the segments of every module: float64.

    For module m, segments i of `first` and j of `second`, and epilogue (product, row, column):

        out[e, start_m + i n2_m + j] = sum_{a in i, b in j} w_a X[a, b] w'_b

    X is M * N (product 0), M * M (1) or N * N (2) entry by entry, with M = U U2^T and N = V V2^T of
    the module's rows; w is `first.weights[row]`, w' is `second.weights[column]`, ones for -1.
    Modules of n1_m x n2_m results follow one another. A segment without rows gives 0.

    `first` and `second` are Rows on one CUDA device; `second` None is the first with itself, and
    then only tiles on and above the diagonal are computed. `p` and `q` are the columns of each
    module's U and V. bf16 and fp16 are read exactly; `precision` is about fp32 factors: "highest"
    is good to 2**-20 per product, "high" rounds them to tf32 (2**-10). `accumulate="fp64"` is exact
    to float64 rounding. `out`: float64 (epilogues, results), each row contiguous. `programs` is the
    size of the launch, which the results do not depend on.
    """
    p, q, epilogues = _pass_rows.check(first, second, p, q, epilogues, precision, accumulate)
    device = first.U.device
    shape = len(epilogues), results_of(first, second or first)[-1]
    out = _arguments.output(out, shape, device)
    if out.stride(1) != 1 and out.numel():
        raise ValueError(f"the rows of out must be contiguous, got strides {out.stride()}")
    on_device = device_guard(device)
    if out.numel() == 0:
        return out
    with on_device:
        config = _choose(first, second, precision, accumulate)
        work = plan(first, second, p, q, epilogues, config.block, _configs.FOLD)
        if work.pairs == 0:
            return out.zero_()
        programs = programs or _programs(config, device)
        for kernel, grid, arguments in launches(
            first, second, work, accumulate, config, out, programs
        ):
            kernel[grid](**arguments)
    return out


def launches(first, second, work, accumulate, config, out, programs):
    """What `gram_pass` runs, in order, as (kernel, grid, arguments by name)."""
    symmetric, other = second is None, second or first
    device = out.device
    acc = torch.float64 if accumulate == "fp64" else torch.float32
    if work.pairs >= 2**30 or work.blocks >= 2**31:  # the loop steps past the last by a launch
        raise ValueError(f"too many rows for one launch: {work.pairs} tile pairs")
    if work.widest * config.block >= 2**31:  # offsets within a tile are 32 bits
        raise ValueError(f"a module has too many rows for one launch: {work.widest} parts")
    # A copy that blocks would wait for all that is queued there.
    modules = work.modules.to(device, non_blocking=True)
    sum_of = work.sum_of.to(torch.int32).to(device, non_blocking=True)
    tables = {name: table.to(device, non_blocking=True) for name, table in work.tables.items()}
    partial = torch.empty((len(work.sums), work.partials), dtype=acc, device=device)
    weighted = any(w >= 0 for _, *weights in work.sums for w in weights)
    weights = (first.weights, other.weights) if weighted else (None, None)
    factors = {}
    for letter in "UV":
        x, y = getattr(first, letter), getattr(other, letter)
        used = work.reads(letter.lower())
        factors[f"p_{letter.lower()}"] = x if used else None
        factors[f"p_{letter.lower()}2"] = y if used else None
        factors[f"DOT_{letter}"] = dot_dtype(x, y, acc) if used else None
    yield (
        gram_pass_kernel,
        (min(programs, work.pairs),),
        dict(
            **factors,
            p_weights_i=weights[0],
            p_weights_j=weights[1],
            s_weights_i=weights[0].stride(0) if weighted else 0,
            s_weights_j=weights[1].stride(0) if weighted else 0,
            p_modules=modules,
            p_rows=tables["rows"],
            p_parts=tables["parts"],
            p_part_of_row=tables.get("part_of_row"),
            p_partial=partial,
            s_partial=partial.stride(0),
            n_pairs=work.pairs,
            SUMS=work.sums,
            SYMMETRIC=symmetric,
            CHUNK_I=work.chunk_i,
            CHUNK_J=work.chunk_j,
            UNIFORM=work.uniform,
            PARTS_J=work.most_parts,
            ACC=TRITON_DTYPE[acc],
            PRECISION=config.precision,
            BLOCK=config.block,
            BLOCK_K=config.block_k,
            GROUP=config.group,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
            enable_fp_fusion=True,  # the default, and so the bits, change with Triton 3.10
        ),
    )
    fold = _configs.FOLD
    yield (
        pass_fold_kernel,
        (work.blocks, len(work.sum_of)),
        dict(
            p_partial=partial,
            s_partial=partial.stride(0),
            p_modules=modules,
            p_parts_of=tables["parts_of"],
            p_module_of_block=tables["module_of_block"],
            p_sum_of=sum_of,
            p_out=out,
            s_out=out.stride(0),
            MIRROR=symmetric,
            BLOCK_I=fold.block_i,
            BLOCK_J=fold.block_j,
            num_warps=fold.num_warps,
            num_stages=fold.num_stages,
            enable_fp_fusion=True,
        ),
    )


def _choose(first, second, precision, accumulate):
    if INTERPRETED:
        return _pass_configs.INTERPRETER
    other = second or first
    kind = kind_of(((first.U, other.U), (first.V, other.V)), accumulate, precision)

    def tile_pairs(block):
        tiles = [[-(-rows // block) for rows in side.rows] for side in (first, other)]
        pairs = sum(a * b for a, b in zip(*tiles, strict=True))
        return pairs if second is not None else pairs / 2

    device = torch.cuda.get_device_properties(first.U.device)
    capability = (device.major, device.minor)
    is_even = all(_pass_configs.even(side.bounds) for side in (first, other))
    processors = device.multi_processor_count
    return _pass_configs.choose(kind, tile_pairs, is_even, capability, processors)


def _programs(config, device):
    if INTERPRETED:
        return 3
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * config.programs
