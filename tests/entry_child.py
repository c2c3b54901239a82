"""A child process in which statistics of entries are computed on the device.

As triton_child.py has it: Triton's interpreter, or with MERGEPROBE_TRITON_DEVICE=cuda the device,
with faults of its own. This file is the child's program too.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

from triton_child import serve

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import entries, kept, kept_sums, passes
from mergeprobe_fast.ops import entry_moments, entry_pairs, entry_sizes, sign_conflicts
from mergeprobe_fast.ops.device import open_device


def sums(zoo, looking, keep=None, stop=None):
    """``entry_sums`` by name; with ``keep``, what is added up is kept there after every step, of
    which ``stop`` are done."""
    with ExitStack() as stack:
        if keep is not None:
            stack.enter_context(patch.multiple(kept_sums, SECONDS=0.0, SHARE=float("inf")))
            so_far = kept_sums.Sums(kept.Files(keep), "sums-entries.safetensors", "the same")
            stack.enter_context(kept_sums.keeping_sums(so_far))
            stack.enter_context(patch.object(so_far, "reached", stopping(so_far.reached, stop)))
        found = entries.entry_sums(
            mpf.open_zoo(zoo), entries.Looking(*looking), device=open_device("cuda")
        )
    return {**vars(found.adapters), **vars(found.pairs)}


def stopping(reached, stop):
    def made(step, arrays):
        reached(step, arrays)
        if step == stop:
            raise mpf.InputError("stopped")

    return made


def columns(zoo, features):
    found = mpf.pair_features(zoo, features, threads=2, device="cuda")
    return {n: found[n] for n in found}


TASKS = {
    "sizes": lambda *a, **k: entry_sizes(*a, **k, backend="triton"),
    "moments": lambda *a, **k: entry_moments(*a, **k, backend="triton")._asdict(),
    "pairs": lambda *a, **k: entry_pairs(*a, **k, backend="triton")._asdict(),
    "signs": lambda *a, **k: sign_conflicts(*a, **k, backend="triton"),
    "sums": sums, "columns": columns,
}  # fmt: skip


def spoiled(fault, launches):
    """The launches of a strip with a fault, to show that the checks can fail."""

    def made(self, first, last):
        for kernel, grid, named in launches(self, first, last):
            if fault == "a run left out" and "entries" in named:
                named["p_x"] = named["p_x"][self.config.run :]
                named["entries"] -= self.config.run
            if fault == "units mistaken" and "p_units" in named:
                named["p_units"] = named["p_units"] + (named["p_units"] > 0).int()
            if fault == "a tile of entries left out" and "first_tile" in named:
                grid = (grid[0] - 1,)
            if fault == "sides exchanged" and "p_tiles" in named:
                named["p_tiles"] = named["p_tiles"].flip(1)
            yield kernel, grid, named

    return made


def handle(request):
    """(task, arguments, keywords, settings): what the task gives, with settings by name."""
    task, arguments, options, settings = request
    from mergeprobe_fast.kernels import _configs, entry_statistics

    settings = dict(settings)
    fault = settings.pop("fault", None)
    pairs, run = entry_statistics._Pairs, settings.pop("pair", {})
    name = "PAIR_INTERPRETER" if entry_statistics.INTERPRETED else "PAIR"
    settings = {name: replace(getattr(_configs, name), **run), **settings}
    with ExitStack() as stack:
        if fault:
            stack.enter_context(patch.object(pairs, "launches", spoiled(fault, pairs.launches)))
        for name, value in settings.items():
            for module in (_configs, entries, passes):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        try:
            return TASKS[task](*arguments, **options)
        except mpf.InputError as error:  # some kinds do not survive pickling
            raise mpf.InputError(str(error)) from None


if __name__ == "__main__":
    serve(handle)
