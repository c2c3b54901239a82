"""What `canonical_batch` returns, and how its rows lie in one buffer. See canonical.py."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from ._pass_rows import Rows, padded

STATUS = {
    1: "B holds NaN or infinite values",
    2: "A holds NaN or infinite values",
    3: "the singular value iteration did not converge",
    4: "the delta overflows float64",
}


@dataclass(frozen=True, eq=False)
class CanonicalBatch:
    """Canonical factors of n entries, row-major in one buffer, and every spectrum.

    Entry e has ``heights[e]`` rows on either side, those past its rank zero. Row a of U_e is at
    ``starts_u[e] + a * widths_u[e]`` of ``rows``; its columns past p_e are zero. The rows of
    consecutive entries of equal p are consecutive, all U before all V.
    """

    rows: torch.Tensor  # 1-D, float32 or float64
    heights: torch.Tensor  # (n,) int64 on the host, as the next four; elements of rows
    starts_u: torch.Tensor
    starts_v: torch.Tensor
    widths_u: torch.Tensor
    widths_v: torch.Tensor
    sigma: torch.Tensor  # (n, greatest height) float64, descending, zero padded, complete
    rank: torch.Tensor  # (n,) int64
    status: torch.Tensor  # (n,) int64: 0, or a key of STATUS; a failed entry has rank 0

    def view(self, e, side):
        """(heights[e], width) of side "u" or "v", padding included."""
        height = int(self.heights[e])
        start, width = (int(getattr(self, f"{name}_{side}")[e]) for name in ("starts", "widths"))
        return self.rows[start : start + height * width].view(height, width)

    def modules(self, counts):
        """`Rows` for `gram_pass`, without a copy: module m has the next ``counts[m]`` entries.

        Entries of one module have the same p and q. The weights are sigma / sigma_1 and its square.
        """
        if sum(counts) != len(self.heights):
            raise ValueError(f"counts must sum to {len(self.heights)}, got {sum(counts)}")
        starts = list(accumulate(counts, initial=0))
        ends = [0, *self.heights.cumsum(0).tolist()]
        bounds = [[x - ends[a] for x in ends[a : b + 1]] for a, b in pairwise(starts)]

        def of_first(x):
            return [int(x[a]) if b > a else 0 for a, b in pairwise(starts)]

        return Rows(
            self.rows, self.rows, of_first(self.starts_u), of_first(self.starts_v),
            of_first(self.widths_u), of_first(self.widths_v), bounds, self._weights(),
        )  # fmt: skip

    def _weights(self):
        """(2, rows of one side) float32: what `modules` says, zero for the rows past a rank."""
        n, most = self.sigma.shape
        top = self.sigma[:, :1]
        kept = torch.arange(most, device=top.device) < self.rank[:, None]
        relative = torch.where(kept, self.sigma / torch.where(kept[:, :1], top, 1.0), 0.0)
        place = torch.arange(int(self.heights.sum()))
        before = torch.repeat_interleave(self.heights.cumsum(0) - self.heights, self.heights)
        entry = torch.repeat_interleave(torch.arange(n), self.heights)
        at = (entry * most + place - before).to(top.device, non_blocking=True)
        one = relative.flatten()[at]
        return torch.stack([one, one.square()]).float()

    def first_failure(self):
        """(entry, reason) of the first entry that failed, or None. Waits for the device."""
        for e, status in enumerate(self.status.tolist()):
            if status:
                return e, STATUS[status]
        return None


def layout(heights, p, q):
    """(starts_u, starts_v, widths_u, widths_v, elements in all) of a `CanonicalBatch`.

    The arguments and the first four results are int64 (n,) on the host.
    """
    widths = [padded(d) for d in (p, q)]
    ends = torch.cat([heights * width for width in widths]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    n = len(heights)
    return starts[:n], starts[n : 2 * n], *widths, int(starts[-1])


def output(out, total, dtype, device):
    """A fresh buffer, or `out` after its checks."""
    if out is None:
        return torch.empty(total, dtype=dtype, device=device)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if out.dtype != dtype or out.ndim != 1 or out.device != device or len(out) < total:
        raise ValueError(
            f"out must be 1-D {dtype} on {device} with {total} elements or more, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    return out
