"""Canonical form by Triton kernels, for heights that fit registers. See canonical.py."""

import contextlib

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise RuntimeError("the Triton backend needs the package triton, which is missing") from error

from . import _configs
from ._canonical_entries import ADDRESS, DTYPE, FLOATS, RANK, ROW, D, K
from ._canonical_rows import FIELDS, rows_kernel
from ._canonical_small import cholesky_kernel, jacobi_kernel
from ._canonical_torch import DEPENDENT

INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)
LEAST_HEIGHT = 16  # of an operand of tl.dot
MOST_HEIGHT = max(_configs.CANONICAL)
SWEEPS = 60
TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Side:
    """As `_canonical_torch.Side`; the rows are read where they lie, whatever their d and dtype."""

    def __init__(self, entries, height):
        table = entries.table
        # The kernel reads one unit stride; other views are copied.
        for e in ((table[:, ROW] != 1) & (table[:, K] != 1)).nonzero().flatten().tolist():
            entries.replace(e, entries.view(e).contiguous())
        self.entries, self.height = entries, height
        size = torch.tensor([t.itemsize for t in FLOATS])[table[:, DTYPE]]
        line = 16 // size
        k_major = table[:, K] == 1
        stride = torch.where(k_major, table[:, ROW] * (table[:, RANK] > 1), table[:, K])
        whole = torch.where(k_major, table[:, D], table[:, RANK])
        wide = (stride % line == 0) & (whole % line == 0) & (table[:, ADDRESS] % 16 == 0)
        self._kind = (table[:, DTYPE] * 2 + k_major) * 2 + wide
        align, unit = torch.where(wide, line, 1), torch.where(wide, 16, size)
        self._records = torch.zeros((len(table), FIELDS), dtype=torch.int64)
        columns = (
            table[:, ADDRESS] // unit,
            stride // align,
            torch.where(k_major, table[:, RANK], table[:, RANK] // align),
            torch.where(k_major, table[:, D] // align, table[:, D]),
        )
        self._records[:, :4] = torch.stack(columns, 1)

    def gram(self, which=None, transform=None):
        count = len(self.entries) if which is None else len(which)
        shape = (count, self.height, self.height)
        out = torch.empty(shape, dtype=torch.float64, device=self.entries.device)
        _run(self.launches(transform, out, which=which), out.device)
        return out

    def write(self, transform, kept, out, starts, widths):
        _run(self.launches(transform, None, kept, out, (starts, widths)), out.device)

    def launches(self, transform, gram, kept=None, out=None, places=None, which=None):
        """(kernel, grid, arguments by name): one for each kind of rows, almost always one in all.

        Either ``gram`` is written, or ``kept`` rows of ``out`` at ``places``, (starts, widths).
        """
        config = _configs.CANONICAL[self.height]
        which = torch.arange(len(self.entries)) if which is None else which
        records, kinds = self._records[which], self._kind[which]
        records[:, 4] = torch.arange(len(records))
        if out is not None:
            records[:, 5], records[:, 6] = (x[which] // 16 for x in places)
        for kind in kinds.unique().tolist():
            table = records[kinds == kind]
            spans = 1 if out is None else -(-16 * int(table[:, 6].max()) // config.span)
            if spans == 0:
                continue
            dtype = FLOATS[kind // 4]
            yield (
                rows_kernel,
                (len(table), spans),
                dict(
                    p_table=table.to(self.entries.device, non_blocking=True),
                    p_transform=transform,
                    p_kept=kept,
                    p_gram=gram,
                    p_out=out,
                    FIELDS=FIELDS,
                    DTYPE=TRITON_DTYPE[dtype],
                    K_MAJOR=bool(kind & 2),
                    ALIGN=16 // dtype.itemsize if kind & 1 else 1,
                    UNIT=16 if kind & 1 else dtype.itemsize,
                    R=self.height,
                    BLOCK_K=config.block_k,
                    SPAN=config.span,
                    **_options(config.rows_warps, config.num_stages),
                ),
            )


def cholesky(gram):
    """As `_canonical_torch.cholesky`."""
    transform, coordinates = (torch.empty(gram.shape, **_like(gram)) for _ in range(2))
    least = torch.empty(len(gram), **_like(gram))
    _run([cholesky_launch(gram.contiguous(), transform, coordinates, least)], gram.device)
    return transform, coordinates, least


def svd(core, with_right=True):
    """As `_canonical_torch.svd`."""
    left = torch.empty(core.shape, **_like(core))
    right = torch.empty(core.shape, **_like(core)) if with_right else None
    converged = torch.empty(len(core), dtype=torch.int32, device=core.device)
    _run([jacobi_launch(core.contiguous(), left, right, converged)], core.device)
    sigma, order = left.norm(dim=1).sort(dim=1, descending=True, stable=True)
    if not with_right:
        return None, sigma, None, converged.bool()
    at = order[:, None].expand_as(left)
    left = left.gather(2, at) / torch.where(sigma > 0, sigma, 1.0)[:, None]
    return left, sigma, right.gather(2, at), converged.bool()


def cholesky_launch(gram, transform, coordinates, least):
    """(kernel, grid, arguments by name); so is `jacobi_launch`."""
    height = gram.shape[-1]
    named = dict(p_gram=gram, p_transform=transform, p_coordinates=coordinates, p_least=least)
    warps = _configs.CANONICAL[height].cholesky_warps
    return (
        cholesky_kernel,
        (len(gram),),
        dict(**named, DEPENDENT=DEPENDENT, R=height, **_options(warps)),
    )


def jacobi_launch(core, left, right, converged):
    height = core.shape[-1]
    named = dict(p_core=core, p_left=left, p_right=right, p_converged=converged)
    warps = _configs.CANONICAL[height].jacobi_warps
    return (
        jacobi_kernel,
        (len(core),),
        dict(**named, WITH_RIGHT=right is not None, SWEEPS=SWEEPS, R=height, **_options(warps)),
    )


def _like(x):
    return {"dtype": x.dtype, "device": x.device}


def _options(num_warps, num_stages=1):
    # Fusion is the default, and so the bits, which change with Triton 3.10.
    return dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def _run(launches, device):
    with contextlib.nullcontext() if INTERPRETED else torch.cuda.device(device):
        for kernel, grid, named in launches:
            kernel[grid](**named)
