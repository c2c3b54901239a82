"""The command line in one process: wrong use, bad input, the environment, hostile names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from adapters import make_zoo
from command_line import Run, assert_refused, runner, spoil, strict_json
from dense_merge import digests


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    return runner(capsys)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three adapters; the current folder is the one above it."""
    make_zoo(tmp_path / "zoo", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo"


SPOILED = ["truncated", "dora", "config gone", "half a pair", "NaN", "other base", "other shape"]


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("command", ["screen", "merge"])
@pytest.mark.parametrize("mode", [(), ("--json",)], ids=["text", "json"])
def test_bad_input_is_one_line_and_nothing_is_written(run, zoo, command, how, mode):
    expected = spoil(zoo / "adapter_001", how).replace(str(zoo), "zoo")
    before = digests(zoo.parent)
    assert_refused(run(command, "zoo", "--out", "deep/out", *mode), expected)
    assert digests(zoo.parent) == before and os.listdir() == ["zoo"]


USAGE = {
    "no command": ((), "COMMAND"),
    "unknown command": (("plann",), "'plann'"),
    "no --out": (("screen", "zoo"), "--out"),
    "unknown option": (("screen", "zoo", "--out", "o", "--fast"), "--fast"),
    "no adapter": (("merge", "--out", "o"), "ADAPTER"),
    "not there": (("screen", "nowhere", "--out", "o"), "nowhere: cannot be read: No such file"),
    "a file": (("merge", "notes.txt", "--out", "o"), "notes.txt: is a file"),
    "a pickle": (("merge", "model.bin", "--out", "o"), "model.bin: is a pickle"),
    "an empty folder": (("screen", "empty", "--out", "o"), "empty: no adapters in this folder"),
    "given twice": (("screen", "zoo", "zoo/adapter_001", "--out", "o"), "adapter_001: is given tw"),
    "unknown method": (("merge", "zoo", "--method", "tis", "--out", "o"), "no method 'tis'"),
    "rank 0": (("merge", "zoo", "--rank", "0", "--out", "o"), "rank: must be a positive integer"),
    "rank of words": (("merge", "zoo", "--rank", "big", "--out", "o"), "--rank"),
    "cat with rank": (
        ("merge", "zoo", "--method", "cat", "--rank", "4", "--out", "o"), "rank: cat keeps every"
    ),
    "dtype": (("merge", "zoo", "--dtype", "F64", "--out", "o"), "F64"),
    "too few weights": (("merge", "zoo", "--out", "o", "--weights", "1", "2"), "weights: expected"),
    "weights of words": (("merge", "zoo", "--out", "o", "--weights", "1,x,2"), "--weights: "),
    "NaN weight": (("merge", "zoo", "--out", "o", "--weights", "1,nan,2"), "weights: must be fin"),
    "unknown feature": (("screen", "zoo", "--features", "cosine,x", "--out", "o"), "no feature"),
    "feature twice": (
        ("screen", "zoo", "--features", "cosine,cosine", "--out", "o"), "features: a feature is nam"
    ),
    "no feature": (("screen", "zoo", "--features", "", "--out", "o"), "features: "),
    "no threads": (("screen", "zoo", "--threads", "0", "--out", "o"), "threads must be"),
    "too many threads": (("merge", "zoo", "--threads", "99999999999", "--out", "o"), "threads"),
    "screen out exists": (("screen", "zoo", "--out", "empty"), "empty: exists; pass --overwrite"),
    "merge out exists": (("merge", "zoo", "--out", "empty"), "empty: exists; pass --overwrite"),
    "out is a file": (("screen", "zoo", "--out", "notes.txt", "--overwrite"), "is not a folder"),
    "out is under a file": (("merge", "zoo", "--out", "notes.txt/o"), "cannot be written: Not a d"),
    "out is read-only": (("screen", "zoo", "--out", "/proc/o"), "/proc/o: cannot be written"),
    "out is the zoo": (("merge", "zoo", "--out", "zoo", "--overwrite"), "would overwrite the inp"),
    "out is an input": (
        ("screen", "zoo", "--out", "zoo/adapter_002", "--overwrite"), "would overwrite the input"
    ),
    "out is here": (("merge", "zoo", "--out", ".", "--overwrite"), "is the current folder"),
    "out is a long name": (("merge", "zoo", "--out", "x" * 300), "cannot be written: File name"),
    "check nothing": (("check",), "PATH"),
    "check an empty folder": (("check", "empty"), "empty: no adapters in this folder"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "part"), USAGE.values(), ids=USAGE)
def test_wrong_use_is_one_line_and_exit_code_2(run, zoo, words, part):
    Path("empty").mkdir()
    Path("notes.txt").write_text("kept")
    Path("model.bin").write_text("kept")
    before = digests(zoo.parent)
    assert_refused(run(*words), part)
    assert digests(zoo.parent) == before
    assert sorted(os.listdir()) == ["empty", "model.bin", "notes.txt", "zoo"]


@pytest.mark.parametrize("command", ["screen", "merge"])
def test_existing_out_is_refused_before_any_weight_is_read(run, zoo, command, monkeypatch):
    from mergeprobe_fast.engine.chunks import RawFactors

    def read(*_: Any) -> NoReturn:
        raise AssertionError("weights were read")

    monkeypatch.setattr(RawFactors, "read", read)
    Path("out").mkdir()
    assert_refused(run(command, "zoo", "--out", "out"), "out: exists; pass --overwrite")


@pytest.mark.parametrize("command", ["screen", "merge"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [("MERGEPROBE_ISA", "sse9"), ("MERGEPROBE_ISA", "AVX2"), ("MERGEPROBE_THREADS", "many"),
     ("MERGEPROBE_THREADS", "0"), ("MERGEPROBE_THREADS", "-1"), ("MERGEPROBE_THREADS", "1.5"),
     ("MERGEPROBE_THREADS", "²"), ("MERGEPROBE_THREADS", "99999999999999999999")],
)  # fmt: skip
def test_nonsense_in_the_environment_is_refused(run, zoo, command, variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert_refused(run(command, "zoo", "--out", "out"), variable)
    assert os.listdir() == ["zoo"]


def test_isa_and_threads_are_honoured(run, zoo, monkeypatch):
    from mergeprobe_fast import _native

    seen = []
    core = _native.core()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def canonicalise(self, *arguments: Any) -> None:
            seen.append(arguments[-2:])
            core.canonicalise(*arguments)

    monkeypatch.setattr(_native, "_core", Spy())
    monkeypatch.setenv("MERGEPROBE_ISA", "baseline")
    monkeypatch.setenv("MERGEPROBE_THREADS", "3")
    for command in ("screen", "merge"):
        assert run(command, "zoo", "--out", command).code == 0
        assert run(command, "zoo", "--out", command + "2", "--threads", "2").code == 0
    assert set(seen) == {(3, "baseline"), (2, "baseline")}


NAMES = ["ünï-模型-🦜", "[bold red]x[/bold red]", "<script>alert(1)<", "a\x1b[31mred", "b\nline",
         " spaces ", "--weights", "\u202eevil", "'; rm -rf ~", '"', "%s{0}"]  # fmt: skip


def test_hostile_names_are_only_names(run, zoo):
    """As text they neither colour the terminal nor break the table, the page or the JSON."""
    for name in NAMES:
        shutil.copytree(zoo / "adapter_000", zoo / name)
    ran = run("screen", "zoo", "--out", "out")
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out and "\u202e" not in ran.out
    assert "<script>alert" not in Path("out/report.html").read_text("ascii")
    from pyarrow import parquet

    assert set(NAMES) <= set(parquet.read_table("out/adapters.parquet")["name"].to_pylist())
    merged = run("merge", "zoo", "--out", "merged")
    assert merged.code == 0 and "\x1b" not in merged.out
    report = strict_json(run("merge", "zoo", "--out", "again", "--json").out)
    assert set(NAMES) <= {a["name"] for a in report["adapters"]}
    assert "\x1b" not in run("check", "zoo").out


def test_hostile_names_in_errors(run, zoo):
    name = "a\x1b[31mred\nline\u202e"
    shutil.copytree(zoo / "adapter_000", zoo / name)
    spoil(zoo / name, "truncated")
    ran = run("screen", "zoo", "--out", "out")
    assert_refused(ran, "is truncated")
    assert "\x1b" not in ran.err, "a name must not reach the terminal as a control sequence"


@pytest.mark.parametrize("command", ["screen", "merge", "check"])
@pytest.mark.parametrize("mode", [(), ("--json",)], ids=["text", "json"])
def test_a_name_that_is_no_text(run, zoo, command, mode):
    """Linux allows any bytes: a result or one line, but no traceback."""
    shutil.copytree(os.fsencode(zoo / "adapter_000"), os.fsencode(zoo) + b"/latin\xe9")
    out = () if command == "check" else ("--out", "out")
    ran = run(command, "zoo", *out, *mode)
    if ran.code == 2:
        assert_refused(ran)
        assert os.listdir() == ["zoo"]
    else:
        assert ran.code == 0
        ran.out.encode("utf-8", "surrogateescape")
