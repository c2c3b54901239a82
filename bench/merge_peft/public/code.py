"""Problems of MBPP and HumanEval that fit what the sandbox runs: one function, one expression.

Solutions that are a chain of plain assignments before a ``return`` are written as one expression.
What does not fit is said by a reason, never run.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from ..tasks import sandbox
from ..tasks.item import Item


class LeftOut(Exception):
    """Why a row of a public set is no item here."""


def mbpp(row: Mapping[str, Any]) -> Item:
    """A problem of MBPP: {text, code, test_list}; LeftOut where it does not fit."""
    tests = [_test(_parsed(text).body, None) for text in row["test_list"]]
    if not tests:
        raise LeftOut("has no tests")
    names = {name for name, _ in tests}
    if len(names) > 1:
        raise LeftOut("tests call several functions")
    return _item("mbpp", row["code"], names.pop(), row["text"], [pair for _, pair in tests])


def humaneval(row: Mapping[str, Any]) -> Item:
    """A problem of HumanEval: {prompt, canonical_solution, test, entry_point}; or LeftOut."""
    checks = [node for node in _parsed(row["test"]).body if isinstance(node, ast.FunctionDef)]
    if len(checks) != 1:
        raise LeftOut("its check is not one function")
    tests = [_test([n], "candidate")[1] for n in checks[0].body if not _always_true(n)]
    if not tests:
        raise LeftOut("has no tests")
    source = row["prompt"] + row["canonical_solution"]
    text = ast.get_docstring(_function(_parsed(source), row["entry_point"])) or ""
    return _item("humaneval", source, row["entry_point"], text, tests)


def passing(items: Sequence[Item]) -> list[bool]:
    """Which of the targets pass their own tests in the sandbox: others are no fair questions."""
    return sandbox.run_many([(f"{i.prompt}{i.target}", i.check["tests"]) for i in items])


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LeftOut("does not parse") from error


def _always_true(node: ast.stmt) -> bool:
    """``assert True, "..."``, of which HumanEval has many."""
    return (
        isinstance(node, ast.Assert)
        and isinstance(node.test, ast.Constant)
        and (node.test.value is True)
    )


def _test(body: Sequence[ast.stmt], name: str | None) -> tuple[str, tuple[str, str]]:
    """``assert f(literals) == literal``, or without ``==`` for True, or with ``not`` for False."""
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise LeftOut("a test is no assertion")
    call, expected = body[0].test, "True"
    if isinstance(call, ast.UnaryOp) and isinstance(call.op, ast.Not):
        call, expected = call.operand, "False"
    elif isinstance(call, ast.Compare) and isinstance(call.ops[0], ast.Eq | ast.Is):
        if len(call.ops) > 1:
            raise LeftOut("a test compares more than two things")
        call, expected = call.left, _literal(call.comparators[0])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise LeftOut("a test is no comparison of a call")
    if name is not None and call.func.id != name:
        raise LeftOut("a test calls another function")
    arguments = ", ".join(_literal(argument) for argument in call.args)
    return call.func.id, (f"({arguments}{',' * (len(call.args) == 1)})", expected)


def _literal(node: ast.expr) -> str:
    try:
        return repr(ast.literal_eval(node))
    except (ValueError, TypeError, RecursionError) as error:
        raise LeftOut("a test is not made of literals") from error


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if [node.name for node in found] != [name]:
        raise LeftOut("is not one function")
    return found[0]


class _Put(ast.NodeTransformer):
    """Expressions in the places of the names they were given."""

    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self._values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._values.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def _expression(function: ast.FunctionDef) -> str:
    """What the function returns, on one line."""
    body, values = list(function.body), {}
    if ast.get_docstring(function) is not None:
        body = body[1:]
    for statement in body[:-1]:
        plain = isinstance(statement, ast.Assign) and len(statement.targets) == 1
        if not plain or not isinstance(statement.targets[0], ast.Name):
            raise LeftOut("its solution is more than one expression")
        values = {**values, statement.targets[0].id: _Put(values).visit(statement.value)}
    if not body or not isinstance(body[-1], ast.Return) or body[-1].value is None:
        raise LeftOut("its solution is more than one expression")
    return ast.unparse(_Put(values).visit(body[-1].value)).replace("\n", " ")


def _item(task: str, source: str, name: str, text: str, tests: list[tuple[str, str]]) -> Item:
    tree = _parsed(source)
    if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body) and (
        task == "mbpp"  # HumanEval imports the names of its annotations
    ):
        raise LeftOut("its solution imports")
    function = _function(tree, name)
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    said = " ".join(text.split()).replace("\\", "\\\\").replace('"""', "'''")
    prompt = f'def {name}({ast.unparse(function.args)}):\n    """{said}"""\n    return'
    target = f" {_expression(function)}\n"
    refused = sandbox.refusal_reason(prompt + target)
    if refused:
        raise LeftOut(f"the sandbox refuses its solution: {refused}")
    return Item(
        domain="code", task=task, key=said, prompt=prompt, target=target, kind="code",
        check={"tests": tuple(tests)},
    )  # fmt: skip
