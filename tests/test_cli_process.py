"""The command line as a process: exit codes, pipes, terminals, encodings, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapters import make_adapter, make_zoo

COMMAND = [sys.executable, "-m", "mergeprobe_fast"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell and terminals")


def environment(**changes: str | None) -> dict[str, str]:
    """As a user has it: buffered, UTF-8, none of our own variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MERGEPROBE_", "PYTHON"))}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        env.pop(name, None)
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        if name in os.environ:
            env[name] = os.environ[name]
    env |= {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
    for name, value in changes.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def spawn(*words: str, cwd: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=cwd, env=environment(**changes), capture_output=True, text=True,
        encoding="utf-8", errors="surrogateescape", timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    make_zoo(tmp_path / "zoo", 3)
    return tmp_path / "zoo"


def test_exit_codes_and_streams(tmp_path, zoo):
    done = spawn("merge", "zoo", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    done = spawn("screen", "zoo", "--out", "screened", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["pairs"] == 3
    done = spawn("merge", "zoo", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    out = tmp_path / "out"
    assert done.stderr == f"mergeprobe-fast: {out}: exists; pass --overwrite to replace it\n"
    weights = zoo / "adapter_002" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    done = spawn("check", "zoo", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "") and "is truncated" in done.stdout
    done = spawn("screen", "zoo", "--out", "other", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"mergeprobe-fast: zoo/adapter_002/adapter_model\.safetensors: is truncated: .*\n",
        done.stderr,
    )
    assert sorted(os.listdir(tmp_path)) == ["out", "screened", "zoo"]
    done = spawn("screen", "zoo", "--out", "other", cwd=tmp_path, MERGEPROBE_ISA="none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reader", "unbuffered"),
    [
        ("check zoo --json", "head -1", None),
        ("check zoo --json", "true", None),
        ("check zoo --json", "true", "1"),
        ("check zoo", "true", None),
        ("merge zoo --out out", "true", None),
        ("screen zoo --out out --json", "true", None),
        ("--help", "true", None),
    ],
)
def test_a_reader_that_goes_away_is_no_traceback(tmp_path, zoo, words, reader, unbuffered):
    """As in ``| head -1``: silence, and no exit code that means something else."""
    line = " ".join(f"'{part}'" for part in COMMAND) + f" {words} | {reader} >/dev/null"
    done = subprocess.run(
        ["bash", "-c", line + '; echo "${PIPESTATUS[0]}"'], cwd=tmp_path, timeout=60,
        env=environment(PYTHONUNBUFFERED=unbuffered), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    # 141 is what the shell says of SIGPIPE; 1 would be a failed check, 120 Python's shutdown.
    assert int(done.stdout) in (0, 141)


def on_a_terminal(*words: str, cwd: Path, **changes: str | None) -> tuple[int, str]:
    """Exit code and everything a terminal of 100 columns was sent."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *words], cwd=cwd, env=environment(**changes), stdin=follower, stdout=follower,
        stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([leader], [], [], 1)[0]:
            continue
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(leader)
    return process.wait(10), shown.decode("utf-8")


@pytest.mark.parametrize("command", ["screen", "merge"])
def test_a_terminal_gets_a_progress_bar_and_colours(tmp_path, zoo, command):
    code, shown = on_a_terminal(command, "zoo", "--out", "out", cwd=tmp_path)
    assert code == 0
    assert "modules" in shown and "0/4" in shown, "no progress bar"
    assert re.search(r"\x1b\[[0-9;]*m", shown), "no colours"
    after = shown[shown.rindex("/4") :]
    assert "\x1b[2K" in after or "\x1b[1A" in after or "\r" in after, "the bar stays behind"
    assert "\x1b[?25h" in shown, "the cursor stays hidden"
    assert "adapter_002" in shown


@pytest.mark.parametrize(
    ("words", "changes"),
    [(("--json",), {}), ((), {"TERM": "dumb"})],
    ids=["json", "dumb terminal"],
)
def test_no_progress_bar_where_it_would_spoil(tmp_path, zoo, words, changes):
    code, shown = on_a_terminal("screen", "zoo", "--out", "out", *words, cwd=tmp_path, **changes)
    assert code == 0 and "\x1b" not in shown and "0/4" not in shown
    if words:
        assert json.loads(shown)["pairs"] == 3


def test_no_color_is_respected(tmp_path, zoo):
    code, shown = on_a_terminal("check", "zoo", cwd=tmp_path, NO_COLOR="1")
    assert code == 0 and not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)


@pytest.mark.parametrize("words", ["check zoo", "screen zoo --out out"])
@pytest.mark.parametrize("mode", ["", "--json"], ids=["text", "json"])
def test_an_ascii_terminal_can_show_any_name(tmp_path, zoo, words, mode):
    shutil.copytree(zoo / "adapter_000", zoo / "模型-ü")
    done = spawn(*words.split(), *mode.split(), cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    if mode:
        assert "模型-ü" in json.dumps(json.loads(done.stdout), ensure_ascii=False)
    else:
        assert "\\u6a21" in done.stdout


@pytest.mark.parametrize("command", ["screen", "merge"])
def test_interrupted_it_says_so_and_leaves_nothing_half_written(tmp_path, command):
    make_zoo(tmp_path / "zoo", 12, modules={f"layers.{i}.m": (700, 700, 16) for i in range(24)})
    process = subprocess.Popen(
        [*COMMAND, command, "zoo", "--out", "out"], cwd=tmp_path, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("this machine was done before it could be interrupted")
    if process.returncode == -signal.SIGINT:
        pytest.skip("interrupted before Python had set up its handlers")
    assert process.returncode == 130
    assert err == "mergeprobe-fast: interrupted; nothing half-written is left\n"
    left = {*os.listdir(tmp_path)} - {"zoo"}
    if left:  # it came after the last file was in place, and before the table was shown
        assert left == {"out"} and len(os.listdir(tmp_path / "out")) > 1
    else:
        assert out == ""


def test_a_version_and_a_name(tmp_path):
    import mergeprobe_fast

    done = spawn("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"mergeprobe-fast {mergeprobe_fast.__version__}\n"
    make_adapter(tmp_path / "a")
    done = spawn("check", ".", cwd=tmp_path / "a")
    assert done.returncode == 0
