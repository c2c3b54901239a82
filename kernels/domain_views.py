"""Canonical factors of a chunk on a device, seen through the samples of domains. Needs torch.

With W = sum_a sigma_a u_a v_a^T and samples X of a domain, ``<X W_i^T, X W_j^T>`` is P1 with X v in
the place of v. Everything but P1 itself is float64: its products are as fast as those of float32 on
a data-center GPU, and no setting of torch's rounds them to tf32.
"""

from itertools import accumulate, pairwise

import torch

from ._pass_rows import Rows, padded
from .chunk_rows import PIECE, ChunkRows
from .gram_modules import gram_pass

__all__ = ["ChunkRows", "DomainViews"]
DOT, HSIC = (0, 0, 0), (2, 1, 1)  # epilogues of gram_pass


class SampleRows:
    """Samples of domains on a device, one below the other: (columns, width).

    ``counts[d]`` of domain d start at ``offsets[d]``; zeros lie between them, to multiples of 16.
    """

    def __init__(self, device, counts):
        self._device, self._staged, self._sent = device, None, lambda: None
        self.counts = [int(t) for t in counts]
        self.offsets = list(accumulate((padded(t) for t in self.counts), initial=0))
        self.columns = self.offsets.pop()

    def upload(self, values, width):
        """float64, with zeros around them: numpy float32 (T, d) of every domain.

        They may change when this returns.
        """
        host = self.staged(self.columns * width).reshape(self.columns, width)
        for x, at in zip(values, self.offsets, strict=True):
            host[at : at + len(x), : x.shape[1]] = x
        return self.sent().view(self.columns, width).double()

    def staged(self, size):
        """Zeros to be filled and `sent`: a numpy float32 array."""
        self._sent()
        self._staged = self._device.memory(4 * size)
        host = self._staged.view("float32")
        host[:] = 0
        return host

    def sent(self):
        """What is `staged`, as a float32 tensor of the device."""
        copy, self._sent = self._device.upload(self._staged)
        return copy.view(torch.float32)


class DomainViews(ChunkRows):
    """What the entries of a chunk make of the samples of domains, ``counts[d]`` of domain d.

    A view is (rows, columns) float32 with ``widths[d]`` columns for domain d from ``offsets[d]``
    on: zeros from counts[d] columns of it on, as `gram_pass` wants them.
    """

    def __init__(self, device, forms, bounds, counts, *, centred=False):
        super().__init__(forms, bounds)
        self._precision, self._samples = device.precision, SampleRows(device, counts)
        self.counts, self.offsets = self._samples.counts, self._samples.offsets
        self.columns = self._samples.columns
        inside = torch.zeros((len(self.counts), self.columns), dtype=torch.float64)
        for row, at, t in zip(inside, self.offsets, self.counts, strict=True):
            row[at : at + t] = 1.0
        self._inside = inside.to(self.device, non_blocking=True)  # (domains, columns)
        self._share = self._inside / self._inside.sum(1, keepdim=True)
        shape, entries = (self.total, self.columns), self.bounds[-1]
        self.inputs = torch.zeros(shape, device=self.device)
        self.centred = torch.zeros(shape, device=self.device) if centred else None

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        self.energy, self.mean_energy = zeros(2, len(self.counts), entries)
        self.mean = zeros(self.total, len(self.counts))
        self.squares = zeros(entries, self.columns) if centred else None

    def empty(self):
        """A view of zeros."""
        return torch.zeros_like(self.inputs)

    def see(self, modules, values):
        """Inputs of some modules, (T, d_in) of every domain."""
        filled = [k for k in modules if self.bounds[k] < self.bounds[k + 1]]
        if not filled:
            return
        x = self._samples.upload(values, self.of(filled[0], "v").shape[1])
        for k in filled:
            for a, b, rows, seen in self._project(k, "v", x, self.inputs):
                weight = self.relative[a:b, : self.most(a, b)].square()[:, :, None]
                mean = seen @ self._share.mT
                self.mean[rows] = mean
                energies = torch.stack([seen.square() @ self._inside.mT, mean.square()])
                for out, found in zip((self.energy, self.mean_energy), energies, strict=True):
                    out[:, a:b] = (self.by_entry(found, a, b) * weight).sum(1).mT
                if self.centred is not None:
                    self.centred[rows] = (seen - mean @ self._inside).float()
                    square = self.by_entry(self.centred[rows].double().square_(), a, b)
                    self.squares[a:b] = (weight.mT @ square)[:, 0]

    def see_left(self, k, values, out):
        """Output gradients of module k, (T, d_out) of every domain, into a view."""
        if self.bounds[k] < self.bounds[k + 1]:
            y = self._samples.upload(values, self.of(k, "u").shape[1])
            for _ in self._project(k, "u", y, out):
                pass

    def _project(self, k, side, samples, out):
        """Rows of a module times samples, to ``out``: (first, last entry, rows, float64 of out)."""
        rows = self.of(k, side)
        first, last = self.bounds[k : k + 2]
        widest = max(samples.shape) * max(1, self.most(first, last))
        step = max(1, PIECE // (8 * widest))
        for a in range(first, last, step):
            b = min(a + step, last)
            here = slice(self.first[a], self.first[b])
            if here.start < here.stop:
                part = rows[here.start - self.first[first] : here.stop - self.first[first]]
                out[here] = (part.double() @ samples.mT).float()
                yield a, b, here, out[here].double()

    def scaled(self, roots):
        """All rows times a vector: {module: (u, v)}, numpy float32 (d_out,) and (d_in,)."""
        out = torch.zeros_like(self.batch.rows)
        each = [(k, *x) for k, both in roots.items() for x in zip("uv", both, strict=True)]
        ends = list(accumulate((padded(len(x)) for *_, x in each), initial=0))
        if not each:
            return out
        host = self._samples.staged(ends[-1])
        for (*_, x), at in zip(each, ends, strict=False):
            host[at : at + len(x)] = x
        weights = self._samples.sent()
        for (k, side, _), (a, b) in zip(each, pairwise(ends), strict=True):
            torch.mul(self.of(k, side), weights[a:b], out=self.of(k, side, out))
        return out

    def outputs(self, first, second, p):
        """(domains, results): <X W_i^T, X W_j^T> over top sigmas."""
        left = self._canonical("u", self.batch.rows, p)
        return self._pass(left, self._view(self.inputs), first, second, DOT, len(self.counts))

    def kfac(self, left, first, second):
        """The same with a view in the place of the left factors."""
        return self._pass(
            self._view(left), self._view(self.inputs), first, second, DOT, len(self.counts)
        )

    def fisher(self, rows, p, q, first, second):
        """(1, results) of `scaled` rows."""
        sides = (self._canonical(*x) for x in (("u", rows, p), ("v", rows, q)))
        return self._pass(*sides, first, second, DOT, 1)

    def means(self, first, second):
        """(domains, results): <W_i m, W_j m> over top sigmas, m the mean of a domain."""
        out, at = self._results(first, second, len(self.counts))
        for k, (a, b) in enumerate(pairwise(self.bounds)):
            rows = self.first[a], self.first[b]
            if rows[0] < rows[1]:
                mean = self.by_entry(self.mean[slice(*rows)], a, b)
                mean = (mean * self.relative[a:b, : self.most(a, b), None]).mT
                for _, x in self.slices(k, "u", len(self.counts)):
                    moved = (mean @ x).transpose(0, 1)  # (domains, entries, columns)
                    self._add(out, at[k], moved, a, first[k], (second or first)[k])
        return out

    def hsic(self, first, second):
        """(domains, results): tr(K L) of centred outputs over top sigmas, without its bias.

        Domains of less than 3 samples keep the bias: there is no unbiased one.
        """
        view = self._view(self.centred)
        out = self._pass(view, view, first, second, HSIC, len(self.counts))
        at = self._results(first, second, 0)[1]
        for d, (start, t) in enumerate(zip(self.offsets, self.counts, strict=True)):
            square = self.squares[:, start : start + t]
            total = square.sum(1)
            for k, ((a, b), (c, e)) in enumerate(zip(first, second or first, strict=True)):
                if t > 2 and a < b and c < e:
                    bias = self.bias(t, square[a:b] @ square[c:e].mT, total[a:b].outer(total[c:e]))
                    out[d, at[k] : at[k + 1]] -= bias.flatten()
        return out

    @staticmethod
    def bias(t, dots, totals):
        """What tr(K L) of t samples has too much, from k.l and sum(k) sum(l)."""
        return t / (t - 2) * dots - totals / ((t - 1) * (t - 2))

    def hsic_alone(self):
        """(domains, entries): the same of each entry with itself, never negative."""
        out = self.alone(None, self.centred, 2)
        for d, (start, t) in enumerate(zip(self.offsets, self.counts, strict=True)):
            square = self.squares[:, start : start + t]
            if t > 2:
                out[d] -= self.bias(t, square.square().sum(1), square.sum(1).square())
        return out.clamp_(min=0.0)

    def alone(self, left, right, power=1):
        """(domains, entries): sum_ab w_a M[a, b] N[a, b] w_b of each entry with itself, float64.

        M and N from two views; ``left`` None: N and N. w is relative sigma to a power.
        """
        out = torch.zeros((len(self.counts), self.bounds[-1]), dtype=torch.float64,
                          device=self.device)  # fmt: skip
        for k in range(len(self.bounds) - 1):
            here = slice(self.first[self.bounds[k]], self.first[self.bounds[k + 1]])
            for d, (start, t) in enumerate(zip(self.offsets, self.counts, strict=True)):
                seen = [x[here, start : start + t] for x in (left, right) if x is not None]
                self._alone(out[d], k, seen, power)
        return out

    def alone_scaled(self, rows):
        """(1, entries): the same from `scaled` rows."""
        out = torch.zeros((1, self.bounds[-1]), dtype=torch.float64, device=self.device)
        for k, (a, b) in enumerate(pairwise(self.bounds)):
            if self.first[a] < self.first[b]:
                self._alone(out[0], k, [self.of(k, s, rows) for s in "uv"], 1)
        return out

    @staticmethod
    def joined(parts):
        """(domains, ...) of one tensor (1, ...) a domain."""
        return torch.cat(parts)

    def _alone(self, out, k, sides, power):
        """``sides``: float32 rows (rows, columns) of module k, one or two; a Gram of each."""
        first, last = self.bounds[k : k + 2]
        h = self.most(first, last)
        if h == 0:
            return
        step = max(1, PIECE // (8 * h * max(h, *(x.shape[1] for x in sides))))
        for a in range(first, last, step):
            b = min(a + step, last)
            rows = slice(self.first[a] - self.first[first], self.first[b] - self.first[first])
            if rows.start == rows.stop:
                continue
            weight = self.relative[a:b, : self.most(a, b)] ** power
            product = weight[:, :, None] * weight[:, None, :]
            for side in sides:
                x = self.by_entry(side[rows].double(), a, b)
                gram = x @ x.mT
                product *= gram if len(sides) == 2 else gram.square_()
            out[a:b] = product.sum((1, 2))

    def _canonical(self, side, rows, columns):
        """How `_pass` finds one side of canonical rows in a buffer, by (domain, module, entry)."""
        starts, widths = (getattr(self.batch, f"{x}_{side}").tolist() for x in ("starts", "widths"))
        return rows, lambda d, k, e: (
            (starts[e], widths[e], columns[k]) if e is not None
            else (0, padded(columns[k]), columns[k])
        )  # fmt: skip

    def _view(self, view):
        return view.view(-1), lambda d, k, e: (
            self.first[e or 0] * self.columns + self.offsets[d], self.columns, self.counts[d]
        )  # fmt: skip

    def _pass(self, left, right, first, second, epilogue, domains):
        """P1 of every domain in one launch, their modules one after another: (domains, results)."""
        one, p, q = self._stack(left, right, first, domains)
        two = None if second is None else self._stack(left, right, second, domains)[0]
        found = gram_pass(one, two, p, q, [epilogue], precision=self._precision)
        return found.view(domains, -1)

    def _stack(self, left, right, ranges, domains):
        each = [(d, k, a if a < b else None) for d in range(domains)
                for k, (a, b) in enumerate(ranges)]  # fmt: skip
        (u, of_u), (v, of_v) = left, right
        starts_u, strides_u, p = zip(*(of_u(*x) for x in each), strict=True)
        starts_v, strides_v, q = zip(*(of_v(*x) for x in each), strict=True)
        bounds = [[x - self.first[a] for x in self.first[a : b + 1]] for a, b in ranges]
        spans = [self.weights[:, self.first[a] : self.first[b]] for a, b in ranges]
        return Rows(
            u, v, list(starts_u), list(starts_v), list(strides_u), list(strides_v),
            bounds * domains, torch.cat(spans, 1).repeat(1, domains),
        ), list(p), list(q)  # fmt: skip
