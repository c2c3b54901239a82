"""The dtypes a safetensors header can name, and exact conversions for those we compute with."""

from __future__ import annotations

import numpy as np

# Every dtype of safetensors 0.8, in bits: F4 and F6 pack several elements into whole bytes.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# What a tensor's bytes are as a numpy array. BF16 has no numpy type: its bits travel as uint16.
STORAGE: dict[str, np.dtype] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2",
        "BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "C64": "<c8",
        "F64": "<f8", "I64": "<i8", "U64": "<u8",
    }.items()
}  # fmt: skip

# What factors may be stored as; anything else would need a rounding nobody asked for.
FACTOR_DTYPES: tuple[str, ...] = ("F32", "BF16", "F16")


def itemsize(dtype: str) -> int:
    """Bytes of one element of a factor dtype ("F32", "BF16" or "F16")."""
    return DTYPE_BITS[dtype] // 8


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits (uint16) to float32; exact."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits (uint16), to nearest, ties to even; NaN stays NaN.

    Finite values above the largest bfloat16 (3.3895e38) become infinity, as IEEE rounding has it.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)
    # A NaN whose payload sits in the low half would round to infinity, or wrap around to zero.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = ((bits >> np.uint32(16)) | np.uint32(0x0040)).astype(np.uint16)
    return np.where(nan, quiet, rounded).reshape(np.shape(values))


def to_f32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Widen stored factors (``STORAGE[dtype]``) to float32; exact for F32, BF16 and F16."""
    return bf16_to_f32(raw) if dtype == "BF16" else np.asarray(raw).astype(np.float32)


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float values to the storage of a factor dtype, to nearest even.

    float64 goes to BF16 by way of float32, as torch does. Overflow gives infinity without a
    warning: the caller checks.
    """
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            return f32_to_bf16(np.asarray(values).astype(np.float32))
        return np.asarray(values).astype(STORAGE[dtype])
