"""The deltas of one module on a device, packed once for all kernels of P2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import BackendError, InputError
from ..ops.tiles import NotFinite
from . import _configs

try:
    import triton  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise RuntimeError("the Triton backend needs the package triton, which is missing") from error

from ._delta_tile import INTERPRETED, pack_kernel

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class DeviceDeltas:
    """``delta_i = scale_i * B_i A_i``, d_out x d_in, as rows of two buffers on a device.

    Rows [first, last) = ``bounds[i]`` of U (rows, >= d_out) and V (rows, >= d_in) are B_i
    transposed and A_i, with rows of zeros up to a multiple of ``rank_step`` and columns of zeros up
    to one of ``_configs.PAD``. ``bounds`` and ``scales`` lie on the host. Buffers are float32, or
    bfloat16 or float16 where the tensor core multiplies.
    """

    U: torch.Tensor
    V: torch.Tensor
    bounds: list[tuple[int, int]]
    scales: list[float]
    d_out: int
    d_in: int

    @classmethod
    def of(
        cls, factors: Sequence[tuple], what: str = "factors", *, tensor_core: bool = False
    ) -> DeviceDeltas:
        """From (B (d_out, r_i), A (r_i, d_in), scale_i) per adapter, all on one device.

        bfloat16, float16, float32 or (rounded) float64, any strides, ranks may differ and be 0.
        Waits for the device once, to learn whether the factors are finite.

        Args:
            what: what errors call the factors.
            tensor_core: entries are its products, not chains of float32 multiply-adds: as exact,
                equal in every kernel here, but not to the bit the CPU's. Factors must all be
                bfloat16, or all float16.

        Raises:
            InputError: shapes that do not chain or agree, wrong dtypes or devices, a scale that is
                not finite, factors that are not (``NotFinite``).
        """
        _check(factors, what)
        dtype, step = torch.float32, _configs.RANK_STEP
        if tensor_core:
            dtype, step = factors[0][0].dtype, _configs.TENSOR_STEP
            if dtype not in HALF or any(x.dtype != dtype for b, a, _ in factors for x in (b, a)):
                raise InputError("tensor_core needs all bfloat16 or all float16", key=what)
        b, a, _ = factors[0]
        d_out, d_in, device = b.shape[0], a.shape[1], b.device
        rows_u, rows_v, bounds, top = [], [], [], 0
        for i, (b, a, _) in enumerate(factors):
            padding = [(0, 0, -1, 0)] * (-a.shape[0] % step)
            rows_u += _rows(b.T, 2 * i) + padding
            rows_v += _rows(a, 2 * i + 1) + padding
            bounds.append((top, len(rows_u)))
            top = len(rows_u)
        bad = torch.zeros(2 * len(factors), dtype=torch.int32, device=device)
        with guard(device):
            packed = []
            for rows, d in ((rows_u, d_out), (rows_v, d_in)):
                kernel, grid, named = pack_launch(rows, d, bad, dtype)
                if rows:
                    kernel[grid](**named)
                packed.append(named["p_out"])
        for at, flag in enumerate(bad.tolist()):
            if flag:
                raise NotFinite(1 + at % 2, at // 2, what)
        return cls(*packed, bounds, [float(s) for *_, s in factors], d_out, d_in)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> DeviceDeltas:
        """One adapter's delta; the buffers are shared."""
        i = range(len(self))[index]
        one = self.bounds[i : i + 1], self.scales[i : i + 1]
        return DeviceDeltas(self.U, self.V, *one, self.d_out, self.d_in)

    @property
    def size(self) -> int:
        """Entries of one delta."""
        return self.d_out * self.d_in

    @property
    def rank_step(self) -> int:
        return _configs.TENSOR_STEP if self.U.dtype in HALF else _configs.RANK_STEP

    def tile(self, configs: dict) -> _configs.TileConfig:
        """The launch of a kernel on these deltas."""
        config = configs["tensor" if self.U.dtype in HALF else "chain"]
        config = _configs.INTERPRETER_TILE if INTERPRETED else config
        # Loads are not masked: tiles end where the padding does.
        assert _configs.PAD % config.block_i == 0 and _configs.PAD % config.block_j == 0
        return config

    @property
    def device(self) -> torch.device:
        return self.U.device


def pack_launch(rows, d, bad, dtype, index=None):
    """The launch that fills a buffer from row descriptions: (kernel, grid, arguments by name).

    ``index``: int32 (d,) on the device, the elements of each row to take; None: the first d.
    """
    config = _configs.PACK
    width = max(-(-d // _configs.PAD), 1) * _configs.PAD
    device = bad.device
    return (
        pack_kernel,
        (len(rows), -(-width // config.block)),
        dict(
            p_rows=torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).to(device),
            p_index=index,
            p_out=torch.empty((max(len(rows), 1), width), dtype=dtype, device=device),
            p_bad=bad,
            d=d,
            s_out=width,
            BLOCK=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        ),
    )


def as_deltas(factors, what="factors"):
    return factors if isinstance(factors, DeviceDeltas) else DeviceDeltas.of(factors, what)


def guard(device):
    """Context in which kernels for ``device`` may be launched; BackendError where none can be."""
    if INTERPRETED:
        return contextlib.nullcontext()
    if not torch.cuda.is_available():
        raise BackendError(
            "the Triton backend needs a CUDA device, and torch sees none "
            "(TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU for tests)"
        )
    if device.type != "cuda":
        raise InputError(f"must be on a CUDA device, got {device}", key="factors")
    return torch.cuda.device(device)


def _rows(x, note):
    """One line of pack_kernel's table per row of x."""
    step = x.stride(0) * x.element_size()
    start = x.data_ptr()
    return [(start + k * step, x.stride(1), CODE[x.dtype], note) for k in range(x.shape[0])]


def _check(factors, what):
    if not isinstance(factors, Sequence) or not factors:
        raise InputError("expected at least one (B, A, scale)", key=what)
    for i, item in enumerate(factors):
        key = f"{what}[{i}]"
        if not isinstance(item, Sequence) or len(item) != 3:
            raise InputError("expected (B, A, scale)", key=key)
        b, a, scale = item
        for name, x in (("B", b), ("A", a)):
            if not isinstance(x, torch.Tensor) or x.ndim != 2 or x.dtype not in CODE:
                raise InputError(
                    f"{name} must be a matrix of float32, bfloat16, float16 or float64", key=key
                )
            if x.device != factors[0][0].device:
                raise InputError(f"{name} must be on {factors[0][0].device}", key=key)
        d_out, d_in = factors[0][0].shape[0], factors[0][1].shape[1]
        if b.shape != (d_out, a.shape[0]) or a.shape[1] != d_in or not d_out or not d_in:
            raise InputError(
                f"B {tuple(b.shape)} and A {tuple(a.shape)} are not {d_out} x {d_in}", key=key
            )
        if not math.isfinite(scale):
            raise InputError(f"scale must be finite, got {scale!r}", key=key)
