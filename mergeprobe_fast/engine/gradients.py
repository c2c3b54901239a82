"""Derivatives of the loss along deltas, from the samples of a calibration: P1 on tokens and atoms.

A token t of a domain has the input x_t and the output gradient y_t of each module, so the module's
weight gradient is ``G = Y^T X / T`` and the derivative of the loss along a delta is the mean over t
of ``phi_t = y_t^T W x_t``. Neither G nor W is formed. The loss is summed over a sequence and the
mean is over its tokens: everything is in nats per token of the domain's texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mergeprobe_fast.engine.device_views import chunk_rows
from mergeprobe_fast.engine.samples import require, scaled
from mergeprobe_fast.engine.sweep import Swept, sweep
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.ops import block_gram
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.zoo import Module, Zoo


@dataclass(frozen=True, eq=False)
class Tokens:
    """The sampled tokens of a domain, sorted by sequence."""

    domain: str
    starts: np.ndarray  # (S + 1,) where each sequence that has any begins, and the end

    @property
    def count(self) -> int:
        """T, how many they are."""
        return int(self.starts[-1])

    def per_sequence(self, values: np.ndarray) -> np.ndarray:
        """Sums within sequences: (T, ...) to (S, ...)."""
        return np.add.reduceat(values, self.starts[:-1], axis=0)


@dataclass(frozen=True, eq=False)
class Along:
    """Derivatives of the loss along whole deltas, summed over their modules.

    ``phi[d]`` is (T_d, N): how much token t of domain d adds to the derivative of the summed loss
    of its sequence along delta i.
    """

    tokens: tuple[Tokens, ...]
    phi: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of D domains over the modules of a zoo, and what they say about its deltas.

    Attributes:
        along: the derivatives along the N deltas.
        gram: (D, D), inner products of the gradients G_d.
        sequence_square: per domain, (S_d,) squared norm of g_s, the sum of y_t x_t^T over the
            sampled tokens of sequence s; ``sequence_dot`` its inner product with T_d G_d.
        norm: (N,), Frobenius norms of the deltas.
        atoms_sum, atoms_square, atoms_top: (N,), sum, sum of squares and maximum of
            |<G, sigma_k u_k v_k^T>| over the singular triples of an adapter's modules, with G of
            its own domain. Rotations within equal singular values move them, a gauge does not.
    """

    along: Along
    gram: np.ndarray
    sequence_square: tuple[np.ndarray, ...]
    sequence_dot: tuple[np.ndarray, ...]
    norm: np.ndarray
    atoms_sum: np.ndarray
    atoms_square: np.ndarray
    atoms_top: np.ndarray


def along(
    zoo: Zoo, calibration: Calibration, domains: Sequence[str], labels: str, threads: int
) -> Along:
    """Derivatives of the loss of each of ``domains`` along every delta of a zoo.

    ``labels``, "model" or "data", says of which loss. In memory are a few modules' factors, as
    ``sweep`` has them, and one module's samples on all domains.

    Raises:
        InputError: the calibration lacks a module of the zoo, or gradients of these labels; a file
            that changed; a factor or sample that is not finite.
    """
    work = _Work(zoo, calibration, domains, labels, threads)
    if work.device is not None:
        return work.on_device(None).along
    for part in work.modules():
        for d in range(len(domains)):
            work.phi_of(d, part)
    return work.along()


def gradients(
    zoo: Zoo, calibration: Calibration, domains: Sequence[str], own: np.ndarray, labels: str,
    threads: int,
) -> Gradients:  # fmt: skip
    """As :func:`along`, and the gradients themselves; ``own`` (N,) is each adapter's domain.

    Per module, gradients cost (sum of T)^2 (d_out + d_in) / 2 multiplications: no G is formed.
    """
    work = _Work(zoo, calibration, domains, labels, threads)
    if work.device is not None:
        return work.on_device(own)
    tokens, count = work.tokens, len(zoo)
    gram = np.zeros((len(domains), len(domains)))
    square = tuple(np.zeros(len(t.starts) - 1) for t in tokens)
    dot = tuple(np.zeros(len(t.starts) - 1) for t in tokens)
    energy, total, squares, top = (np.zeros(count) for _ in range(4))
    for part in work.modules():
        deltas = part.deltas
        np.add.at(energy, deltas.owner, deltas.sigma**2)
        for d, s in enumerate(part.samples):
            within = s.factor**2 * block_gram(s.y, s.x, tokens[d].starts, threads=threads)
            square[d][:] += np.diagonal(within)
            dot[d][:] += within.sum(axis=1)
            gram[d, d] += within.sum() / tokens[d].count ** 2
            for e in range(d):
                gram[d, e] += _inner(s, part.samples[e], threads)
            mine = own[deltas.owner] == d
            sensitivity = np.abs(work.phi_of(d, part)[mine])
            np.add.at(total, deltas.owner[mine], sensitivity)
            np.add.at(squares, deltas.owner[mine], sensitivity**2)
            np.maximum.at(top, deltas.owner[mine], sensitivity)
    lower = np.tril(gram, -1)
    return Gradients(
        work.along(), gram + lower.T, square, dot, np.sqrt(energy), total, squares, top
    )


class _Samples(NamedTuple):
    """Samples of a module and a domain: a token's gradient is ``factor y_t x_t^T``."""

    x: np.ndarray  # float32 (T, d_in)
    y: np.ndarray  # float32 (T, d_out)
    factor: float


class _Deltas(NamedTuple):
    """Singular triples of all adapters at a module, one adapter's after another's."""

    left: np.ndarray  # (d_out, K) float32, columns of one adapter orthonormal
    right: np.ndarray  # (d_in, K) float32
    sigma: np.ndarray  # (K,) float64
    owner: np.ndarray  # (K,) adapter of each
    bounds: np.ndarray  # (n + 1,) where those of each adapter that has any start, and the end


class _Part(NamedTuple):
    """One module: the deltas there, and the samples of each domain."""

    deltas: _Deltas
    samples: list[_Samples]


class _Work:
    """A pass over the modules of a zoo, and the derivatives that it adds up."""

    def __init__(
        self, zoo: Zoo, calibration: Calibration, domains: Sequence[str], labels: str, threads: int
    ) -> None:
        require(calibration, zoo.modules)
        self._zoo, self._calibration = zoo, calibration
        self._domains, self._labels, self._threads = tuple(domains), labels, threads
        self.tokens = tuple(_tokens(calibration, d) for d in self._domains)
        self._phi = tuple(np.zeros((t.count, len(zoo))) for t in self.tokens)
        self.device = current_device()

    def along(self) -> Along:
        return Along(self.tokens, self._phi)

    def on_device(self, own: np.ndarray | None) -> Gradients:
        """All of it where families compute, in float64; without ``own`` the derivatives alone."""
        from mergeprobe_fast.kernels.sample_sums import DerivativeSums

        device, count = self.device, len(self._zoo)
        sums = DerivativeSums(device, count, [t.starts.tolist() for t in self.tokens])
        energy = np.zeros(count)
        owner = None if own is None else device.array(own.astype(np.int64)).tensor
        for chunk in sweep(self._zoo, self._threads, device=device):
            rows, who = chunk_rows(chunk.form, chunk.bounds), chunk.adapter.astype(np.int64)
            np.add.at(energy, who, np.square(chunk.sigma).sum(1))
            who = device.array(who).tensor
            for k, module in enumerate(chunk.modules):
                found = [self._samples(d, module) for d in self._domains]
                x = sums.samples.upload([s.x for s in found], -(-module.d_in // 16) * 16)
                y = sums.samples.upload([s.y for s in found], -(-module.d_out // 16) * 16)
                factor = [s.factor for s in found]
                sums.add(rows, k, who, x, y, factor, owner)
                if own is not None:
                    sums.add_gradients(x, y, factor)
        get = device.download
        waits = [get(x) for x in (sums.phi, sums.gram, sums.atoms, *sums.square, *sums.dot)]
        phi, gram, atoms, *by_sequence = [wait() for wait in waits]
        places = zip(sums.samples.offsets, sums.samples.counts, strict=True)
        phi = tuple(np.ascontiguousarray(phi[:, at : at + t].T) for at, t in places)
        many = len(self._domains)
        return Gradients(
            Along(self.tokens, phi), gram + np.tril(gram, -1).T, tuple(by_sequence[:many]),
            tuple(by_sequence[many:]), np.sqrt(energy), *atoms,
        )  # fmt: skip

    def modules(self) -> Iterator[_Part]:
        """Every module in turn."""
        for chunk in sweep(self._zoo, self._threads):
            for k, module in enumerate(chunk.modules):
                yield _Part(_deltas(chunk, k), [self._samples(d, module) for d in self._domains])

    def phi_of(self, d: int, part: _Part) -> np.ndarray:
        """Add a module to phi of domain d. Returns <G_d, sigma_k u_k v_k^T> there, (K,)."""
        deltas, s, tokens = part.deltas, part.samples[d], self.tokens[d]
        if not len(deltas.sigma):
            return np.zeros(0)
        each = block_gram(
            s.y, s.x, np.array([0, tokens.count]), deltas.left.T, deltas.right.T, deltas.bounds,
            reduce="none", threads=self._threads,
        )  # fmt: skip
        each *= s.factor * deltas.sigma
        first = deltas.bounds[:-1]
        self._phi[d][:, deltas.owner[first]] += np.add.reduceat(each, first, axis=1)
        return each.mean(axis=0)

    def _samples(self, domain: str, module: Module) -> _Samples:
        x = scaled(self._calibration.inputs(domain, module.name))
        y = scaled(self._calibration.gradients(domain, module.name, self._labels))
        return _Samples(x.values, y.values, x.factor * y.factor)


def _tokens(calibration: Calibration, domain: str) -> Tokens:
    sequence, _ = calibration.sampled_tokens(domain)
    first = np.flatnonzero(np.diff(sequence, prepend=sequence[0] - 1))
    return Tokens(domain, np.append(first, len(sequence)))


def _deltas(chunk: Swept, module: int) -> _Deltas:
    """Of a module of a chunk, less those that are zero."""
    entries = chunk.entries([module])
    entries = entries[chunk.rank[entries] > 0]
    rank = chunk.rank[entries]
    kept = np.arange(chunk.sigma.shape[1])[None, :] < rank[:, None]
    return _Deltas(
        chunk.stack("u", entries), chunk.stack("v", entries), chunk.sigma[entries][kept],
        np.repeat(chunk.adapter[entries], rank), np.concatenate([[0], np.cumsum(rank)]),
    )  # fmt: skip


def _inner(s: _Samples, other: _Samples, threads: int) -> float:
    """<G, G'> of two domains at a module."""
    ends, ends2 = np.array([0, len(s.x)]), np.array([0, len(other.x)])
    dot = block_gram(s.y, s.x, ends, other.y, other.x, ends2, threads=threads)
    return s.factor * other.factor * float(dot[0, 0]) / (len(s.x) * len(other.x))
