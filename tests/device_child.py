"""A child process in which ``device="cuda"`` is Triton's interpreter (see triton_child.py).

The interpreter must be switched on before triton is imported, and another test may have imported it
in this process. This file is the child's program too.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bases import weights_of
from own_features import OWN
from triton_child import environment

import mergeprobe_fast as mpf
from mergeprobe_fast.features import select
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.merging.source import ZooSource
from mergeprobe_fast.ops.device import open_device
from mergeprobe_fast.screening import screen, steps


@contextmanager
def interpreter(folder: Path) -> Iterator[Callable[..., dict[str, np.ndarray]]]:
    """``call(task, zoo, fault=..., sizes=..., **options)``: arrays by name, or InputError.

    sizes: constants of ``engine.passes``, or "module.NAME" of another module of the engine. Where
    PAIR_BYTES is given, it counts for pairs on the device too.
    """
    out = folder / "found.npz"
    child = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(), cwd=folder,
    )  # fmt: skip

    def call(task, zoo, *, fault=False, sizes=None, **options):
        request = {
            "task": task, "zoo": str(zoo), "fault": fault, "out": str(out), "options": options,
            "sizes": sizes or {},
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


def own(zoo, names, **options) -> dict[str, np.ndarray]:
    """The caller's own features, by name, and which of them the log says the CPU finished."""
    with _Logged() as logged:
        found = features(zoo, features=[OWN[n] for n in names], **options)
    return {**found, "on the CPU": np.array(logged.count)}


class _Logged(logging.Handler):
    """Counts features that were finished on the CPU."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "finished on the CPU" in record.msg

    def __enter__(self) -> _Logged:
        self._log = logging.getLogger("mergeprobe_fast")
        self._log.addHandler(self)
        self._log.setLevel("INFO")
        return self

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)


def progress(zoo, device) -> dict[str, np.ndarray]:
    """What the calls of ``progress`` add up to, and what they should; and cosines of layers."""
    zoo, chosen, seen = mpf.open_zoo(zoo), select("cosine"), []
    found = screen(zoo, "cosine", progress=seen.append, threads=1, device=device)
    return {
        "seen": np.array(seen), "steps": np.array(steps(zoo, chosen, open_device(device))),
        "profile": found.profile,
    }  # fmt: skip


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


def _numbers(table) -> dict[str, np.ndarray]:
    columns = {n: np.asarray(table[n]) for n in table}
    return {n: x for n, x in columns.items() if x.dtype.kind in "biuf"}


def sets(zoo, **options) -> dict[str, np.ndarray]:
    """Every feature of all pairs of adapters as sets."""
    found = mpf.set_features(zoo, size=2, features="all", threads=2, **options)
    return _numbers(found)


def merges(zoo, **options) -> dict[str, np.ndarray]:
    """What merges by their Grams, of singular vectors, of entries and of data do to members."""
    wanted = [
        mpf.Merge((0, 1, 2), weights="minimax"), mpf.Merge((0, 3), "tsv_m"),
        mpf.Merge((1, 2), "ties"), mpf.Merge((0, 2, 3), "regmean"),
    ]  # fmt: skip
    found = mpf.merge_features(zoo, wanted, threads=2, **options)
    return _numbers(found)


def planned(zoo, out, device, **options) -> dict[str, np.ndarray]:
    """A plan's groups, what it predicts, and the updates that applying it writes."""
    found = mpf.plan(zoo, threads=2, device=device, costs={"floor": 0.05}, **options)
    served = found.apply(out, threads=2, device=device, overwrite=True)
    groups = sorted((g.action, *g.members) for g in found.groups)
    values = {"groups": np.array(json.dumps(groups)), "cost": np.array(found.cost)}
    for adapter in mpf.open_zoo(served.path / "adapters"):
        for m in mpf.merge([adapter.path], "cat", [1.0], dtype="F32").modules:
            values[f"{adapter.name}: {m.module.name}"] = m.b @ m.a
    return values


def dense_rows(zoo, device, method, **arguments) -> dict[str, np.ndarray]:
    """What is added to base weights, in two pieces of rows."""
    source = ZooSource(mpf.open_zoo(zoo))
    chosen, request = prepare(source, method, device=open_device(device), arguments=arguments)
    return {
        f"{m.module.name}: {first}": m.rows(first, last).copy()
        for m in chosen.dense(request)
        for first, last in ((0, 5), (5, m.module.d_out))
    }


def added(zoo, base, out, device, own_stream=False, **options) -> dict[str, np.ndarray]:
    """The weights of a merge into base weights; ``own_stream``: the caller's, not the default."""
    with _stream(own_stream):
        mpf.merge_into(zoo, base, out, threads=2, device=device, overwrite=True, **options)
    return weights_of(Path(out))


def _stream(own: bool) -> Any:
    if not own:
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream())


TASKS = {
    "added": added, "adapters": adapters, "dense_rows": dense_rows, "features": features,
    "merged": merged, "merges": merges, "own": own, "planned": planned, "progress": progress,
    "sets": sets,
}  # fmt: skip


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


@contextmanager
def _with(sizes: dict[str, int]) -> Iterator[None]:
    if "PAIR_BYTES" in sizes:
        sizes = {"DEVICE_PAIR_BYTES": sizes["PAIR_BYTES"], **sizes}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            module, _, constant = name.rpartition(".")
            of = import_module(f"mergeprobe_fast.engine.{module or 'passes'}")
            patch.setattr(of, constant, value)
        yield


def serve() -> None:
    """One JSON request a line; "" or an error's text back."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plant = _plant_faults()
    for line in sys.stdin:
        request = json.loads(line)
        plant(request["fault"])
        try:
            task = TASKS[request["task"]]
            with _with(request["sizes"]):
                found = task(request["zoo"], device="cuda", **request["options"])
            np.savez(request["out"], **found)
            answer = ""
        except mpf.InputError as error:
            answer = str(error)
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    serve()
