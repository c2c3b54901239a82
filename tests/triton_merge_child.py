"""P2 in Triton's interpreter, in a child process: the interpreter must be on before triton is
imported, and another test may have imported it. Also the child's own program.

With MERGEPROBE_TRITON_DEVICE=cuda the same tests run compiled on that device instead.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from functools import cache, partial

import torch
from triton_child import CHOSEN, DEVICE, environment, moved

WORST = {True: torch.nan, False: -(2**31)}  # of memory that nobody wrote


def plant(fault, arguments):
    """A launch of the merge kernel with a fault, to show that the checks can fail."""
    kernel, grid, named = arguments
    if fault == "a step of the rank dropped":
        named["p_whole"][:, 1] -= named["RANK_STEP"]
    elif fault == "one tile short":
        grid = (grid[0] - 1,)
    elif fault == "one adapter short":
        named["n"] -= 1
    elif fault == "one draw for all":
        named["p_whole"][:, 5] = named["p_whole"][0, 5]
    elif fault == "one weight off by a thousandth":
        named["p_real"][0, 2] *= 1.001
    return kernel, grid, named


def keys_and_draws(seed, stream, d_in, rows, first, columns):
    """The hash at columns [first, ...) of some rows of a matrix of d_in columns."""
    import triton
    import triton.language as tl

    from mergeprobe_fast.kernels import _delta_tile, _deltas, _merge_call
    from mergeprobe_fast.ops import ElementwiseRule

    @triton.jit
    def kernel(p_keys, p_out, row, column, d_in, ONE_KEY: tl.constexpr, J: tl.constexpr):
        o_i = tl.cast(row, tl.int64) + tl.arange(0, 4)
        o_j = tl.cast(column, tl.int64) + tl.arange(0, J)
        m = (o_i >= 0)[:, None] & (o_j < d_in)[None, :]
        b = draws(p_keys, o_i, o_j, m, d_in, ONE_KEY=ONE_KEY)  # noqa: F821
        o = tl.arange(0, 4)[:, None] * J + tl.arange(0, J)[None, :]
        tl.store(p_out + o, b.to(tl.int64))

    globals().update(draws=_delta_tile.draws, tl=tl)  # where the interpreter looks
    nothing = torch.zeros(1, 256, device=DEVICE)
    deltas = _deltas.DeviceDeltas(nothing, nothing, [(0, 0)], [1.0], max(rows) + 4, d_in)
    rule = ElementwiseRule("random", density=0.5, seed=seed, streams=[stream])
    call = _merge_call.MergeCall(deltas, [1.0], rule, None)
    out = []
    for row in rows:
        out.append(torch.empty((4, columns), dtype=torch.int64, device=DEVICE))
        kernel[(1,)](
            call.whole[0, 5:], out[-1], row, first, d_in,
            ONE_KEY=deltas.size <= 2**32, J=columns,
        )  # fmt: skip
    return [x[:, : d_in - first] for x in out]


def serve():
    """Pickled lists of (name, arguments, options) in, lists of results or exceptions out."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from mergeprobe_fast.errors import InputError
    from mergeprobe_fast.kernels import (
        _configs,
        _merge_call,
        merge_tiles,
        order_statistics,
        pruned_norms,
    )
    from mergeprobe_fast.kernels._deltas import INTERPRETED, DeviceDeltas
    from mergeprobe_fast.ops import NotFinite

    assert INTERPRETED == (CHOSEN != "cuda")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(WORST[made.is_floating_point()])

    torch.empty = poisoned
    arguments, passes, one_pass = _merge_call.MergeCall.arguments, [], order_statistics._pass
    order_statistics._pass = lambda *args: passes.append(None) or one_pass(*args)

    def order(groups, counts):
        passes.clear()
        groups = [[packed(factors) for factors in group] for group in groups]
        return order_statistics.order_statistics(groups, counts), len(passes)

    def packed(factors, **options):
        return DeviceDeltas.of(factors, **options)

    def merged(factors, weights, rule, tensor_core=False, **options):
        if tensor_core:
            factors = packed(factors, tensor_core=True)
        out = merge_tiles.merge_dense(factors, weights, rule, **options)
        return (out, options["base"]) if "base" in options else out

    def found_status(factors, weights, rule):
        status = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        merge_tiles.merge_dense(factors, weights, rule, status=status)
        merge_tiles.raise_for_status(status)

    known = {
        "found_status": found_status,
        "merge_dense": merged, "order_statistics": order, "draws": keys_and_draws,
        "pruned_norms": lambda *args: tuple(pruned_norms.pruned_norms(*args)),
        "merge_sketch": merge_tiles.merge_sketch,
        "magnitude_thresholds": order_statistics.magnitude_thresholds,
        "tensor_thresholds": lambda factors, density: order_statistics.magnitude_thresholds(
            packed(factors, tensor_core=True), density
        ),
    }  # fmt: skip
    for requests in iter(partial(pickle.load, sys.stdin.buffer), None):
        answers = []
        for name, args, options in requests:
            before = dict(vars(_configs))
            for key, value in options.pop("configs", {}).items():
                constant = partial(lambda chosen, size: chosen, value)
                setattr(_configs, key, constant if key == "order_sample" else value)
            fault = options.pop("fault", None)
            _merge_call.MergeCall.arguments = lambda *a, _f=fault, **k: plant(
                _f, arguments(*a, **k)
            )
            try:
                args, options = moved((args, options), DEVICE, {})
                answers.append(moved(known[name](*args, **options), "cpu", {}))
            except NotFinite as error:  # does not survive pickling
                answers.append(InputError(str(error)))
            except Exception as error:
                answers.append(error)
            vars(_configs).update(before)
        pickle.dump(answers, channel)
        channel.flush()


class Interpreter:
    """The functions of P2 in the child: batches of requests, or one by its name."""

    def __init__(self):
        self.child = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment(),
        )  # fmt: skip

    def batch(self, requests):
        pickle.dump(requests, self.child.stdin)
        self.child.stdin.flush()
        return pickle.load(self.child.stdout)

    def __getattr__(self, name):
        def call(*args, **options):
            (answer,) = self.batch([(name, args, options)])
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def close(self):
        with self.child:
            pickle.dump(None, self.child.stdin)
            self.child.stdin.close()


@cache
def interpreter():
    """One child for all test files."""
    child = Interpreter()
    atexit.register(child.close)
    return child


if __name__ == "__main__":
    serve()
