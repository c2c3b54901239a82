"""The child process of the sandbox: standard library only, started with ``python -s -S``.

Reads one JSON request from standard input and writes one character a candidate: 1 passed, 0
failed, ! where the limits could not be set and it was not run. Every candidate runs in a fork of
its own that can only write that one byte into a pipe.
"""

import sys

sys.path.pop(0)  # this folder, whose modules are not the standard library's

import ast
import builtins
import ctypes
import json
import math
import os
import resource
import select
import signal

PASSED, FAILED, UNSAFE = b"1", b"0", b"!"
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000


def leave_network():
    """One more wall where the kernel lends it; nothing reaches a socket without an import."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)


def limit(request):
    """Limits of the process that runs one candidate; they cannot be raised again."""
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"], request["cpu_seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"],) * 2)
    for name in ("RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE"):
        resource.setrlimit(getattr(resource, name), (0, 0))


def same(found, expected):
    """Equality, floats to nine digits; a truth value is no number."""
    if isinstance(found, bool) != isinstance(expected, bool):
        return False
    if isinstance(found, float) or isinstance(expected, float):
        numbers = isinstance(found, (int, float)) and isinstance(expected, (int, float))
        return numbers and math.isclose(found, expected, rel_tol=1e-9)
    return bool(found == expected)


def passes(code, tests, allowed):
    """Runs the function on all tests, in the fork."""
    space = {"__builtins__": {name: getattr(builtins, name) for name in allowed}}
    exec(compile(code, "candidate", "exec"), space)
    function = next(value for name, value in space.items() if name != "__builtins__")
    return all(
        same(function(*ast.literal_eval(arguments)), ast.literal_eval(expected))
        for arguments, expected in tests
    )


def in_fork(job, request, pipe):
    """Never returns: the verdict goes into the pipe, and nothing else leaves."""
    verdict = UNSAFE
    try:
        os.dup2(pipe, 0)
        # Descriptors are handed out from below, so this is all of them.
        os.closerange(1, pipe + 1)
        limit(request)
        verdict = FAILED
        if passes(job["code"], job["tests"], request["builtins"]):
            verdict = PASSED
    except BaseException:
        # Whatever a candidate raises, MemoryError and RecursionError too, is a failed test.
        pass
    try:
        os.write(0, verdict)
    finally:
        os._exit(0)


def judge(job, request):
    """Verdict of one candidate; none in time, or no byte at all, is a failed one."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        in_fork(job, request, writing)
    os.close(writing)
    try:
        ready = select.select([reading], [], [], request["wall_seconds"])[0]
        return (os.read(reading, 1) if ready else b"") or FAILED
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)


def main():
    request = json.load(sys.stdin)
    leave_network()
    sys.stdout.write("".join(judge(job, request).decode() for job in request["jobs"]))


if __name__ == "__main__":
    main()
