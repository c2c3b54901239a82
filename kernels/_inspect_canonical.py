"""The launches of P3 that `_inspect` compiles, on tensors without memory."""

from itertools import product

import torch

from . import _canonical_triton
from ._canonical_entries import Entries

DTYPES = {"fp32": torch.float32, "half": torch.bfloat16}


def canonical_launches(height):
    """{name: launch} of every kernel of the canonical form at one height."""
    square = _meta(8, height, height)
    made = {
        "Cholesky": _canonical_triton.cholesky_launch(square, square, square, _meta(8)),
        "Jacobi": _canonical_triton.jacobi_launch(
            square, square, square, _meta(8, dtype=torch.int32)
        ),
        "Jacobi, values": _canonical_triton.jacobi_launch(
            square, square, None, _meta(8, dtype=torch.int32)
        ),
    }
    for kind, side, wide in product(DTYPES, "AB", (True, False)):
        for name, transform, gram in (
            ("Gram", None, square), ("Gram of Q", square, square), ("rows", square, None),
        ):  # fmt: skip
            launch = _rows(height, DTYPES[kind], side, wide, transform, gram)
            made[f"{name} of {side}, {kind}{'' if wide else ', unaligned'}"] = launch
    return made


def _rows(height, dtype, side, wide, transform, gram):
    odd = 0 if wide else 1
    shape = (height, 4096 - odd) if side == "A" else (4096, height - odd)
    x = _meta(*shape, dtype=dtype)
    entries = Entries.of("x", [x if side == "A" else x.T], None)
    out = _meta(height * 4096, dtype=torch.float32) if gram is None else None
    on_device = _canonical_triton.Side(entries, height)
    places = torch.zeros(1, dtype=torch.int64), torch.full((1,), 4096)
    kept = None if out is None else _meta(8, dtype=torch.int64)
    (launch,) = on_device.launches(transform, gram, kept, out, places)
    return launch


def _meta(*shape, dtype=torch.float64):
    return torch.empty(shape, dtype=dtype, device="meta")
