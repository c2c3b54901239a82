"""The journal of a MERGE-PEFT run: what is in it stays, and what does not belong is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mergeprobe_fast as mpf
from mergeprobe_fast.merge_peft.outcome.journal import JOURNAL_NAME, open_journal, read_journal

FACTS = {
    "tier": "t", "seed": 0, "digest": "d", "base": "b", "base_fingerprint": "f", "device": "cpu",
    "versions": {"torch": "2"}, "only": None,
}  # fmt: skip


def trained(name: str) -> dict[str, Any]:
    return {"kind": "trained", "adapter": name, "exam": "e", "recipe": {"rank": 2}, "items": 3,
            "first_loss": 2.0, "loss": 1.0, "seconds": None, "rank": 2, "parameters": 9,
            "note": "é\u2028\n"}  # fmt: skip


def scored(key: str, exam: str = "e", items: int = 3) -> dict[str, Any]:
    return {"kind": "scores", "key": key, "exam": exam, "loglik": [-0.1] * items,
            "option_loglik": [-1 / 3] * items, "correct": [1] * items, "seconds": 0.1}  # fmt: skip


def merged(key: str) -> dict[str, Any]:
    return {"kind": "merged", "key": key, "operator": "sum", "members": ["a", "b"],
            "weights": [1.0, 1.0], "study": "pairs", "rank": 4, "parameters": 8,
            "seconds": 0.0}  # fmt: skip


def failed(key: str) -> dict[str, Any]:
    return {"kind": "failed", "key": key, "operator": "sum", "members": ["a", "b"],
            "reason": "no"}  # fmt: skip


def error(call: Any) -> mpf.InputError:
    with pytest.raises(mpf.InputError) as caught:
        call()
    return caught.value


def open_once(folder: Path, *lines: dict[str, Any], **facts: Any) -> Any:
    with open_journal(folder, FACTS | facts) as journal:
        journal.append(*lines)
    return journal


def test_what_was_appended_is_found_again(tmp_path):
    open_once(tmp_path / "new" / "run", trained("a"), scored("base"))
    open_once(tmp_path / "new" / "run", scored("sum(a+b)"), merged("sum(a+b)"))
    found = read_journal(tmp_path / "new" / "run")
    assert found.run == {"kind": "run", "version": 1, **FACTS}
    assert found.trained == {"a": trained("a")} and found.merged == {"sum(a+b)": merged("sum(a+b)")}
    assert found.scores == {("base", "e"): scored("base"), ("sum(a+b)", "e"): scored("sum(a+b)")}


def test_of_a_merge_that_failed_and_one_that_was_made_the_later_counts(tmp_path):
    assert open_once(tmp_path, merged("k"), failed("k")).failed == {"k": failed("k")}
    assert read_journal(tmp_path).merged == {}
    open_once(tmp_path, merged("k"))
    found = read_journal(tmp_path)
    assert found.failed == {} and found.merged == {"k": merged("k")}


def test_a_last_line_that_was_never_finished_is_cut_off(tmp_path, rng):
    lines = [trained("a"), scored("base"), scored("single(a)"), merged("k")]
    open_once(tmp_path, *lines)
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in rng.integers(first, len(whole), 20):
        path.write_bytes(whole[:end])
        complete = whole[:end].count(b"\n") - 1
        found = read_journal(tmp_path)
        assert len(found.trained) + len(found.scores) + len(found.merged) == complete
        assert path.read_bytes() == whole[:end]  # reading changes nothing: it may be going on
        open_once(tmp_path, *lines[complete:])
        assert path.read_bytes() == whole
    path.write_bytes(whole[: first - 1])  # not even the first line
    assert "is empty" in str(error(lambda: read_journal(tmp_path)))
    open_once(tmp_path, *lines)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"kind": "other"}', "kind 'other' is none of"),
        (json.dumps(scored("x")).replace("-0.1", "NaN", 1).encode(), "NaN is not JSON"),
        (json.dumps(scored("x") | {"correct": [1]}).encode(), "lists of different lengths"),
        (json.dumps(scored("x") | {"loglik": None}).encode(), "scores has 'None' there"),
        (json.dumps(trained("x") | {"rank": True}).encode(), "trained has 'True' there"),
        (json.dumps({"kind": "run", "version": 1, **FACTS}).encode(), "is the first one"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, reason):
    open_once(tmp_path, trained("a"))
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(trained("b")).encode() + b"\n")
    for call in (lambda: read_journal(tmp_path), lambda: open_once(tmp_path)):
        caught = error(call)
        assert caught.path == str(path) and caught.key.startswith("line 3")
        assert reason in caught.reason


def test_a_line_that_cannot_be_read_back_is_not_written(tmp_path):
    path = tmp_path / JOURNAL_NAME
    with open_journal(tmp_path, FACTS) as journal:
        before = path.read_bytes()
        assert error(lambda: journal.append({"kind": "scores"})).key == "key"
        with pytest.raises(ValueError):
            journal.append(scored("x") | {"loglik": [float("nan")] * 3})
        assert path.read_bytes() == before
    assert "reading only" in str(error(lambda: read_journal(tmp_path).append(trained("a"))))


@pytest.mark.parametrize(
    ("key", "value"),
    [("tier", "other"), ("seed", 1), ("base_fingerprint", "g"), ("device", "cuda"),
     ("versions", {"torch": "3"}), ("only", ["k"])],
)  # fmt: skip
def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path, key, value):
    open_once(tmp_path, trained("a"))
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    caught = error(lambda: open_once(tmp_path, **{key: value, "digest": "other"}))
    assert caught.key == key and "is of another run" in caught.reason
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before


def test_the_tier_may_change_until_something_is_measured(tmp_path):
    exam = {"kind": "exam", "exam": "e", "domain": "d", "tasks": [], "twist": "",
            "item_keys": ["k"], "kinds": ["exact"], "refuse": [-1]}  # fmt: skip
    open_once(tmp_path, exam, trained("a"))
    open_once(tmp_path, digest="changed")
    found = read_journal(tmp_path)
    assert found.run["digest"] == "changed" and found.trained == {"a": trained("a")}
    assert found.exams == {}  # their items may be others now
    open_once(tmp_path, scored("base"), digest="changed")
    assert error(lambda: open_once(tmp_path, digest="again")).key == "digest"


def test_two_at_a_time_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    program = (
        "import sys, time\nfrom mergeprobe_fast.merge_peft.outcome.journal import open_journal\n"
        f"with open_journal(sys.argv[1], {FACTS!r}):\n    print('in', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        cwd=tmp_path,  # not the checkout, whose package would come before the installed one
    ) as process:
        assert process.stdout.readline() == "in\n"
        caught = error(lambda: open_once(tmp_path))
        assert caught.path == str(tmp_path) and "another process" in caught.reason
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            open_once(tmp_path, trained("a"))
            break
        except mpf.InputError:
            time.sleep(0.1)
    assert read_journal(tmp_path).trained


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    caught = error(lambda: open_once(tmp_path / "file"))
    assert caught.path == str(tmp_path / "file") and "cannot be made" in caught.reason


def test_a_full_disk_is_an_error_and_what_was_there_before_stays(tmp_path):
    """In a process of its own, whose files may grow by 40 bytes more; then there is room again."""
    program = (
        "import os, resource, sys\nfrom mergeprobe_fast.errors import InputError\n"
        "from mergeprobe_fast.merge_peft.outcome.journal import open_journal\n"
        f"try:\n    with open_journal(sys.argv[1], {FACTS!r}) as journal:\n"
        "        size = os.stat(journal.path).st_size + 40\n"
        "        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))\n"
        f"        journal.append({scored('base')!r})\n"
        "except InputError as error:\n    sys.exit(f'InputError {error}')\n"
    )
    open_once(tmp_path, trained("a"))
    path = tmp_path / JOURNAL_NAME
    before = path.read_bytes()
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"InputError {path}: cannot be written: File too large")
    assert path.read_bytes() == before + path.read_bytes()[-40:]
    assert read_journal(tmp_path).scores == {}
    open_once(tmp_path, scored("base"))
    assert read_journal(tmp_path).scores == {("base", "e"): scored("base")}
