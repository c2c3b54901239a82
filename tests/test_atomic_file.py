"""A file that appears as a whole or not at all."""

from __future__ import annotations

import gc
import os
import stat

import pytest

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import AtomicFile, is_temporary


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end_and_leaves_nothing_else(tmp_path):
    out = tmp_path / "new" / "er" / "a.safetensors"
    with AtomicFile(out) as temporary:
        temporary.write_bytes(b"whole")
        assert is_temporary(temporary) and temporary.parent == out.parent
        assert not out.exists()
    assert out.read_bytes() == b"whole" and names(out.parent) == ["a.safetensors"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), OSError(28, "No space left"), KeyboardInterrupt()]
)
def test_a_failure_inside_leaves_what_was_there(tmp_path, error):
    expected = InputError if isinstance(error, OSError) else type(error)
    for out in (tmp_path / "new" / "a", tmp_path / "b"):
        with pytest.raises(expected):
            with AtomicFile(out) as temporary:
                temporary.write_bytes(b"half")
                raise error
    assert names(tmp_path) == []
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(expected):
        with AtomicFile(tmp_path / "b", overwrite=True) as temporary:
            temporary.write_bytes(b"half")
            raise error
    assert names(tmp_path) == ["b"] and (tmp_path / "b").read_bytes() == b"old"


def test_an_error_about_the_temporary_names_the_output(tmp_path):
    with pytest.raises(InputError) as caught:
        with AtomicFile(tmp_path / "a") as temporary:
            raise InputError("bad", path=temporary, key="k")
    assert (caught.value.path, caught.value.key) == (str(tmp_path / "a"), "k")


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        with AtomicFile(tmp_path / "a"):
            pass
    assert names(tmp_path) == []


def test_a_failed_sync_publishes_nothing(tmp_path, monkeypatch):
    from mergeprobe_fast.io import atomic_file

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_file, "sync", fail)
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(InputError, match="Input/output"):
        with AtomicFile(tmp_path / "a", overwrite=True) as temporary:
            temporary.write_bytes(b"new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        with AtomicFile(tmp_path / "a") as temporary:
            temporary.write_bytes(b"ours")
            (tmp_path / "a").write_bytes(b"theirs")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"theirs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_system_without_links_still_publishes(tmp_path, monkeypatch, overwrite):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with AtomicFile(tmp_path / "a", overwrite) as temporary:
        temporary.write_bytes(b"x")
    assert names(tmp_path) == ["a"]


def test_refusals(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name, overwrite, reason in (
        ("file", False, "exists; pass --overwrite"),
        ("folder", True, "is a folder; name a file"),
        ("link", True, "symbolic link"),
        ("pipe", True, "not a regular file"),
        ("file", True, "would overwrite the input"),
        ("hard", True, "would overwrite the input"),
        ("nul\0", False, "null character"),
        ("file/below", False, "Not a directory"),
        ("file/deep/below", False, "Not a directory"),
    ):
        output = AtomicFile(tmp_path / name, overwrite, inputs=[tmp_path / "file"])
        with pytest.raises(InputError, match=reason):
            with output:
                raise AssertionError("entered")
    assert names(tmp_path) == ["file", "folder", "hard", "link", "pipe"]


def test_an_interruption_where_no_handler_is_in_force_leaves_nothing(tmp_path):
    file = AtomicFile(tmp_path / "made" / "out.txt")
    file.__enter__().write_text("x")
    del file
    gc.collect()
    assert list(tmp_path.iterdir()) == []
