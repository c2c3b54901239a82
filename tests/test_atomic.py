"""Output folders: whole or absent, whatever happens."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import AtomicFolder, atomic, is_temporary


def fill(folder: Path, text: str, files: int = 3) -> None:
    (folder / "sub").mkdir()
    for number in range(files):
        (folder / "sub" / f"{number}.txt").write_text(text)


def content(folder: Path) -> set[str]:
    texts = [path.read_text() for path in sorted((folder / "sub").iterdir())]
    assert len(texts) == 3
    return set(texts)


def test_the_folder_appears_at_the_end(tmp_path):
    with AtomicFolder(tmp_path / "out") as folder:
        fill(folder, "new")
        assert folder.parent == tmp_path and folder.name.startswith(".out.tmp-")
        assert is_temporary(folder)
        assert not (tmp_path / "out").exists()
    assert content(tmp_path / "out") == {"new"}
    assert os.listdir(tmp_path) == ["out"]
    expected = tmp_path / "plain"
    expected.mkdir()
    assert (tmp_path / "out").stat().st_mode == expected.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), InputError("x")])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_everything_as_it_was(tmp_path, error, existing):
    if existing:
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "old")
    with pytest.raises(type(error)):
        with AtomicFolder(tmp_path / "out", overwrite=existing) as folder:
            fill(folder, "new")
            raise error
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    assert not existing or content(tmp_path / "out") == {"old"}


def test_existing_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: exists; pass --overwrite"):
        with AtomicFolder(tmp_path / "out"):
            raise AssertionError("the block ran")
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="exists and is not a folder"):
            AtomicFolder(tmp_path / "file", overwrite).__enter__()
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_the_whole_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "new")
        assert (tmp_path / "out" / "stale.txt").exists()
    assert os.listdir(tmp_path / "out") == ["sub"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_what_vanished_meanwhile(tmp_path):
    (tmp_path / "out").mkdir()
    with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "new")
        (tmp_path / "out").rmdir()
    assert content(tmp_path / "out") == {"new"}


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="exists"):
        with AtomicFolder(tmp_path / "out") as folder:
            fill(folder, "new")
            (tmp_path / "out").mkdir()
            fill(tmp_path / "out", "other")
    assert content(tmp_path / "out") == {"other"}
    assert os.listdir(tmp_path) == ["out"]


def test_missing_parents_are_made_and_removed_again(tmp_path):
    with AtomicFolder(tmp_path / "a" / "b" / "out") as folder:
        fill(folder, "new")
    assert content(tmp_path / "a" / "b" / "out") == {"new"}
    with pytest.raises(RuntimeError):
        with AtomicFolder(tmp_path / "a" / "c" / "d" / "out"):
            raise RuntimeError
    assert os.listdir(tmp_path / "a") == ["b"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        AtomicFolder(tmp_path / "file" / "out").__enter__()


def test_inputs_are_not_overwritten(tmp_path):
    (tmp_path / "zoo" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "zoo")
    for out, source in (
        ("zoo/a", "zoo/a"),
        ("zoo/a", "link/a"),
        ("link/a", "zoo/a"),
        ("zoo", "zoo/a"),
        ("zoo/../zoo", "zoo/a/adapter_model.safetensors"),
    ):
        with pytest.raises(InputError, match="would overwrite the input"):
            AtomicFolder(tmp_path / out, True, inputs=[tmp_path / source]).__enter__()
    with AtomicFolder(tmp_path / "zoo" / "merged", inputs=[tmp_path / "zoo" / "a"]) as folder:
        fill(folder, "new")


def test_dangerous_places_are_refused(tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work" / "here"
    home.mkdir()
    work.mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for out, reason in {
        "/": "root of the file system",
        "/..": "root of the file system",
        str(home): "home folder",
        ".": "current folder or one above",
        "..": "current folder or one above",
        str(tmp_path / "link" / ".." / "work"): "current folder or one above",
    }.items():
        with pytest.raises(InputError, match=reason):
            AtomicFolder(out, overwrite=True).__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="symbolic link"):
        AtomicFolder(tmp_path / "alias", overwrite=True).__enter__()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match="symbolic link"):
        AtomicFolder(tmp_path / "dangling").__enter__()


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["fsync", "rename", "mkdir", "block"])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        if where == "mkdir":
            patch.setattr(Path, "mkdir", full_disk)
        elif where != "block":
            patch.setattr(os, where, full_disk)
        with pytest.raises(InputError, match="out: cannot be written: No space left"):
            with AtomicFolder(tmp_path / "out") as folder:
                fill(folder, "new")
                if where == "block":
                    full_disk()
    assert os.listdir(tmp_path) == []


def test_the_old_folder_comes_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            full_disk()
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(InputError, match="No space left"):
        with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
            fill(folder, "new")
    assert content(tmp_path / "out") == {"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    """The one window, on file systems that cannot exchange two names."""
    old = tmp_path / ".out.old-0123456789abcdef"
    old.mkdir()
    fill(old, "old")
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        AtomicFolder(tmp_path / "out").__enter__()
    assert content(tmp_path / "out") == {"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_long_name(tmp_path):
    name = "é" * 127  # 254 bytes; 255 is the limit
    with AtomicFolder(tmp_path / name) as folder:
        fill(folder, "new")
        assert is_temporary(folder)
    assert content(tmp_path / name) == {"new"}


def test_temporary_names():
    assert is_temporary("/x/.out.tmp-0123456789abcdef")
    assert is_temporary(".out.old-0123456789abcdef")
    for name in (
        "out",
        ".out",
        "out.tmp-0123456789abcdef",
        ".out.tmp-xyz",
        ".tmp-0123456789abcdef",
    ):
        assert not is_temporary(name)


KILLED = """
import sys
from pathlib import Path
from mergeprobe_fast.io import AtomicFolder, atomic
if sys.argv[2] == "rename":
    atomic._exchange = lambda one, other: False
print("ready", flush=True)
turn = 0
while True:
    turn += 1
    with AtomicFolder(sys.argv[1], overwrite=True) as folder:
        (folder / "sub").mkdir()
        for number in range(3):
            (folder / "sub" / f"{number}.txt").write_text(str(turn))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_killed_at_any_moment_the_folder_is_complete(tmp_path, how):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "0")
    for round_ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(out), how], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.002 + 0.0037 * round_)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not out.exists():
            assert how == "rename"  # the documented window: entering again brings it back
            with pytest.raises(InputError, match="exists"):
                AtomicFolder(out).__enter__()
        assert len(content(out)) == 1  # three files of one turn
        assert all(is_temporary(path) for path in tmp_path.iterdir() if path != out)


def test_an_interruption_where_no_handler_is_in_force_leaves_nothing(tmp_path):
    """Ctrl-C between __enter__ and the block, or before __exit__ has begun: neither is called."""
    folder = AtomicFolder(tmp_path / "made" / "out")
    (folder.__enter__() / "file").write_text("x")
    del folder
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_call(tmp_path, monkeypatch):
    left = [tmp_path / f".{name}.tmp-{'0' * 16}" for name in ("out", "other", "out.x")]
    for folder in left:
        folder.mkdir()
        fill(folder, "half")
    with AtomicFolder(tmp_path / "out") as folder:
        fill(folder, "new")
        assert left[0].exists()  # it may just have been made
    monkeypatch.setattr(atomic, "_NEW", -1.0)
    with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "newer")
        with AtomicFolder(tmp_path / "out", overwrite=True) as second:  # of another live process
            fill(second, "newest")
        assert folder.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([left[1].name, left[2].name, "out"])
    assert content(tmp_path / "out") == {"newer"}


def test_a_killed_process_holds_nothing(tmp_path, monkeypatch):
    program = (
        "import os, sys; from mergeprobe_fast.io import AtomicFolder\n"
        "with AtomicFolder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').touch(); print('in', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], cwd=tmp_path, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        child.stdout.readline()
        [left] = os.listdir(tmp_path)
        monkeypatch.setattr(atomic, "_NEW", -1.0)
        with AtomicFolder(tmp_path / "out") as folder:
            fill(folder, "new")
        assert sorted(os.listdir(tmp_path)) == sorted([left, "out"])
        child.kill()
        child.wait()
    with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "newer")
    assert os.listdir(tmp_path) == ["out"]
