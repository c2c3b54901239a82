"""Factor rows of many modules in one buffer a side, and the checks of `gram_pass`. Needs torch."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from ._arguments import DTYPES, one_of

ALIGN = 16  # elements; loads of 16 bytes for every dtype
PRODUCTS, WEIGHTS = ("uv", "uu", "vv"), 2


@dataclass(frozen=True, eq=False)
class Rows:
    """One stack of factor rows for each of M modules, as they lie in memory. Nothing is copied.

    U, V: 1-D buffers of one dtype each, 16-byte aligned. Row a of module m is the `p[m]` elements
    of U from `starts_u[m] + a * strides_u[m]` on (V: `q[m]`, `starts_v`, `strides_v`). Starts and
    strides are multiples of 16 elements, and columns up to the next multiple of 16 are zeros: the
    kernel reads them. Modules may overlap, or be in any order.

    bounds: of each module, where its segments (the factors of one adapter) start among its rows,
    and their end: from 0, rising. A segment may have no rows, and a module no segments.
    weights: (2, total rows) float32 or float64, those of consecutive modules after one another:
    relative singular values and their squares. None where no epilogue has a weight.
    """

    U: torch.Tensor
    V: torch.Tensor
    starts_u: list[int]
    starts_v: list[int]
    strides_u: list[int]
    strides_v: list[int]
    bounds: list[list[int]]
    weights: torch.Tensor | None = None

    @staticmethod
    def pack(U, V, bounds, weights=None):
        """Rows of lists of matrices: U[m] (R_m, p_m) and V[m] (R_m, q_m), copied and padded."""
        u, starts_u, strides_u = _pack(U)
        v, starts_v, strides_v = _pack(V)
        bounds = [[int(x) for x in b] for b in bounds]
        return Rows(u, v, starts_u, starts_v, strides_u, strides_v, bounds, weights)

    @property
    def rows(self):
        """Rows of each module."""
        return [b[-1] for b in self.bounds]

    @property
    def counts(self):
        """Segments of each module."""
        return [len(b) - 1 for b in self.bounds]


def _pack(matrices):
    strides = [padded(x.shape[1]) for x in matrices]
    starts, end = [], 0
    for x, stride in zip(matrices, strides, strict=True):
        starts.append(end)
        end += len(x) * stride
    buffer = matrices[0].new_zeros(end)
    for x, start, stride in zip(matrices, starts, strides, strict=True):
        buffer[start : start + len(x) * stride].view(len(x), stride)[:, : x.shape[1]] = x
    return buffer, starts, strides


def padded(columns):
    """Columns up to the next multiple of 16: what the kernel reads of a row."""
    return -(-columns // ALIGN) * ALIGN


def check(first, second, p, q, epilogues, precision, accumulate):
    """(p, q, epilogues) as lists; ValueError or TypeError naming the bad argument."""
    one_of("precision", precision, ("highest", "high"))
    one_of("accumulate", accumulate, ("fp32", "fp64"))
    p, q = [int(x) for x in p], [int(x) for x in q]
    epilogues = [_epilogue(x) for x in epilogues]
    for name, columns in (("p", p), ("q", q)):
        if len(columns) != len(first.bounds):
            raise ValueError(f"{name} must have {len(first.bounds)} modules, got {len(columns)}")
        if min(columns, default=0) < 0:
            raise ValueError(f"{name} must not be negative, got {min(columns)}")
    _rows("first", first, first, p, q, epilogues, accumulate)
    if second is not None:
        _rows("second", second, first, p, q, epilogues, accumulate)
    return p, q, epilogues


def _epilogue(epilogue):
    epilogue = tuple(int(x) for x in epilogue)
    if len(epilogue) != 3:
        raise ValueError(
            f"an epilogue is (product, row weight, column weight), got {epilogue}; "
            "other right factors (views) are a pass of their own"
        )
    product, *weights = epilogue
    if not 0 <= product < len(PRODUCTS):
        raise ValueError(f"the product of an epilogue must be 0 (uv), 1 (uu) or 2, got {product}")
    if not all(-1 <= w < WEIGHTS for w in weights):
        raise ValueError(f"the weights of an epilogue must be -1 (ones), 0 or 1, got {epilogue}")
    return epilogue


def _rows(name, side, like, p, q, epilogues, accumulate):
    if len(side.bounds) != len(p):
        raise ValueError(f"{name}.bounds must have {len(p)} modules, got {len(side.bounds)}")
    for m, bounds in enumerate(side.bounds):
        if not bounds or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
            raise ValueError(f"{name}.bounds[{m}] must rise from 0")
    used = {x for e in epilogues for x in PRODUCTS[e[0]]}
    for side_name, columns in (("U", p), ("V", q)):
        if side_name.lower() in used:
            _buffer(name, side_name, side, columns, like.U.device, accumulate)
    if any(w >= 0 for e in epilogues for w in e[1:]):
        _weights(name, side, like.U.device)


def _buffer(name, side_name, side, columns, device, accumulate):
    buffer, label = getattr(side, side_name), f"{name}.{side_name}"
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{label} must be a torch.Tensor, got {type(buffer).__name__}")
    if buffer.dtype == torch.float64 and accumulate == "fp32":
        raise ValueError(f'{label} is float64: that needs accumulate="fp64"')
    if buffer.dtype not in (*DTYPES, torch.float64):
        raise ValueError(
            f"{label} must be float32, bfloat16, float16 or float64, got {buffer.dtype}"
        )
    if buffer.ndim != 1 or not buffer.is_contiguous():
        raise ValueError(f"{label} must be contiguous with 1 dimension, got {tuple(buffer.shape)}")
    if buffer.device != device:
        raise ValueError(f"{label} must be on {device}, where first.U is, got {buffer.device}")
    if buffer.data_ptr() % 16:
        raise ValueError(f"{label} must start at a multiple of 16 bytes")
    suffix = side_name.lower()
    starts, strides = getattr(side, f"starts_{suffix}"), getattr(side, f"strides_{suffix}")
    if len(starts) != len(columns) or len(strides) != len(columns):
        raise ValueError(f"{name}.starts_{suffix} and strides_{suffix} must have one per module")
    for m, (start, stride, rows) in enumerate(zip(starts, strides, side.rows, strict=True)):
        if start % ALIGN or stride % ALIGN or start < 0 or stride < padded(columns[m]):
            raise ValueError(
                f"{name}.starts_{suffix}[{m}] and strides_{suffix}[{m}] must be multiples of "
                f"{ALIGN}, rows not closer than {padded(columns[m])}, got {start} and {stride}"
            )
        if rows and start + (rows - 1) * stride + padded(columns[m]) > len(buffer):
            raise ValueError(f"module {m} ends beyond {label}, of {len(buffer)} elements")


def _weights(name, side, device):
    weights, total = side.weights, sum(side.rows)
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"{name}.weights must be a torch.Tensor: an epilogue has a weight")
    if tuple(weights.shape) != (WEIGHTS, total) or weights.device != device:
        raise ValueError(
            f"{name}.weights must have shape ({WEIGHTS}, {total}) on {device}, "
            f"got {tuple(weights.shape)} on {weights.device}"
        )
    if weights.dtype not in (torch.float32, torch.float64) or (
        total > 1 and weights.stride(1) != 1
    ):
        raise ValueError(f"{name}.weights must be float32 or float64 with contiguous rows")
