"""Runs functions that a model wrote, away from this process.

Two walls. First an allow-list over the syntax tree: one function, a single returned expression,
listed builtins and methods, no imports, no other attribute, no loop statement. Then a child
process (``python -s -S``, own environment and session, no inherited files) that forks once a
candidate, under limits on CPU time, memory, processes and files; where the kernel lends one it
moves into a network namespace of its own. POSIX only.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergeprobe_fast.errors import BackendError

Test = tuple[str, str]

MAX_CHARACTERS, MAX_DEPTH, MAX_EXPONENT = 1000, 40, 64
CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 1, 10, 256 << 20
_START_SECONDS = 30
_WORKER = Path(__file__).with_name("sandbox_worker.py")

BUILTINS = frozenset(
    "abs all any bin bool chr dict divmod enumerate filter float frozenset hex int iter len list "
    "map max min next oct ord pow range repr reversed round set sorted str sum tuple zip".split()
)
METHODS = frozenset(
    "capitalize casefold center copy count difference endswith find get index intersection "
    "isalnum isalpha isdecimal isdigit isdisjoint islower isnumeric isspace issubset issuperset "
    "isupper items join keys ljust lower lstrip partition pop removeprefix removesuffix replace "
    "rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase "
    "symmetric_difference title union upper values zfill bit_length".split()
)
_NODES = (
    ast.Module, ast.FunctionDef, ast.Return, ast.Expr, ast.arguments, ast.arg,
    ast.Constant, ast.Name, ast.Load, ast.Store, ast.Attribute, ast.Call, ast.keyword, ast.Starred,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.BitAnd,
    ast.BitOr, ast.BitXor, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.Invert, ast.BoolOp,
    ast.And, ast.Or, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is,
    ast.IsNot, ast.In, ast.NotIn, ast.IfExp, ast.Subscript, ast.Slice, ast.List, ast.Tuple,
    ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
    ast.comprehension, ast.Lambda, ast.JoinedStr, ast.FormattedValue,
)  # fmt: skip


def _nodes(root: ast.AST) -> Iterator[tuple[ast.AST, int]]:
    """Every node with its depth, without recursion: hostile trees are deep."""
    pending = [(root, 0)]
    while pending:
        node, depth = pending.pop()
        yield node, depth
        pending += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _node_refusal(node: ast.AST, names: frozenset[str]) -> str | None:
    if not isinstance(node, _NODES):
        return f"{type(node).__name__} is not allowed"
    if isinstance(node, ast.Name) and node.id not in names:
        return f"the name {node.id} is not allowed"
    if isinstance(node, ast.Name | ast.arg):
        name = node.id if isinstance(node, ast.Name) else node.arg
        if name.startswith("__"):
            return f"the name {name} is not allowed"
    if isinstance(node, ast.Attribute) and node.attr not in METHODS:
        return f"the attribute {node.attr} is not allowed"
    if isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float | None):
        return "a constant of this type is not allowed"
    if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
        return "a format specification is not allowed"
    if isinstance(node, ast.comprehension) and node.is_async:
        return "async is not allowed"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = node.right
        if isinstance(power, ast.Constant) and isinstance(power.value, int | float) and (
            abs(power.value) > MAX_EXPONENT
        ):  # fmt: skip
            return f"an exponent above {MAX_EXPONENT} is not allowed"
    return None


def refusal_reason(code: str) -> str | None:
    """Why the allow-list refuses this code, or None where it may run.

    Allowed is one function of plain arguments: a docstring at most, then ``return`` of one
    expression over its arguments, comprehension variables, ``BUILTINS``, itself, and ``METHODS``.
    """
    if len(code) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    try:
        with warnings.catch_warnings():
            # Odd escapes in a string are the model's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"does not parse: {type(error).__name__}"
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return "not exactly one function"
    function = tree.body[0]
    *before, last = function.body
    if not isinstance(last, ast.Return) or last.value is None:
        return "does not return an expression"
    documented = before and ast.get_docstring(function, clean=False) is not None
    if len(before) > bool(documented):
        return "more than a docstring and one return"
    if function.decorator_list or function.returns or getattr(function, "type_params", None):
        return "decorators, annotations and type parameters are not allowed"
    bound = {function.name}
    for node, depth in _nodes(tree):
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    if function.name.startswith("__"):
        return f"the name {function.name} is not allowed"
    names = frozenset(bound) | BUILTINS
    reasons = (_node_refusal(node, names) for node, _ in _nodes(tree))
    return next((reason for reason in reasons if reason), None)


def _run_worker(jobs: Sequence[dict[str, object]]) -> list[bool]:
    request = json.dumps({
        "cpu_seconds": CPU_SECONDS,
        "wall_seconds": WALL_SECONDS,
        "memory_bytes": MEMORY_BYTES,
        "builtins": sorted(BUILTINS),
        "jobs": list(jobs),
    })  # fmt: skip
    worker = subprocess.Popen(
        [sys.executable, "-s", "-S", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0"},  # sets come in one order; -I would not look at it
        cwd="/",
        close_fds=True,
        start_new_session=True,
        text=True,
    )
    try:
        limit = _START_SECONDS + len(jobs) * WALL_SECONDS
        verdicts, errors = worker.communicate(request, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"the sandbox process did not answer in {limit} s") from error
    finally:
        # A worker that has ended has reaped its forks, and its number may be another's by now.
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()
    if "!" in verdicts:
        raise BackendError("the sandbox cannot limit processor time, memory or files here")
    if worker.returncode != 0 or len(verdicts) != len(jobs) or set(verdicts) - {"0", "1"}:
        raise BackendError(f"the sandbox process failed: {errors.strip()[-200:] or 'no message'}")
    return [verdict == "1" for verdict in verdicts]


def run_many(candidates: Sequence[tuple[str, Sequence[Test]]]) -> list[bool]:
    """Whether each candidate passes all of its tests. One child process runs them all.

    A candidate is the source of one function and its tests: pairs of the arguments, a Python
    literal of a tuple, and the expected result, a literal too. Results are compared with ``==``,
    floats to nine digits; True is not 1. What is refused, raises, loops, or asks for too much
    memory is False: a candidate has CPU_SECONDS of processor time and MEMORY_BYTES of address
    space for its tests.

    Raises ``BackendError`` where the platform cannot do this, or the child process itself fails,
    and ``ValueError`` for a candidate without tests.
    """
    if os.name != "posix":
        raise BackendError("the sandbox needs fork and resource limits, which only POSIX has")
    for code, tests in candidates:
        if not tests:
            raise ValueError(f"no tests for {code!r}")
    allowed = [refusal_reason(code) is None for code, _ in candidates]
    jobs = [
        {"code": code, "tests": [list(test) for test in tests]}
        for (code, tests), fine in zip(candidates, allowed, strict=True)
        if fine
    ]
    verdicts = iter(_run_worker(jobs) if jobs else [])
    return [fine and next(verdicts) for fine in allowed]


def run(code: str, tests: Sequence[Test]) -> bool:
    """``run_many`` of one candidate."""
    return run_many([(code, tests)])[0]
