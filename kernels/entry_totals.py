"""What pairs of adapters add up over modules, on a device."""

import math

import numpy as np
import torch

__all__ = ["PairTotals"]

# Of ``engine.entries.OfPairs``.
NAMES = (
    "conflicts", "both", "expected", "mass", "conflict_mass", "opposed", "cancelled", "squares",
    "top",
)  # fmt: skip


class PairTotals:
    """``engine.entries.OfPairs`` of n adapters: (n, n) float64 by name, 72 n^2 bytes.

    ``device``: :class:`.device.Device`. ``start``: numpy arrays by name to go on from.
    """

    def __init__(self, device, n, start=None):
        self._device = device
        self._sums = {
            name: torch.zeros((n, n), dtype=torch.float64, device=device.torch)
            if start is None
            else torch.from_numpy(start[name]).to(device.torch, copy=True)
            for name in NAMES
        }

    def add(self, counts, sums, who, unit, factor):
        """Account for the pairs of some adapters at one module.

        counts, sums: of :func:`.entry_statistics.entry_pairs`. who, unit, factor: (n,) numpy arrays
        as ``engine.entry_modules`` has them: adapters, exponents of 2, entries over those seen.
        """
        who, unit, factor = (
            torch.from_numpy(np.asarray(x, kind)).to(self._device.torch)
            for x, kind in ((who, np.int64), (unit, np.int64), (factor, np.float64))
        )
        conflicts, both, top = counts.double()
        mass, conflict_mass, opposed, opposing, cancelled, squares = sums
        own = mass.diagonal()
        cosine = (mass - 2 * conflict_mass) / (own[:, None] * own[None, :]).sqrt()
        cosine = cosine.nan_to_num(0.0).clamp(-1, 1)
        i, j = unit[:, None], unit[None, :]
        factor = factor[:, None]
        of_j = times_two_to(opposing * factor, j)
        for name, there, back in (
            ("conflicts", conflicts * factor, None),
            ("both", both * factor, None),
            ("expected", both * cosine.acos() / math.pi * factor, None),
            ("top", top * factor, None),
            ("mass", times_two_to(mass, i + j) * factor, None),
            ("conflict_mass", times_two_to(conflict_mass, i + j) * factor, None),
            ("squares", times_two_to(squares, 2 * (i + j)) * factor, None),
            ("cancelled", times_two_to(cancelled, j) * factor, None),
            ("opposed", times_two_to(opposed * factor, i), of_j),
        ):
            # What is not wanted is 0, but for the diagonal of two.
            both_ways = there + (there if back is None else back).T
            self._sums[name][who[:, None], who[None, :]] += both_ways.fill_diagonal_(0.0)

    def arrays(self):
        """Numpy arrays by name; waits for the device."""
        return {name: x.cpu().numpy() for name, x in self._sums.items()}


def times_two_to(x, exponent):
    """``ldexp`` of float64, which torch's does by way of float32."""
    exponent = exponent.clamp(-2100, 2100)  # beyond these everything is 0 or infinite
    third = torch.div(exponent, 3, rounding_mode="trunc")
    for part in (third, third, exponent - 2 * third):
        x = x * ((part + 1023) << 52).view(torch.float64)
    return x
