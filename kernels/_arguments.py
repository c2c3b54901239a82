"""Arguments of the block Gram: cheap checks, then one `Stack` per side."""

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stack:
    """Factor rows of one side. `bounds` is `offsets` on the host, `scale` float64 on the device."""

    U: torch.Tensor
    V: torch.Tensor
    bounds: list[int]
    scale: torch.Tensor | None

    @property
    def rows(self):
        return self.bounds[-1]

    @property
    def count(self):
        return len(self.bounds) - 1

    def scale_of_rows(self):
        if self.scale is None:
            return None
        bounds = torch.tensor(self.bounds, device=self.scale.device)
        return torch.repeat_interleave(self.scale, bounds.diff(), output_size=self.rows)


def check(U, V, offsets, U2, V2, offsets2, scale, scale2, reduce, accumulate, precision):
    """(first stack, second stack or None); ValueError or TypeError naming the bad argument."""
    one_of("reduce", reduce, ("both", "columns", "none"))
    one_of("accumulate", accumulate, ("fp32", "fp64"))
    one_of("precision", precision, ("highest", "high"))
    first = _stack(("U", "V", "offsets", "scale"), U, V, offsets, scale, U, accumulate)
    given = [x is not None for x in (U2, V2, offsets2)]
    if not any(given):
        if scale2 is not None:
            raise ValueError("scale2 needs a second stack: U2, V2 and offsets2 are None")
        return first, None
    if not all(given):
        raise ValueError("U2, V2 and offsets2 form one stack: give all three or none")
    second = _stack(("U2", "V2", "offsets2", "scale2"), U2, V2, offsets2, scale2, U, accumulate)
    for name, x, y in (("U2", U, U2), ("V2", V, V2)):
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"{name} must have {x.shape[1]} columns, got {y.shape[1]}")
    return first, second


def output(out, shape, device):
    """A fresh output, or `out` after its checks."""
    if out is None:
        return torch.empty(shape, dtype=torch.float64, device=device)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if out.dtype != torch.float64 or tuple(out.shape) != shape or out.device != device:
        raise ValueError(
            f"out must be float64 of shape {shape} on {device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    return out


def _stack(names, U, V, offsets, scale, like, accumulate):
    for name, x in zip(names, (U, V), strict=False):
        _factor(name, x, like, accumulate)
    if U.shape[0] != V.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have as many rows, got {U.shape[0]} and {V.shape[0]}"
        )
    bounds = _bounds(names[2], offsets, U.shape[0])
    return Stack(
        U.detach(), V.detach(), bounds, _scale(names[3], scale, len(bounds) - 1, like.device)
    )


def _factor(name, x, like, accumulate):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got {x.ndim}")
    if x.dtype == torch.float64 and accumulate == "fp32":
        raise ValueError(f'{name} is float64: that needs accumulate="fp64"')
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, where U is, got {x.device}")


def _bounds(name, offsets, rows):
    if not hasattr(offsets, "dtype") or not str(offsets.dtype).endswith("int64"):
        raise TypeError(f"{name} must be an int64 tensor or array")
    if offsets.ndim != 1 or len(offsets) == 0:
        raise ValueError(f"{name} must have shape (N + 1,), got {tuple(offsets.shape)}")
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(f"{name} must rise from 0 to the number of rows, {rows}")
    return bounds


def _scale(name, scale, count, device):
    if scale is None:
        return None
    scale = scale if isinstance(scale, torch.Tensor) else torch.tensor(scale)
    if tuple(scale.shape) != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {tuple(scale.shape)}")
    return scale.detach().to(device, torch.float64).contiguous()


def one_of(name, value, allowed):
    """ValueError unless `value` is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
