"""A child process in which Triton interprets its kernels, for the tests of kernels.

The interpreter must be on before triton is imported, and another test may have imported it. With
MERGEPROBE_TRITON_DEVICE=cuda the same tests run compiled, on that device; with "pretended",
interpreted, and a child takes its tensors for a CUDA device's (see pretend_cuda.py).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any

import pytest
import torch

CHOSEN = os.environ.get("MERGEPROBE_TRITON_DEVICE", "cpu")
DEVICE = "cuda" if CHOSEN == "cuda" else "cpu"
if CHOSEN == "pretended" and os.environ.get("TRITON_INTERPRET") == "1":  # a child
    import pretend_cuda

    pretend_cuda.install()
    DEVICE = "cuda"


def moved(x: Any, device: str, seen: dict[int, torch.Tensor] | None = None) -> Any:
    """The same with all tensors on a device; one that occurs twice stays one.

    A view comes with all the memory behind it: what lies around it, and how it is aligned.
    """
    seen = {} if seen is None else seen
    if isinstance(x, torch.Tensor):
        if id(x) not in seen:
            there = x
            if x.device.type not in (device, "meta"):
                whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
                there = whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
            seen[id(x)] = there
        return seen[id(x)]
    if isinstance(x, (list, tuple)):
        parts = [moved(y, device, seen) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if isinstance(x, dict):
        return {key: moved(y, device, seen) for key, y in x.items()}
    return x


def version(name: str) -> tuple[int, ...]:
    """Major and minor number of an installed package."""
    return tuple(int(part) for part in metadata.version(name).split(".")[:2])


# Bytes a thread may spill where the tests count registers: launches are chosen with Triton 3.9.
MOST_SPILLED = 0 if version("triton") >= (3, 9) else 64


def environment() -> dict[str, str]:
    """Of the child. Skips the test where the interpreter cannot run at all."""
    if DEVICE == "cpu" and version("triton") < (3, 9) and version("numpy") >= (2, 4):
        # 3.6 says int() of an array of one number for every bound of a loop. Seen: 3.6 and 3.9.
        pytest.skip("the interpreter of Triton before 3.9 does not work with numpy 2.4 and later")
    threads = {"OMP_NUM_THREADS": "1"} if DEVICE == "cpu" else {}
    return {**os.environ, **threads, "TRITON_INTERPRET": str(int(DEVICE == "cpu"))}


@contextmanager
def child(program: str) -> Iterator[Callable[[Any], Any]]:
    """``ask(request)``: what the handler of a program (a file) answers, or its exception."""
    process = subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )

    def ask(request: Any) -> Any:
        pickle.dump(request, process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with process:
        yield ask
        pickle.dump(None, process.stdin)
        process.stdin.close()


def serve(handle: Callable[[Any], Any]) -> None:
    """In the child: requests with tensors on the device, memory that nobody wrote is NaN."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    torch.empty = poisoned
    for request in iter(partial(pickle.load, sys.stdin.buffer), None):
        try:
            answer = moved(handle(moved(request, DEVICE)), "cpu")
        except Exception as error:
            answer = error
        pickle.dump(answer, channel)
        channel.flush()
