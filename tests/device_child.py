"""A child process in which ``device="cuda"`` is Triton's interpreter (see triton_child.py).

The interpreter must be switched on before triton is imported, and another test may have imported it
in this process. This file is the child's program too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from triton_child import environment

import mergeprobe_fast as mpf
from mergeprobe_fast.engine import passes
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.ops.device import open_device


@contextmanager
def interpreter(folder: Path) -> Iterator[Callable[..., dict[str, np.ndarray]]]:
    """``call(task, zoo, fault=..., sizes=..., **options)``: arrays by name, or InputError."""
    out = folder / "found.npz"
    child = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(), cwd=folder,
    )  # fmt: skip

    def call(task, zoo, *, fault=False, sizes=None, **options):
        default = {"PAIR_BYTES": passes.PAIR_BYTES, "DEVICE_BYTES": passes.DEVICE_BYTES}
        request = {
            "task": task, "zoo": str(zoo), "fault": fault, "out": str(out), "options": options,
            "sizes": {**default, **(sizes or {})},
        }  # fmt: skip
        print(json.dumps(request), file=child.stdin, flush=True)
        answer = json.loads(child.stdout.readline())
        if answer:
            raise mpf.InputError(answer)
        with np.load(out, allow_pickle=True) as found:
            return dict(found)

    with child:
        yield call
        child.stdin.close()


def features(zoo, **options) -> dict[str, np.ndarray]:
    found = mpf.pair_features(zoo, threads=2, **options)
    return {n: np.asarray(found[n]) for n in found}


def adapters(zoo, **options) -> dict[str, np.ndarray]:
    found = mpf.adapter_features(zoo, threads=2, **options)
    return {n: np.asarray(found[n]) for n in found}


def merged(zoo, **options) -> dict[str, np.ndarray]:
    found = mpf.merge(zoo, threads=2, **options)
    return {
        f"{m.module.name}: {name}": np.asarray(value)
        for m in found.modules
        for name, value in (("delta", m.b @ m.a), ("norm", m.norm), ("error", m.truncation_error))
    }


def dense_rows(zoo, device, method, **arguments) -> dict[str, np.ndarray]:
    """What is added to base weights, in two pieces of rows."""
    source = ZooSource(mpf.open_zoo(zoo))
    chosen, request = prepare(source, method, device=open_device(device), arguments=arguments)
    return {
        f"{m.module.name}: {first}": m.rows(first, last).copy()
        for m in chosen.dense(request)
        for first, last in ((0, 5), (5, m.module.d_out))
    }


TASKS = {"adapters": adapters, "dense_rows": dense_rows, "features": features, "merged": merged}


def _plant_faults() -> Callable[[bool], None]:
    """Weights of the wrong rows in P1, thresholds doubled in P2."""
    from mergeprobe_fast.kernels import device, order_statistics

    sound = device.Forms._stack, order_statistics.order_statistics

    def stack(self, *arguments):
        rows = sound[0](self, *arguments)
        rows.weights.copy_(rows.weights.roll(1, 1))
        return rows

    def statistics(*arguments):
        return [2 * x for x in sound[1](*arguments)]

    def plant(fault: bool) -> None:
        device.Forms._stack, order_statistics.order_statistics = (
            (stack, statistics) if fault else sound
        )

    return plant


def serve() -> None:
    """One JSON request a line; "" or an error's text back."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plant = _plant_faults()
    for line in sys.stdin:
        request = json.loads(line)
        for name, value in request["sizes"].items():
            setattr(passes, name, value)
        plant(request["fault"])
        try:
            task = TASKS[request["task"]]
            np.savez(request["out"], **task(request["zoo"], device="cuda", **request["options"]))
            answer = ""
        except mpf.InputError as error:
            answer = str(error)
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    serve()
