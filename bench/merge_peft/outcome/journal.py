"""What a run has done so far: one JSON object a line, added to as it goes, and never lost.

Kinds of lines, and what each is found by again:

- run: the first line, and the only one of its kind: the tier, the base model, the machine's part.
- exam: name; its items in their order.
- trained: adapter.
- merged, failed: key of the merge; the later of the two counts.
- scores: key and exam. The key is "base", ``single_key(adapter)``, or that of a merge.
- routed: operator, members and exam (:mod:`..stages.routers`).

Of two lines that are found by the same, the later one counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.atomic import sync_folder
from mergeprobe_fast.io.atomic_file import AtomicFile
from mergeprobe_fast.io.strict_json import Bad

JOURNAL_NAME = "journal.jsonl"
VERSION = 1
_LOCK_NAME = "journal.lock"
_NUMBER = (int, float)
_LATER = ("kernels",)  # facts that the first runs did not note; they go on
_FIELDS: dict[str, dict[str, Any]] = {
    "run": {"version": int, "tier": str, "seed": int, "digest": str, "base": str,
            "base_fingerprint": str, "device": str, "versions": dict},
    "exam": {"exam": str, "domain": str, "tasks": list, "twist": str, "item_keys": list,
             "kinds": list, "refuse": list},
    "trained": {"adapter": str, "exam": str, "recipe": dict, "items": int, "first_loss": _NUMBER,
                "loss": _NUMBER, "rank": int, "parameters": int},
    "merged": {"key": str, "operator": str, "members": list, "rank": int, "parameters": int,
               "seconds": _NUMBER},
    "failed": {"key": str, "operator": str, "members": list, "reason": str},
    "scores": {"key": str, "exam": str, "loglik": list, "option_loglik": list, "correct": list},
    "routed": {"operator": str, "members": list, "exam": str, "loglik": list, "correct": list},
}  # fmt: skip

Line = Mapping[str, Any]


class Journal:
    """The lines of a run, by kind. Made by :func:`read_journal` and :func:`open_journal`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: Line | None = None
        self.exams: dict[str, Line] = {}
        self.trained: dict[str, Line] = {}
        self.merged: dict[str, Line] = {}
        self.failed: dict[str, Line] = {}
        self.scores: dict[tuple[str, str], Line] = {}
        self.routed: dict[tuple[str, tuple[str, ...], str], Line] = {}
        self._file: Any = None

    def append(self, *lines: Line) -> None:
        """Add lines; they are on the disk when this returns.

        Raises:
            InputError: a journal that is only read, a line that lacks something, a full disk.
        """
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
                       for line in lines).encode()  # fmt: skip
        for line in lines:
            try:
                self._take(line)
            except Bad as bad:
                raise InputError(bad.reason, path=self.path, key=bad.key) from None
        if self._file is None:
            raise InputError("is open for reading only", path=self.path)
        try:
            while text:  # a disk that is nearly full takes a part
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = f"cannot be written: {error.strerror or error}"
            raise InputError(reason, path=self.path) from error

    def _take(self, line: Line) -> None:
        """Put a line where it is found; ``Bad`` where it is none."""
        kind = line.get("kind")
        if kind not in _FIELDS:
            raise Bad(f"kind {kind!r} is none of {', '.join(_FIELDS)}")
        for name, wanted in _FIELDS[kind].items():
            if not isinstance(line.get(name), wanted) or isinstance(line[name], bool):
                raise Bad(f"{kind} has {str(line.get(name))[:40]!r} there", name)
        if (kind == "run") != (self.run is None):
            raise Bad("a line of kind run is the first one, and no other")
        if kind == "run":
            self.run = line
        elif kind == "exam":
            _same_length(line, "item_keys", "kinds", "refuse")
            self.exams[line["exam"]] = line
        elif kind == "trained":
            self.trained[line["adapter"]] = line
        elif kind == "scores":
            _same_length(line, "loglik", "option_loglik", "correct")
            self.scores[line["key"], line["exam"]] = line
        elif kind == "routed":
            self.routed[line["operator"], tuple(line["members"]), line["exam"]] = line
        else:
            here, there = self.merged, self.failed
            if kind == "failed":
                here, there = there, here
            here[line["key"]] = line
            there.pop(line["key"], None)

    def _read(self) -> int:
        """Take all lines that are there; returns how many bytes they are."""
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise strict_json.unreadable(self.path, error) from error
        end = raw.rfind(b"\n") + 1  # what comes after it was never finished
        for number, text in enumerate(raw[:end].split(b"\n")[:-1], 1):
            try:
                self._take(strict_json.parse(text, "the line"))
            except Bad as bad:
                key = f"line {number}" if bad.key is None else f"line {number}: {bad.key}"
                raise InputError(bad.reason, path=self.path, key=key) from None
        return end


def _same_length(line: Line, *names: str) -> None:
    lengths = {name: len(line[name]) for name in names}
    if len({*lengths.values()}) > 1:
        told = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise Bad(f"{line['kind']} has lists of different lengths: {told}")


def read_journal(folder: str | os.PathLike[str]) -> Journal:
    """The journal of a run that may be going on; an unfinished last line is left out.

    Raises:
        InputError: none there, or a line that cannot be used, by its number.
    """
    journal = Journal(Path(folder) / JOURNAL_NAME)
    journal._read()
    if journal.run is None:
        raise InputError("is empty", path=journal.path)
    return journal


@contextmanager
def open_journal(folder: str | os.PathLike[str], facts: Line) -> Iterator[Journal]:
    """The journal of a run, to go on with; started where there is none.

    ``facts`` is what the line of kind run says, and what an existing one must say too. As long as
    nothing has been measured the tier may still change: of its adapters those stay trained that it
    has, and :func:`..stages.train.train` checks each.

    Raises:
        InputError: a folder of another run (naming what differs) or in use by another process, a
            line that cannot be used.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror or error}", path=folder) from error
    facts = json.loads(json.dumps({"kind": "run", "version": VERSION, **facts}))
    journal = Journal(folder / JOURNAL_NAME)
    with _locked(folder):
        end = journal._read() if journal.path.exists() else 0
        if journal.run is None:
            journal = _rewritten(journal.path, [facts])
        elif check_run(journal, dict.fromkeys(journal.run) | _asked(journal.run, facts)):
            os.truncate(journal.path, end)
        else:
            journal = _rewritten(journal.path, [facts, *journal.trained.values()])
        with _opened(journal.path) as journal._file:
            yield journal


def check_run(journal: Journal, facts: Line) -> bool:
    """Whether a journal says these facts, too; if not, its tier has changed, which still may be.

    Raises:
        InputError: it is of another run, naming what differs.
    """
    differ = [key for key, now in facts.items() if journal.run.get(key) != now]
    if not differ:
        return True
    if differ == ["digest"] and not journal.scores and not journal.merged:
        return False
    key = next((key for key in differ if key != "digest"), "digest")
    reason = f"is of another run: it has {journal.run.get(key)!r}, this one {facts[key]!r}"
    raise InputError(reason, path=journal.path, key=key)


def _opened(path: Path) -> Any:
    """To add to; without a buffer, which would be written again after an error."""
    return path.open("ab", buffering=0)


def _asked(there: Line, facts: Line) -> dict[str, Any]:
    return {key: fact for key, fact in facts.items() if key in there or key not in _LATER}


def _rewritten(path: Path, lines: list[Line]) -> Journal:
    """A journal of these lines in place of what is there."""
    journal = Journal(path)
    with AtomicFile(path, overwrite=True) as temporary, _opened(temporary) as journal._file:
        journal.append(*lines)
    return journal


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While no other process has this folder; the system lets go of it when a process dies."""
    import fcntl

    with (folder / _LOCK_NAME).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError("another process is running there", path=folder) from None
        sync_folder(folder)
        yield
