"""The sandbox: right functions pass, and nothing a model writes gets out or holds on."""

from __future__ import annotations

import os
import signal
import subprocess
import warnings
from itertools import permutations
from pathlib import Path

import pytest

from mergeprobe_fast.errors import BackendError
from mergeprobe_fast.merge_peft.tasks import sandbox
from mergeprobe_fast.merge_peft.tasks.sandbox import refusal_reason, run, run_many

ANY_TEST = [("([1, 2],)", "2")]


def function(body: str) -> str:
    return f"def f(xs):\n    return {body}\n"


@pytest.mark.parametrize(
    ("body", "arguments", "expected"),
    [
        ("max(xs)", "([3, 9, 4],)", "9"),
        ("sum(xs) / len(xs)", "([1, 2],)", "1.5"),
        ("sum(x / 10 for x in xs)", "([1, 2, 3, 4, 5],)", "1.5"),
        ("[x for x in xs if x > 2 and not x % 2]", "([1, 4, 3, 6],)", "[4, 6]"),
        ("{v: k for k, v in xs.items()}", "({'a': 1},)", "{1: 'a'}"),
        ("sorted(xs, key=xs.get)", "({'b': 2, 'a': 1},)", "['a', 'b']"),
        ("sorted(xs, key=lambda x: -x)", "([1, 3, 2],)", "[3, 2, 1]"),
        ("set(xs)", "('aab',)", "{'a', 'b'}"),
        ("list(map(str.upper, xs.split()))", "('a b',)", "['A', 'B']"),
        ("1 if xs < 2 else xs * f(xs - 1)", "(5,)", "120"),
        ("f'{xs}!'", "('hey',)", "'hey!'"),
        ("xs[::-1]", "([1, 2],)", "[2, 1]"),
        ("xs.pop()", "([1, 2],)", "2"),
        ("max(xs, default=None)", "([],)", "None"),
    ],
)
def test_a_right_function_passes(body: str, arguments: str, expected: str) -> None:
    assert refusal_reason(function(body)) is None
    assert run(function(body), [(arguments, expected)])


def test_a_wrong_result_fails_and_one_wrong_test_is_enough() -> None:
    code = function("max(xs)")
    assert not run(code, [("([1, 2],)", "1")])
    assert not run(code, [("([1, 2],)", "2"), ("([3],)", "4")])
    assert not run(function("sum(xs) + 0.001"), [("([1, 2],)", "3")])
    assert not run(function("str(xs)"), [("(1.5,)", "1.5")])
    assert not run(function("len(xs)"), [("([1],)", "True")])
    assert not run(function("len(xs) == 1"), [("([1],)", "1")])


def test_every_test_gets_fresh_arguments() -> None:
    assert run(function("xs.pop()"), [("([1, 2],)", "2"), ("([1, 2],)", "2")])


def test_a_candidate_cannot_change_the_next_one() -> None:
    first = "def max(xs):\n    return 7\n"
    second = function("max(xs)")
    assert run_many([(first, [("([1],)", "7")]), (second, ANY_TEST)]) == [True, True]


REFUSED = {
    "dunder attribute": "().__class__",
    "subclasses": "[c for c in ().__class__.__base__.__subclasses__()]",
    "open": "open('/etc/passwd').read()",
    "import call": "__import__('os').system('true')",
    "print": "print('a' * 10)",
    "exit": "exit()",
    "quit": "quit(0)",
    "eval": "eval('1')",
    "exec": "exec('1')",
    "getattr": "getattr(xs, 'append')",
    "globals": "globals()",
    "vars": "vars()",
    "type": "type(xs)",
    "input": "input()",
    "breakpoint": "breakpoint()",
    "format with attributes": "'{0.__class__}'.format(xs)",
    "format specification": "f'{1:1000000000}'",
    "yield": "(yield 1)",
    "yield from": "(yield from xs)",
    "walrus": "(y := 3)",
    "await": "await xs",
    "shift": "1 << 10 ** 9",
    "huge exponent": "9 ** 1000000000",
    "bytes": "b'a'",
    "complex": "1j",
    "ellipsis": "...",
    "generator frame": "(x for x in xs).gi_frame",
    "builtins by name": "__builtins__",
    "dunder argument": "(lambda __x: __x)(1)",
    "deep nesting": "-" * 300 + "1",
    "deep brackets": "[" * 150 + "]" * 150,
    "long": "'" + "a" * 2000 + "'",
    "null byte": "'\0'",
    "surrogate": "'\ud800'",
    "unclosed": "max(xs",
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_the_allow_list_refuses(body: str) -> None:
    assert refusal_reason(function(body)) is not None
    assert not run(function(body), ANY_TEST)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "x = 1\n",
        "import os\n",
        "import os\ndef f(xs):\n    return 2\n",
        "def f(xs):\n    import os\n    return 2\n",
        "def f(xs):\n    while True: pass\n",
        "def f(xs):\n    for x in xs: pass\n    return 2\n",
        "def f(xs):\n    y = 2\n    return y\n",
        "def f(xs):\n    'a'\n    'b'\n    return 2\n",
        "def f(xs):\n    pass\n",
        "def f(xs):\n    return\n",
        "def f(xs): return 2\ndef g(xs): return 2\n",
        "@f\ndef f(xs):\n    return 2\n",
        "def f(xs) -> open('x'):\n    return 2\n",
        "def f(xs: open('x')):\n    return 2\n",
        "def f(xs=open('x')):\n    return 2\n",
        "async def f(xs):\n    return 2\n",
        "class f:\n    pass\n",
        "def __getattr__(xs):\n    return 2\n",
        "def f(xs):\n    global y\n    return 2\n",
        "def f(xs):\n    return 2; import os\n",
    ],
)
def test_only_one_function_with_one_return_may_run(code: str) -> None:
    assert refusal_reason(code) is not None
    assert not run(code, ANY_TEST)


def test_a_docstring_and_a_comment_may_stand_before_the_return() -> None:
    code = 'def f(xs):\n    """Say "no"."""\n    # why not\n    return max(xs)  # done\n'
    assert run(code, ANY_TEST)


def test_odd_escapes_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(function(r"'\d'"), [("(1,)", r"'\\d'")])


BOMBS = {
    "list": "[0] * 10 ** 12",
    "string": "'a' * 10 ** 12",
    "range": "list(range(10 ** 12))",
    "power tower": "9 ** 9 ** 9",
    "digits of a huge int": "str(9 ** 64 ** 3)",
    "infinite iterator": "[x for x in iter(int, 1)]",
    "long loop": "sum(1 for a in range(10 ** 9) for b in range(10 ** 9))",
    "recursion": "f(xs)",
    "recursion in two": "f(xs) + f(xs)",
    "padding": "'a'.zfill(10 ** 12)",
    "percent width": "'%1000000000000d' % 1",
    "nested doubling": "max(map(len, [[xs] * 10 ** 5 * 10 ** 5]))",
    "lambda loop": "(lambda g: g(g))(lambda g: g(g))",
}


def test_bombs_fail_and_the_candidates_between_them_do_not() -> None:
    good = (function("max(xs)"), ANY_TEST)
    bombs = [(function(body), ANY_TEST) for body in BOMBS.values()]
    assert all(refusal_reason(code) is None for code, _ in bombs)
    verdicts = run_many([one for bomb in bombs for one in (bomb, good)])
    assert dict(zip(BOMBS, verdicts[::2], strict=True)) == dict.fromkeys(BOMBS, False)
    assert all(verdicts[1::2])


WITHOUT_ALLOW_LIST = {
    "loop": "def f(xs):\n    while True:\n        pass\n",
    "swallowing loop": (
        "def f(xs):\n    while True:\n        try:\n            f(xs)\n        except:\n"
        "            pass\n"
    ),
    "import": "import os\ndef f(xs):\n    return os.getpid() and 2\n",
    "open": "def f(xs):\n    return open('/dev/null') and 2\n",
    "descriptors": (
        "def f(xs):\n    c = [c for c in ().__class__.__base__.__subclasses__()"
        " if c.__name__ == '_wrap_close'][0]\n    o = c.__init__.__globals__\n"
        "    return o['open']('/dev/null', 0) >= 0 and 2\n"
    ),
    "processes": (
        "def f(xs):\n    c = [c for c in ().__class__.__base__.__subclasses__()"
        " if c.__name__ == '_wrap_close'][0]\n    o = c.__init__.__globals__\n"
        "    return o['execv']('/bin/true', ['true'])\n"
    ),
    "exit": "def f(xs):\n    raise BaseException\n",
    "memory": "def f(xs):\n    return len(bytearray(1 << 30)) and 2\n",
}


@pytest.mark.parametrize("code", WITHOUT_ALLOW_LIST.values(), ids=WITHOUT_ALLOW_LIST.keys())
def test_the_child_process_holds_without_the_allow_list(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "refusal_reason", lambda code: None)
    good = (function("max(xs)"), ANY_TEST)
    assert run_many([good, (code, ANY_TEST), good]) == [True, False, True]


def test_no_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen

    def recorded(*arguments: object, **options: object) -> subprocess.Popen:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(sandbox.subprocess, "Popen", recorded)
    assert run_many([(function("f(xs) + f(xs)"), ANY_TEST)]) == [False]
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)
    # A worker that hangs is killed with everything it started.
    hanging = "import os, time\nif os.fork() or 1: time.sleep(600)\n"
    monkeypatch.setattr(sandbox, "_START_SECONDS", 1)
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0)
    monkeypatch.setattr(
        sandbox.subprocess,
        "Popen",
        lambda command, **options: recorded([*command[:-1], "-c", hanging], **options),
    )
    with pytest.raises(BackendError, match="did not answer"):
        run(function("2"), ANY_TEST)
    # run() came back because its pipe ended, and the grandchild held the other end too.
    assert started[-1].returncode == -signal.SIGKILL


def test_a_child_that_fails_is_an_error_and_not_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.setattr(sandbox, "_WORKER", os.path.join(tmp_path, "absent.py"))
    with pytest.raises(BackendError, match="sandbox process failed"):
        run(function("2"), ANY_TEST)


def test_limits_that_cannot_be_set_are_an_error_and_not_a_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "MEMORY_BYTES", "plenty")
    with pytest.raises(BackendError, match="cannot limit"):
        run(function("2"), ANY_TEST)


def test_a_candidate_without_tests_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tests"):
        run(function("2"), [])


def test_no_candidates_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.subprocess, "Popen", None)
    assert run_many([]) == []
    assert run_many([("import os", ANY_TEST)]) == [False]


def test_sets_come_in_one_order() -> None:
    """Else the same answer would pass in one run and fail in the next."""
    once = function("''.join({*xs})")
    words = ["".join(letters) for letters in permutations("abc")]
    (found,) = [word for word in words if run(once, [("('abc',)", repr(word))])]
    test = [("('abc',)", repr(found))]
    assert all(run_many([(once, test)] * 3)) and all(run(once, test) for _ in range(5))


def test_nothing_of_this_environment_gets_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither modules that stand in for the standard library's, nor settings of Python."""
    for folder in (tmp_path / "path", tmp_path / "worker"):
        folder.mkdir()
        for name in ("ast", "json", "sitecustomize", "usercustomize"):
            (folder / f"{name}.py").write_text("raise SystemExit(3)\n")
    worker = tmp_path / "worker" / "worker.py"
    worker.write_text(Path(sandbox._WORKER).read_text())
    monkeypatch.setattr(sandbox, "_WORKER", worker)
    monkeypatch.chdir(tmp_path / "path")
    for name, value in (
        ("PYTHONPATH", str(tmp_path / "path")), ("PYTHONSTARTUP", str(worker)),
        ("PYTHONHOME", str(tmp_path)), ("PYTHONHASHSEED", "7"), ("PYTHONINSPECT", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert run(function("max(xs)"), ANY_TEST)
    start = worker.read_text().partition("import ast")[0]
    worker.write_text(
        f"{start}import os\n"
        "told = {name: text for name, text in os.environ.items() if name != 'LC_CTYPE'}\n"
        f"ours = [path for path in sys.path if not path or path.startswith({str(tmp_path)!r})]\n"
        "sites = sys.flags.no_site, sys.flags.no_user_site, 'site' in sys.modules\n"
        "sys.exit(repr((told, ours, sites)))\n"
    )
    with pytest.raises(BackendError) as caught:
        run(function("max(xs)"), ANY_TEST)
    told = ({"PYTHONHASHSEED": "0"}, [], (1, 1, False))  # Python itself may set LC_CTYPE
    assert str(caught.value) == f"the sandbox process failed: {told!r}"
