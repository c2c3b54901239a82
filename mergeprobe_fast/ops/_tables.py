"""numpy record types with the layout of the C++ structs in csrc/include/mergeprobe."""

from __future__ import annotations

import numpy as np

MATRIX = np.dtype(
    [
        ("data", np.uint64),
        ("row_stride", np.int64),
        ("col_stride", np.int64),
        ("dtype", np.int32),
        ("_pad", np.int32),
    ]
)
BLOCK = np.dtype([("u", MATRIX), ("v", MATRIX), ("rank", np.int64)])
SEGMENT = np.dtype([("u", MATRIX), ("v", MATRIX), ("rank", np.int64), ("scale", np.float64)])
JOB = np.dtype(
    [
        ("d_out", np.int64),
        ("d_in", np.int64),
        ("max_rank", np.int64),
        ("u_out", np.uint64),
        ("u_row", np.int64),
        ("u_col", np.int64),
        ("v_out", np.uint64),
        ("v_row", np.int64),
        ("v_col", np.int64),
        ("sigma", np.int64),
        ("rank", np.int64),
        ("numerical_rank", np.int64),
        ("status", np.int64),
        ("bad_segment", np.int64),
    ]
)
# P2: one adapter of a module, and the rule; see csrc/include/mergeprobe/tiles.hpp.
TILE_ADAPTER = np.dtype(
    [
        ("density", np.float64),
        ("stream", np.uint64),
        ("weight", np.float32),
        ("low", np.float32),
        ("high", np.float32),
        ("rescale", np.float32),
    ]
)
TILE_RULE = np.dtype(
    [
        ("keep", np.int32),
        ("combine", np.int32),
        ("elect", np.int32),
        ("divide", np.int32),
        ("elect_weighted", np.int32),
        ("zero_sign", np.int32),
        ("floor", np.float32),
        ("_pad", np.int32),
        ("epsilon", np.float64),
        ("seed", np.uint64),
    ]
)

DTYPE_CODE = {"F32": 0, "BF16": 1, "F16": 2, "F64": 3}
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


def address(array: np.ndarray) -> int:
    """Where the array's first element lies. The caller keeps the array alive."""
    return array.__array_interface__["data"][0]
