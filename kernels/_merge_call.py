"""Checked arguments of a merge, their tables on the device, and the launches on them."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import InputError
from ..ops.tiles_reference import hash_key
from ..ops.tiles_rule import ElementwiseRule
from . import _configs
from ._deltas import as_deltas
from ._merge_kernel import REAL, WHOLE, merge_kernel


class MergeCall:
    """One module. Without ``weights`` nothing is merged, and no ``fisher`` expected."""

    def __init__(self, factors, weights, rule, fisher):
        self.deltas, self.rule = as_deltas(factors), rule
        self.adapters = rule.adapters(len(self.deltas), weights)
        self.device = self.deltas.device
        self.config = self.deltas.tile(_configs.MERGE)
        if (fisher is None) == (rule.combine == "fisher") and weights is not None:
            raise InputError("goes with combine='fisher', and only with it", key="fisher")
        self.fisher = None if fisher is None else as_deltas(fisher, "fisher")
        if self.fisher is not None:
            d, f = self.deltas, self.fisher
            if (len(f), f.d_out, f.d_in, f.device) != (len(d), d.d_out, d.d_in, d.device):
                raise InputError(
                    f"expected {len(d)} of {d.d_out} x {d.d_in} on {d.device}, got {len(f)} of "
                    f"{f.d_out} x {f.d_in} on {f.device}", key="fisher",
                )  # fmt: skip
        self.high = bool((self.adapters["high"] != np.inf).any())
        self.whole, self.real = self._tables()

    def rows(self, rows):
        first, last = (0, self.deltas.d_out) if rows is None else rows
        if not 0 <= first <= last <= self.deltas.d_out:
            raise InputError(
                f"expected 0 <= first <= last <= {self.deltas.d_out}, got {first}, {last}",
                key="rows",
            )
        return first, last

    def pieces(self, first, last, step=None):
        """(first, last) of the launches: rows whose limits and sort fit into the workspace."""
        step = step or max(last - first, 1)
        if self.rule.keep == "della":
            # Per entry of each delta its limit; of the delta at work the entry, its order, a copy.
            row = self.deltas.d_in * (8 * len(self.deltas) + 24)
            step = min(step, max(_configs.WORKSPACE // row, 1))
        return [(top, min(top + step, last)) for top in range(first, last, step)]

    def squares(self, first, last):
        """Room for the squares of every tile of those rows."""
        return torch.empty(self.grid(first, last), dtype=torch.float64, device=self.device)

    def launch(self, first, last, out, status, **where):
        limits = self.limits(first, last)
        kernel, grid, named = self.arguments(first, last, out, status, limits=limits, **where)
        kernel[grid](**named)

    def arguments(
        self, first, last, out, status, *, base=None, minus=None, squares=None, limits=None
    ):
        """One launch of the merge kernel, as (kernel, grid, arguments by name)."""
        rule, config, d = self.rule, self.config, self.deltas
        f = self.fisher
        stacks = dict(
            p_u=d.U, p_v=d.V, s_u=d.U.stride(0), s_v=d.V.stride(0),
            p_f_u=f and f.U, p_f_v=f and f.V, p_m_u=minus and minus.U, p_m_v=minus and minus.V,
            s_f_u=f.U.stride(0) if f else 0, s_f_v=f.V.stride(0) if f else 0,
            s_m_u=minus.U.stride(0) if minus else 0, s_m_v=minus.V.stride(0) if minus else 0,
            minus_rows=minus.bounds[0][1] if minus else 0,
        )  # fmt: skip
        kept = dict(
            KEEP=rule.keep,
            HIGH=self.high,
            RESCALE=bool((self.adapters["rescale"] != 1).any()),
            COMBINE=rule.combine,
            FREQUENCY=rule.elect == "frequency",
            ELECT_WEIGHTED=bool(rule.elect_weighted),
            ZERO_SIGN=int(rule.zero_sign),
            DIVIDE=rule.divide,
            ONE_KEY=d.size <= 2**32,
        )
        return (
            merge_kernel,
            self.grid(first, last),
            dict(
                **stacks,
                **kept,
                p_whole=self.whole,
                p_real=self.real,
                p_limits=limits,
                p_base=base,
                p_out=out,
                p_status=status,
                p_squares=squares,
                n=len(d),
                first_row=first,
                last_row=last,
                d_in=d.d_in,
                tiles_j=-(-d.d_in // config.block_j),
                s_base_i=0 if base is None else base.stride(0),
                s_base_j=0 if base is None else base.stride(1),
                s_out_i=out.stride(0),
                s_out_j=out.stride(1),
                WHOLE_COLUMNS=self.whole.shape[1],
                REAL_COLUMNS=self.real.shape[1],
                RANK_STEP=d.rank_step,
                FISHER_STEP=f.rank_step if f else 1,
                MINUS_STEP=minus.rank_step if minus else 1,
                BLOCK_I=config.block_i,
                BLOCK_J=config.block_j,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=False,  # the rule's operations are the CPU's, not contracted
            ),
        )

    def grid(self, first, last):
        """Programs for those rows: one per tile."""
        i, j = self.config.block_i, self.config.block_j
        return ((-(-last // i) - first // i) * -(-self.deltas.d_in // j),)

    def _tables(self):
        """What the kernel reads of each adapter: int64 and float32, named in _merge_kernel."""
        d, f, n = self.deltas, self.fisher, len(self.deltas)
        uppers = 1 + (d.size - 1 >> 32)
        whole = np.zeros((n, len(WHOLE) - 1 + uppers), np.int64)
        # One more row: what concerns all adapters.
        real = np.zeros((n + 1, len(REAL)), np.float32)
        with np.errstate(over="ignore"):  # an infinite scale shows in the entries
            for i, a in enumerate(self.adapters):
                whole[i, :4] = *d.bounds[i], *(f.bounds[i] if f else (0, 0))
                whole[i, 4] = math.floor(float(a["density"]) * 2.0**32)
                seed, stream = int(self.rule.seed), int(a["stream"])
                keys = [hash_key(seed, stream, upper) for upper in range(uppers)]
                whole[i, 5:] = np.array(keys, np.uint64).view(np.int64)
                real[i, :2] = d.scales[i], f.scales[i] if f else 0.0
                real[i, 2:] = [a[name] for name in REAL[2:]]
            divisor = float(self.adapters["weight"].astype(np.float64).sum())
            real[n, :2] = 1.0 if abs(divisor) < 1e-8 else divisor, self.rule.floor
        return (torch.from_numpy(t).to(self.device) for t in (whole, real))

    def limits(self, first, last):
        """int64 (n, rows, d_in) for "della", else None: an entry survives whose hash is below.

        The probabilities follow the ranks within a row, so whole rows are sorted.
        """
        if self.rule.keep != "della":
            return None
        d, shape = self.deltas, (last - first, self.deltas.d_in)
        limits = torch.empty((len(d), *shape), dtype=torch.int64, device=self.device)
        entries = torch.empty(shape, dtype=torch.float32, device=self.device)
        status = torch.zeros(2, dtype=torch.int32, device=self.device)
        place = np.arange(d.d_in) / (d.d_in - 1) if d.d_in > 1 else np.array([0.5])
        for i, a in enumerate(self.adapters):
            MergeCall(d[i], [1.0], ElementwiseRule(), None).launch(first, last, entries, status)
            order = torch.sort(entries.abs_(), dim=1, stable=True).indices
            chance = (a["density"] - self.rule.epsilon) + 2 * self.rule.epsilon * place
            limit = np.floor(chance * 2.0**32).astype(np.int64)
            limit = torch.from_numpy(limit).to(self.device).expand(shape)
            limits[i].scatter_(1, order, limit)
        return limits


def check_matrix(name, x, shape, dtypes, device):
    if not isinstance(x, torch.Tensor):
        raise InputError(f"expected a torch.Tensor, got {type(x).__name__}", key=name)
    if tuple(x.shape) != shape or x.dtype not in dtypes or x.device != device:
        *most, end = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        types = f"{', '.join(most)} or {end}" if most else end
        got = f"{x.dtype} {tuple(x.shape)} on {x.device}".removeprefix("torch.")
        raise InputError(f"expected {types} {shape} on {device}, got {got}", key=name)
