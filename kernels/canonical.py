"""P3, canonical form of many deltas from their factors, on the device of the factors.

`delta_e = s_e B_e A_e = sum_a sigma_a u_a v_a^T` with orthonormal u and v, from U_e = B_e^T
(r_e, p_e) and V_e = A_e (r_e, q_e). Everything up to the output is float64, and nothing is as large
as a delta:

1. both r x r Grams, equilibrated to a unit diagonal;
2. pivoted Cholesky: X = coordinates Q, Q = transform X; once more from the Gram of Q where a
   condition above 1e3 has cost orthogonality;
3. SVD of the core, coordinates_u^T coordinates_v; the rank rule of `mergeprobe_fast.ops.canonical`;
4. u = left^T transform_u U, rounded once, to the output.
"""

import torch

from . import _canonical_torch
from ._canonical_batch import CanonicalBatch, layout, output
from ._canonical_entries import FLOATS, Entries, Factors

__all__ = ["CanonicalBatch", "Factors", "canonical_batch", "layout", "singular_values"]
RELATIVE = 1e-6
NOISE = 2.0**-24
REPAIR = 1e-3  # least diagonal element below which a second Cholesky restores orthogonality
SMALL = 2**28  # bytes of r x r matrices at a time
MATRICES = 32  # r x r matrices of an entry that live at the same time, at most


def canonical_batch(
    U, V, ranks=None, scale=None, *, relative=RELATIVE, noise=NOISE, dtype=torch.float32, out=None,
    backend="auto",
):  # fmt: skip
    """Canonical form of every `scale_e U_e^T V_e`: a `CanonicalBatch`.

    U and V are lists of (r_e, p_e) and (r_e, q_e) tensors, stacks (n, r, p) and (n, r, q), or
    `Factors`; entry e uses its first ``ranks[e]`` rows. float32, bfloat16, float16 or float64, any
    strides (B.T is fine), all on one device. ``ranks`` and ``scale`` are on the host. ``out`` is a
    1-D buffer of ``dtype`` (float32 or float64) with room for ``layout(...)[-1]`` elements.
    ``backend``: "torch", "triton" (heights above its registers go to torch all the same), or
    "auto": triton on CUDA devices.

    A component is kept while `sigma > max(relative sigma_1, noise size)` with
    `size^2 = sum_a |s b_a|^2 |a_a|^2`. Values that are not finite are no error here: they are found
    on the device and named by `CanonicalBatch.first_failure`. The host waits once for each batch of
    entries of one height, to learn which need the second Cholesky.

    ValueError or TypeError: names the bad argument.
    """
    sides = _check(U, V, ranks, relative, noise, dtype)
    heights, device = sides[0].rank.contiguous(), sides[0].device
    scale = _scale(scale, len(heights))
    *places, total = layout(heights, sides[0].d, sides[1].d)
    rows = output(out, total, dtype, device)
    n, most = len(heights), int(heights.max()) if len(heights) else 0
    sigma = torch.zeros((n, most), dtype=torch.float64, device=device)
    rank = torch.zeros(n, dtype=torch.int64, device=device)
    status = torch.zeros(n, dtype=torch.int64, device=device)
    for tools, height, which in _batches(heights, _backend(backend, device)):
        chosen = [side.select(which) for side in sides]
        # A copy that blocks would wait for all that is queued there.
        exponent = sum(_within_range(side) for side in chosen).to(device, non_blocking=True)
        on_device = [tools.Side(side, height) for side in chosen]
        s = scale[which].to(device, non_blocking=True)
        spectrum, *found, transforms = _factorise(tools, on_device, s, exponent, relative, noise)
        at = which.to(device, non_blocking=True)
        few = min(height, most)
        sigma[at, :few] = spectrum[:, :few]
        rank[at], status[at] = found
        for side, made, starts, widths in zip(
            on_device, transforms, places[:2], places[2:], strict=True
        ):
            side.write(made, found[0], rows, starts[which], widths[which])
    return CanonicalBatch(rows, heights, *places, sigma, rank, status)


def singular_values(matrices, *, backend="auto"):
    """Singular values of many small matrices, descending: (n, min(m, k)) float64.

    matrices: (n, m, k), any float dtype. A matrix that is not finite, or whose iteration does not
    converge, has NaN throughout. On CUDA devices nothing waits where m and k are at most 64.
    """
    if not isinstance(matrices, torch.Tensor) or matrices.ndim != 3:
        raise ValueError("matrices must be a tensor of 3 dimensions")
    if matrices.dtype not in FLOATS:
        raise ValueError(f"matrices must be float, got {matrices.dtype}")
    n, m, k = matrices.shape
    few, wide = min(m, k), max(m, k)
    if n == 0 or few == 0:
        return matrices.new_zeros((n, few), dtype=torch.float64)
    tools, height = _tools(wide, _backend(backend, matrices.device))
    finite = matrices.isfinite().all(2).all(1)
    x = matrices.new_zeros((n, height, height), dtype=torch.float64)
    x[:, :m, :k] = torch.where(finite[:, None, None], matrices.detach(), 0.0)
    _, shift = torch.frexp(x.abs().amax((1, 2)))
    _, sigma, _, converged = tools.svd(_times_power(x, -shift[:, None, None]), with_right=False)
    sigma = _times_power(sigma[:, :few], shift[:, None])
    return torch.where((finite & converged)[:, None], sigma, torch.nan)


def _factorise(tools, sides, scale, exponent, relative, noise):
    """sigma (n, r), rank, status and the transforms of both sides, of entries of one height."""
    gram = torch.stack([side.gram() for side in sides])
    lengths = gram.diagonal(dim1=2, dim2=3).sqrt()
    bad = ~lengths.isfinite().all(2)
    status = torch.where(bad[0], 1, torch.where(bad[1], 2, 0))
    use = (status == 0)[:, None]
    n, r = lengths.shape[1:]
    gram = torch.where(use[:, :, None], gram, 0.0)
    size = torch.where(use, lengths[0] * lengths[1], 0.0).norm(dim=1)
    transform, coordinates, least = tools.cholesky(gram.view(2 * n, r, r))
    transform, coordinates = transform.view_as(gram), coordinates.view_as(gram)
    poor = (least.view(2, n) < REPAIR).cpu()  # the one wait
    for side, t, c, flags in zip(sides, transform, coordinates, poor, strict=True):
        if flags.any():
            which = flags.nonzero().flatten()
            at = which.to(t.device, non_blocking=True)
            second = tools.cholesky(side.gram(which, t[at]))
            t[at] = second[0] @ t[at]
            c[at] = c[at] @ second[1]

    core = coordinates[0].mT @ coordinates[1] * scale.sign()[:, None, None]
    _, shift = torch.frexp(core.abs().amax((1, 2)))
    left, sigma, right, converged = tools.svd(_times_power(core, -shift[:, None, None]))
    exist = (transform != 0).any(3).sum(2).amin(0)  # the others are the rounding of zeros
    sigma = torch.where(torch.arange(r, device=sigma.device) < exist[:, None], sigma, 0.0)
    floor = torch.maximum(relative * sigma[:, 0], noise * _times_power(size, -shift))
    kept = (sigma > floor[:, None]) & (sigma > 0) & use & (scale != 0)[:, None]
    sigma = _times_power(sigma * scale.abs()[:, None], (shift + exponent)[:, None])
    status = torch.where((status == 0) & ~converged, 3, status)
    status = torch.where((status == 0) & ~sigma[:, 0].isfinite(), 4, status)
    kept = kept & (status == 0)[:, None]
    turned = [
        torch.where(kept[:, :, None], x.mT @ t, 0.0)
        for x, t in zip((left, right), transform, strict=True)
    ]
    return sigma, kept.sum(1), status, turned


def _backend(name, device):
    """The modules whose Side, cholesky and svd are used, in order of preference."""
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {name!r}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return [_canonical_torch]
    from . import _canonical_triton

    if device.type != "cuda" and not _canonical_triton.INTERPRETED:
        raise ValueError(f"the Triton backend needs tensors on a CUDA device, got {device}")
    return [_canonical_triton, _canonical_torch]


def _batches(heights, backend):
    """(tools, height, entries): what is computed together, its small matrices within SMALL."""
    groups = {}
    for rank in heights.unique().tolist():
        if rank:
            tools, height = _tools(rank, backend)
            groups.setdefault((height, tools), []).append(rank)
    for (height, tools), ranks in groups.items():
        which = torch.isin(heights, torch.tensor(ranks)).nonzero().flatten()
        for part in which.split(max(1, SMALL // (MATRICES * 8 * height * height))):
            yield tools, height, part


def _tools(rank, backend):
    """The module that takes matrices of this height, and the height they are padded to."""
    height = 1 << (rank - 1).bit_length()
    tools = next(tools for tools in backend if height <= tools.MOST_HEIGHT)
    return tools, max(height, tools.LEAST_HEIGHT)


def _within_range(entries):
    """Divide float64 entries by 2^e, exactly, to where squares exist; e, (n,) on their device."""
    wide = (entries.dtype_is(torch.float64) & (entries.rank * entries.d > 0)).nonzero().flatten()
    exponent = torch.zeros(len(entries), dtype=torch.int64, device=entries.device)
    for e in wide.tolist():
        x = entries.view(e)
        top = x.abs().amax()
        exponent[e] = torch.where(top.isfinite(), torch.frexp(top)[1], 0)
        entries.replace(e, _times_power(x, -exponent[e]))
    return exponent


def _times_power(x, e):
    """x 2^e for float64 x and integer e, rounded only where the result is denormal.

    torch.ldexp makes the power in float32.
    """
    half = e.long() >> 1
    for part in (half, e - half):
        x = x * ((part.clamp(-1022, 1024) + 1023) << 52).view(torch.float64)
    return x


def _check(U, V, ranks, relative, noise, dtype):
    """Both sides as `Entries` that agree."""
    for name, value in (("relative", relative), ("noise", noise)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    sides = [Entries.of(name, x, ranks) for name, x in (("U", U), ("V", V))]
    u, v = sides
    if len(u) != len(v):
        raise ValueError(f"U and V must have as many entries, got {len(u)} and {len(v)}")
    if len(u) and u.device != v.device:
        raise ValueError(f"V must be on {u.device}, where U is, got {v.device}")
    for e in (u.rank != v.rank).nonzero()[:1].flatten().tolist():
        raise ValueError(
            f"U[{e}] and V[{e}] must have as many rows, got {u.rank[e]} and {v.rank[e]}"
        )
    return sides


def _scale(scale, n):
    """Scales as float64 on the host."""
    if scale is None:
        return torch.ones(n, dtype=torch.float64)
    scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    if tuple(scale.shape) != (n,):
        raise ValueError(f"scale must have shape ({n},), got {tuple(scale.shape)}")
    for e in (~scale.isfinite()).nonzero()[:1].flatten().tolist():
        raise ValueError(f"scale[{e}] is {scale[e]}")
    return scale
