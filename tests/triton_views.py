"""Strides that a factor may come with, for the tests of the Triton kernels."""

from __future__ import annotations

import torch

VIEWS = {
    "B_transposed": lambda x: x.T.contiguous().T,
    "every_other_column": lambda x: torch.stack([x, x + 1], 2).flatten(1)[:, ::2],
    "shifted_by_one": lambda x: torch.nn.functional.pad(x, (1, 15))[:, 1:-15],
    "rows_65_apart": lambda x: torch.nn.functional.pad(x, (0, 1))[:, :-1],
    "half_of_the_columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one_row_repeated": lambda x: x[:1].expand(x.shape),
}
