"""Launches of `gram_pass` on tensors without memory, for `_inspect`."""

from itertools import accumulate, product

import torch

from . import _configs, _pass_configs
from ._pass_plan import plan
from ._pass_rows import Rows
from .gram_modules import launches

DTYPE = {"half": torch.bfloat16, "high": torch.float32, "highest": torch.float32,
         "fp64": torch.float32}  # fmt: skip
# The sums of the default features; without a second stack two more, with weights exchanged.
SUMS = ((0, 0, 0), (2, -1, -1), (1, -1, -1), (2, 1, 1), (1, 1, 1), (2, 1, -1), (1, 1, -1))
EVEN = {f"even {r}": (r,) * (1024 // r) for r in (4, 8, 16, 64)}
RAGGED = {"one row each": (1,) * 300, "odd": (3, 5, 7, 1, 30, 9) * 20,
          "multiples of 4": (4, 8, 12, 32, 20, 28) * 20}  # fmt: skip
RANKS = EVEN | RAGGED


def pass_launches(kind, arch, *, size, ranks, two_stacks=False, sums=SUMS, config=None):
    """What `gram_pass` would launch on that architecture for two modules of these ranks."""
    bounds = [list(accumulate(ranks, initial=0))] * 2
    p, q = [4096, 1024], [4096, 11008]

    def rows():
        weights = torch.empty((2, 2 * bounds[0][-1]), dtype=torch.float32, device="meta")
        factors = [torch.empty(2**27, dtype=DTYPE[kind], device="meta") for _ in "UV"]
        return Rows(*factors, [0, 0], [0, 0], p, q, bounds, weights)

    first, second = rows(), rows() if two_stacks else None
    if config is None:
        pairs, even = 10**6 if size == "large" else 0, _pass_configs.even(bounds)
        config = _pass_configs.choose(kind, lambda block: pairs, even, divmod(arch, 10), 132)
    work = plan(first, second, p, q, list(sums), config.block, _configs.FOLD)
    out = torch.empty((len(sums), work.results), dtype=torch.float64, device="meta")
    accumulate_in = "fp64" if kind == "fp64" else "fp32"
    return list(launches(first, second, work, accumulate_in, config, out, 132))


def pass_variants(arch, kind, size):
    """Every variant of the first stage that a configuration serves."""
    names = EVEN if size == "large" else {"even 16": RANKS["even 16"]} | RAGGED
    for ranks, two_stacks in product(names.values(), (False, True)):
        yield pass_launches(kind, arch, size=size, ranks=ranks, two_stacks=two_stacks)[0]
