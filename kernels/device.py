"""A CUDA device as passes over a zoo use it: page-locked memory, copies beside the kernels."""

from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from ._deltas import DeviceDeltas
from ._pass_rows import padded
from .arrays import DeviceArray, upload
from .canonical import Factors, canonical_batch
from .gram import INTERPRETED
from .gram_modules import Rows, gram_pass

__all__ = ["Device", "Forms"]


class Device:
    """One CUDA device, and two streams: kernels on the current one, copies on another.

    In Triton's interpreter it is the CPU, for tests. RuntimeError: no CUDA device can be used.
    """

    def __init__(self, name="cuda", precision="highest"):
        self.precision = precision
        self.copies = None
        if INTERPRETED:
            self.torch = torch.device("cpu")
            return
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
        self.torch = torch.device(name)
        if self.torch.index is None:
            self.torch = torch.device("cuda", torch.cuda.current_device())
        if self.torch.index >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
        capability = torch.cuda.get_device_capability(self.torch)
        if capability < (8, 0):
            raise RuntimeError(f"{self.torch} is sm_{capability[0]}{capability[1]}, not sm_80")
        self.copies = torch.cuda.Stream(self.torch)

    def room(self):
        """Bytes that one pass may take there: two thirds of what was free when it was first asked
        for, in steps of a sixteenth of the memory, so that a later process finds the same.

        In the interpreter a constant.
        """
        return 16 << 30 if self.copies is None else _room(self.torch.index)

    @staticmethod
    def failure(error):
        """What an error says if it is the device's own (no memory, say), in a line; else None."""
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return f"out of memory: {text}"
        if isinstance(error, (getattr(torch, "AcceleratorError", ()), OutOfResources)):
            return text  # the first since torch 2.8
        words = ("CUDA", "Triton Error", "CUBLAS", "CUSOLVER")
        told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        return text if told else None

    @property
    def label(self):
        """What results depend on, in words."""
        name = "interpreter" if self.copies is None else torch.cuda.get_device_name(self.torch)
        return f"{name}, {self.precision}"

    def memory(self, size):
        """A uint8 array that copies can be made from while the host goes on."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.copies is not None).numpy()

    def upload(self, array):
        """(uint8 tensor, wait): a copy that kernels wait for; ``array`` may change after wait()."""
        host = torch.from_numpy(array)
        if self.copies is None:
            return host.clone(), lambda: None
        with torch.cuda.device(self.torch):
            compute = torch.cuda.current_stream()
            with torch.cuda.stream(self.copies):
                there = torch.empty(len(host), dtype=torch.uint8, device=self.torch)
                there.copy_(host, non_blocking=True)
                done = self.copies.record_event()
            compute.wait_event(done)
            # Made on one stream, used on the other: its memory must outlive both.
            there.record_stream(compute)
        return there, done.synchronize

    def joined(self):
        """A function whose contexts put other threads on the stream that this one is on."""
        if self.copies is None:
            return nullcontext
        with torch.cuda.device(self.torch):
            stream = torch.cuda.current_stream()
        return lambda: torch.cuda.stream(stream)

    def array(self, host):
        """The values of a numpy array as a :class:`DeviceArray`."""
        return DeviceArray(upload(host, self.torch))

    def download(self, tensor):
        """A function that waits for a copy on the host and returns it, a numpy array."""
        if self.copies is None:
            return tensor.numpy
        with torch.cuda.device(self.torch):
            self.copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copies):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                done = self.copies.record_event()
            tensor.record_stream(self.copies)

        def wait():
            done.synchronize()
            return host.numpy()

        return wait

    def deltas(self, factors):
        """Deltas for the kernels of P2, from ((B, its dtype), (A, its dtype), scale) of each.

        Numpy arrays as they are stored, BF16 as uint16, and the names of their dtypes.
        """
        return DeviceDeltas.of(
            [(self._tensor(*b), self._tensor(*a), scale) for b, a, scale in factors]
        )

    def _tensor(self, raw, dtype):
        raw = np.ascontiguousarray(raw)
        host = torch.from_numpy(raw.view(np.int16) if dtype == "BF16" else raw)
        return (host.view(torch.bfloat16) if dtype == "BF16" else host).to(self.torch)


@lru_cache
def _room(index):
    free, total = torch.cuda.mem_get_info(index)
    step = total // 16
    return max(free // step, 1) * step * 2 // 3


class Forms:
    """Canonical factors of the entries of a chunk, on the device, and P1 on them.

    raw: uint8, on the device. The rest are numpy arrays over entries, starts in bytes: B (d_out,
    rank) and A (rank, d_in) lie there by rows. ``dtype_b`` and ``dtype_a`` are DTYPE_CODE,
    ``dtype`` is that of the canonical rows, "float32" or "float64".
    """

    def __init__(
        self, device, raw, *, start_b, dtype_b, start_a, dtype_a, rank, d_out, d_in, scale,
        dtype="float32",
    ):  # fmt: skip
        self._device = device
        one = np.ones_like(rank)
        U, V = (
            Factors(raw, *(torch.from_numpy(np.asarray(x, np.int64)) for x in columns))
            for columns in (
                (start_b, one, rank, rank, d_out, dtype_b),
                (start_a, d_in, one, rank, d_in, dtype_a),
            )
        )  # fmt: skip
        self.batch = batch = canonical_batch(
            U, V, scale=scale.tolist(), dtype=getattr(torch, dtype)
        )
        self._weights = batch.modules([len(rank)]).weights
        self._first = np.concatenate([[0], np.cumsum(rank)])
        self._places = {
            name: getattr(batch, name).tolist()
            for name in ("starts_u", "starts_v", "widths_u", "widths_v")
        }

    def spectra(self):
        """A function that waits for (sigma, rank, status), numpy arrays, and no later work."""
        found = [self._device.download(getattr(self.batch, x)) for x in ("sigma", "rank", "status")]
        return lambda: [wait() for wait in found]

    def rows(self):
        """All rows of both sides as one numpy array; waits for the device."""
        return self._device.download(self.batch.rows)()

    def gram_pass(self, first, second, p, q, epilogues):
        """The sums: float64 (epilogues, results), as ``kernels.gram_pass``; does not wait.

        first, second: of each module the range (first, last) of its entries; None: symmetric.
        """
        one = self._stack(first, p, q)
        two = None if second is None else self._stack(second, p, q)
        return DeviceArray(
            gram_pass(one, two, p, q, epilogues, precision=self._device.precision)
        )

    def _stack(self, ranges, p, q):
        bounds = [(self._first[a : b + 1] - self._first[a]).tolist() for a, b in ranges]
        # A module without entries has no rows: where they start does not matter.
        places = {
            name: [x[a] if a < b else 0 for a, b in ranges] for name, x in self._places.items()
        }
        for name, columns in (("widths_u", p), ("widths_v", q)):
            pairs = zip(places[name], columns, strict=True)
            places[name] = [x or padded(d) for x, d in pairs]
        spans = [slice(self._first[a], self._first[b]) for a, b in ranges]
        weights = torch.cat([self._weights[:, s] for s in spans], dim=1)
        rows = self.batch.rows
        return Rows(
            rows, rows, places["starts_u"], places["starts_v"], places["widths_u"],
            places["widths_v"], bounds, weights,
        )  # fmt: skip
