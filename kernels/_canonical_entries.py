"""Where the factor rows of many entries lie, as one table on the host. See canonical.py."""

from dataclasses import dataclass

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ADDRESS, ROW, K, RANK, D, DTYPE = range(6)  # columns of a table; strides in elements


@dataclass(frozen=True, eq=False)
class Factors:
    """Rows of n entries in the memory of one tensor, as they were read from files.

    Element (a, k) of entry e is `starts[e] / itemsize + a * row_strides[e] + k * k_strides[e]`
    elements after the first of ``data``. All but ``data`` are int64 (n,) on the host; ``starts``
    are bytes, ``dtypes`` indices in `FLOATS`.
    """

    data: torch.Tensor
    starts: torch.Tensor
    row_strides: torch.Tensor
    k_strides: torch.Tensor
    ranks: torch.Tensor
    widths: torch.Tensor
    dtypes: torch.Tensor


class Entries:
    """A table (n, 6) of one side, and the tensors that own the memory."""

    def __init__(self, table, device, views, data=None):
        self.table, self.device = table, device
        self._views, self._data = views, data  # entry: tensor; or where all the others lie

    @classmethod
    def of(cls, name, x, ranks):
        """From a list of 2-D tensors, a stack (n, r, d) or Factors; ValueError naming it."""
        if isinstance(x, Factors):
            made = cls._of_factors(name, x)
        elif isinstance(x, torch.Tensor):
            made = cls._of_stack(name, x.detach())
        else:
            made = cls._of_list(name, list(x))
        if ranks is not None:
            ranks = torch.as_tensor(ranks, dtype=torch.int64)
            if ranks.shape != made.rank.shape:
                raise ValueError(f"ranks must have shape ({len(made)},), got {tuple(ranks.shape)}")
            for e in ((ranks < 0) | (ranks > made.rank)).nonzero()[:1].flatten().tolist():
                raise ValueError(
                    f"ranks[{e}] is {ranks[e]}, and {name}[{e}] has {made.rank[e]} rows"
                )
            made.table[:, RANK] = ranks
        return made

    @classmethod
    def _of_list(cls, name, tensors):
        device = tensors[0].device if tensors else torch.device("cpu")
        table = torch.zeros((len(tensors), 6), dtype=torch.int64)
        records, views = [], {}
        for e, x in enumerate(tensors):
            if x.ndim != 2:
                raise ValueError(f"{name}[{e}] must have 2 dimensions, got {x.ndim}")
            if x.device != device:
                raise ValueError(f"{name}[{e}] must be on {device}, got {x.device}")
            views[e] = x.detach()
            records.append((x.data_ptr(), *x.stride(), *x.shape, _code(f"{name}[{e}]", x.dtype)))
        if records:
            table = torch.tensor(records, dtype=torch.int64)
        return cls(table, device, views)

    @classmethod
    def _of_stack(cls, name, x):
        if x.ndim != 3:
            raise ValueError(f"{name} must have 3 dimensions or be a list, got {x.ndim} dimensions")
        fields = (0, x.stride(1), x.stride(2), x.shape[1], x.shape[2], _code(name, x.dtype))
        table = torch.tensor(fields).repeat(len(x), 1)
        table[:, ADDRESS] = x.data_ptr() + torch.arange(len(x)) * (x.stride(0) * x.element_size())
        return cls(table, x.device, {}, x)

    @classmethod
    def _of_factors(cls, name, x):
        columns = (x.starts, x.row_strides, x.k_strides, x.ranks, x.widths, x.dtypes)
        table = torch.stack([c.to(torch.int64) for c in columns], 1)
        if len(table):
            if table.min() < 0 or table[:, DTYPE].max() >= len(FLOATS):
                raise ValueError(f"{name} has a negative field or an unknown dtype")
            size = torch.tensor([t.itemsize for t in FLOATS])[table[:, DTYPE]]
            last = (table[:, RANK] - 1) * table[:, ROW] + (table[:, D] - 1) * table[:, K] + 1
            end = table[:, ADDRESS] + torch.where(table[:, (RANK, D)].amin(1) > 0, last * size, 0)
            held = x.data.numel() * x.data.element_size()
            for e in (
                ((end > held) | ((table[:, ADDRESS] + x.data.data_ptr()) % size != 0))
                .nonzero()[:1]
                .flatten()
            ):
                raise ValueError(f"{name}[{int(e)}] ends outside of data, or starts unaligned")
        if not x.data.is_contiguous():
            raise ValueError(f"{name}.data must be contiguous")
        table[:, ADDRESS] += x.data.data_ptr()
        return cls(table, x.data.device, {}, x.data)

    def __len__(self):
        return len(self.table)

    @property
    def rank(self):
        return self.table[:, RANK]

    @property
    def d(self):
        return self.table[:, D]

    def dtype_is(self, dtype):
        """(n,) bool on the host."""
        return self.table[:, DTYPE] == FLOATS.index(dtype)

    def select(self, which):
        """Some entries, in that order; `which` is int64 on the host."""
        views = {i: self._views[e] for i, e in enumerate(which.tolist()) if e in self._views}
        return Entries(self.table[which], self.device, views, self._data)

    def view(self, e):
        """(rank, d) of an entry."""
        address, row, k, rank, d, code = self.table[e].tolist()
        if e in self._views:
            return self._views[e][:rank]
        data = self._data
        if data.dtype != FLOATS[code]:
            as_typed = torch.empty(0, dtype=FLOATS[code], device=self.device)
            data = as_typed.set_(data.untyped_storage())
        # as_strided counts from the start of the storage
        offset = address - data.untyped_storage().data_ptr()
        return data.as_strided((rank, d), (row, k), offset // FLOATS[code].itemsize)

    def replace(self, e, x):
        """The same values, or exact multiples of them, in another tensor."""
        self._views[e] = x
        code = FLOATS.index(x.dtype)
        self.table[e] = torch.tensor((x.data_ptr(), *x.stride(), *x.shape, code))


def _code(name, dtype):
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype}")
    return FLOATS.index(dtype)
