"""A child process in which what a calibration sees of adapters is computed on the device.

As device_child.py (Triton's interpreter, or with MERGEPROBE_TRITON_DEVICE=cuda the device), with
faults of its own. This file is the child's program too.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
from triton_child import serve

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import passes
from mergeprobe_fast.engine.totals import totals
from mergeprobe_fast.ops.device import open_device


def pairs(zoo, **options) -> dict[str, np.ndarray]:
    found = mpf.pair_features(zoo, threads=2, **options)
    return {n: np.asarray(found[n]) for n in found}


def adapters(zoo, **options) -> dict[str, np.ndarray]:
    found = mpf.adapter_features(zoo, threads=2, **options)
    return {n: np.asarray(found[n]) for n in found}


def whole(zoo, calibration, device) -> dict[str, np.ndarray]:
    found = totals(
        mpf.open_zoo(zoo), calibration and mpf.open_calibration(calibration), threads=2,
        device=open_device(device),
    )  # fmt: skip
    return {n: x for n, x in vars(found).items() if x is not None}


def largest(zoo, device, **options) -> dict[str, int]:
    """Elements of the most matrices that lie in memory at once: of SVDs, of Grams over samples."""
    from mergeprobe_fast.kernels import sample_sums, vector_tiles

    svd, centred, seen = vector_tiles.singular_values, sample_sums._u_centred, {}

    def values(x):
        # What Triton's are padded to.
        height = max(16, 1 << (max(x.shape[1:]) - 1).bit_length())
        seen["svd"] = max(seen.get("svd", 0), len(x) * height**2)
        return svd(x)

    def grams(x):
        seen["grams"] = max(seen.get("grams", 0), x.numel())
        return centred(x)

    with (
        patch.object(vector_tiles, "singular_values", values),
        patch.object(sample_sums, "_u_centred", grams),
    ):
        if "calibration" in options:
            mpf.adapter_features(zoo, ["output_shift"], device=device, **options)
        else:
            mpf.pair_features(zoo, "gradience", device=device)
    return seen


TASKS = {"pairs": pairs, "adapters": adapters, "totals": whole, "largest": largest}


@contextmanager
def planted(fault):
    """With a fault in the code of the device."""
    from mergeprobe_fast.kernels import (
        chunk_rows,
        domain_views,
        exact_totals,
        vector_tiles,
    )

    views, rows, samples = (
        domain_views.DomainViews, chunk_rows.ChunkRows, domain_views.SampleRows,
    )  # fmt: skip
    bias, upload, by_entry = views.bias, samples.upload, rows.by_entry
    read, ends = exact_totals._Block.rows, vector_tiles.VectorTiles._ends

    def lost(self, values, width):
        return upload(self, [x[:-1] for x in values], width)

    def confused(self, view):
        return view.view(-1), lambda d, k, e: (
            self.first[e or 0] * self.columns + self.offsets[0], self.columns, self.counts[0]
        )  # fmt: skip

    def first(self, x, a, b):
        made = by_entry(self, x, a, b).clone()
        made[:, 1:] = 0
        return made

    def rounded(self, side):
        made = read(self, side)
        return made * (1 + 2.0**-24) if side == "u" else made

    def flipped(self, side, columns, entries, count, last):
        return ends(self, side, columns, entries, count, not last)

    what = {
        None: (views, "bias", staticmethod(bias)),
        "the bias of the HSIC stays": (views, "bias", staticmethod(lambda t, x, y: 0 * x)),
        "the last sample is lost": (samples, "upload", lost),
        "the first domain for all": (views, "_view", confused),
        "first rows only": (rows, "by_entry", first),
        "the last vectors for the first": (vector_tiles.VectorTiles, "_ends", flipped),
        "factors in float32": (exact_totals._Block, "rows", rounded),
    }[fault]  # fmt: skip
    with patch.object(*what):
        yield


def handle(request):
    """(task, keywords, fault, sizes): what the task gives, on the device."""
    task, options, fault, sizes = request
    from mergeprobe_fast.kernels import (
        chunk_rows,
        domain_views,
        exact_totals,
        sample_sums,
        vector_tiles,
    )

    with ExitStack() as stack:
        stack.enter_context(planted(fault))
        for name, value in sizes.items():
            for module in (
                passes, chunk_rows, domain_views, exact_totals, sample_sums, vector_tiles,
            ):  # fmt: skip
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        return TASKS[task](device="cuda", **options)


if __name__ == "__main__":
    serve(handle)
