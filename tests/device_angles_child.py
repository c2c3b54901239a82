"""A child process in which statistics of principal angles are computed on the device.

As device_child.py (Triton's interpreter, or with MERGEPROBE_TRITON_DEVICE=cuda the device), with
faults of its own. This file is the child's program too.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from triton_child import DEVICE, serve

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import angles, kept, kept_sums
from mergeprobe_fast.engine import device as on_device
from mergeprobe_fast.features.angles import FAMILY
from mergeprobe_fast.ops.device import computing_on, open_device
from mergeprobe_fast.recorded import NOTHING


def family(zoo) -> dict[str, np.ndarray]:
    """All columns of all pairs."""
    zoo = mpf.open_zoo(zoo)
    with computing_on(open_device("cuda")):
        data = FAMILY.compute(zoo, NOTHING, 2)
    pairs = np.triu_indices(len(zoo), 1)
    return {c.name: c.finish(data, *pairs) for c in FAMILY.pairs}


def features(zoo, **options) -> dict[str, np.ndarray]:
    found = mpf.pair_features(zoo, threads=2, device="cuda", **options)
    return {n: np.asarray(found[n]) for n in found}


def interrupted(zoo, stop, keep, **options):
    """Calls into the kernel of a screen that is killed when it keeps its sums the stop-th time, of
    the one after it, and of one that is not killed; and what the last two give."""
    from mergeprobe_fast.kernels.pair_angles import PairAngles

    compute, put = PairAngles.__call__, kept.Files.put
    calls, puts = [], []

    def counting(self, *arguments):
        calls.append(1)
        return compute(self, *arguments)

    def stopping(self, name, *arguments):
        put(self, name, *arguments)
        puts.append(name)
        if len(puts) == stop:
            raise KeyboardInterrupt

    with (
        patch.object(PairAngles, "__call__", counting), patch.object(kept.Files, "put", stopping),
        patch.multiple(kept_sums, SECONDS=0.0, SHARE=1e9),
    ):  # fmt: skip
        once = features(zoo, **options)
        counts = [len(calls)]
        try:
            features(zoo, keep=keep, **options)
        except KeyboardInterrupt:
            counts.append(len(calls))
            again = features(zoo, keep=keep, **options)
            counts.append(len(calls))
            whole, killed, after = np.diff([0, *counts]).tolist()
            return killed, after, whole, again, once
    raise AssertionError(f"only {len(puts)} files were kept")


def statistics(U, V, first, second, top, backend, bytes_at_once=None):
    """(rank, statistics) of the pairs of some modules, from lists of factors."""
    from mergeprobe_fast.kernels import pair_angles
    from mergeprobe_fast.kernels.canonical import canonical_batch

    batch = canonical_batch(U, V, dtype=torch.float64, backend="torch")
    rank = batch.rank.cpu().numpy()
    with patch.object(pair_angles, "BYTES", bytes_at_once or pair_angles.BYTES):
        compute = pair_angles.PairAngles(torch.device(DEVICE), top, backend)
        return rank, compute(batch, rank, first, second)


TASKS = {f.__name__: f for f in (family, features, interrupted, statistics)}
FAULTS = (
    "sides exchanged", "singular values of other entries", "results in another's place",
    "a sum that is not of both",
)  # fmt: skip


@contextmanager
def planted(fault):
    """With a fault in the code of the device."""
    if fault is None:
        yield
        return
    from mergeprobe_fast.kernels import _canonical_triton, _pair_angles_statistics, pair_angles

    sound, group, table = pair_angles.pair_statistics, pair_angles._Group, pair_angles._Table

    def exchanged(m, n, *rest):
        return sound(n, m, *rest)

    class Rolled(group):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.sigma = self.sigma.roll(1, 0)

    class Reversed(table):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.place = self.place.flip(0)

    def apart(x, s1, s2, choose, out):
        return merged(0 * x, s1, s2, choose, out)

    merged = _pair_angles_statistics._merged
    what = {
        "sides exchanged": (pair_angles, "pair_statistics", exchanged),
        "singular values of other entries": (pair_angles, "_Group", Rolled),
        "results in another's place": (pair_angles, "_Table", Reversed),
        "a sum that is not of both": (_pair_angles_statistics, "_merged", apart),
        "one sweep": (_canonical_triton, "SWEEPS", 1),
        "no convergence": (pair_angles, "pair_statistics", lambda *x: torch.nan * sound(*x)),
    }[fault]  # fmt: skip
    with patch.object(*what):
        yield


def handle(request):
    """(task, keywords, fault, sizes): what the task gives. Sizes are of engine.angles, of the
    engine's device (CHUNK_BYTES) and of the kernels (BYTES, KEPT)."""
    task, options, fault, sizes = request
    from mergeprobe_fast.kernels import pair_angles

    owner = {"CHUNK_BYTES": on_device, "BYTES": pair_angles, "KEPT": pair_angles}
    with ExitStack() as stack:
        for name, value in sizes.items():
            stack.enter_context(patch.object(owner.get(name, angles), name, value))
        stack.enter_context(planted(fault))
        return TASKS[task](**options)


if __name__ == "__main__":
    serve(handle)
