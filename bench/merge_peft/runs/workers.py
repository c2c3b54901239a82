"""Several processes that do units of work side by side, each on one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mergeprobe_fast.errors import BackendError, InputError

from ..model.base import Base, load_base
from ..outcome.journal import Line
from ..tiers.plan import Tier
from .work import Unit, Worker

# What a base model is loaded from, and to which device.
Source = tuple[str | os.PathLike[str] | None, str]
_PATIENCE = 10.0  # seconds that a worker has to tidy up


class Workers:
    """Runs units, ``jobs`` at a time; one job is done in this process.

    A worker takes what shares its preparations first, and leaves what shares another's to that one
    as long as there is something else. Results do not depend on who does what.
    """

    def __init__(self, here: Worker | None, processes: Sequence[_Process]) -> None:
        self._here, self._processes = here, processes

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, list[Line]]]:
        """Every unit with its lines, as they are finished.

        Raises:
            InputError: what a unit raised.
            BackendError: a worker that died.
        """
        waiting = list(units)
        if self._here is not None:
            shares = ""
            while waiting:
                unit = _pick(waiting, shares, set())
                shares = unit.shares
                yield unit, self._here.run(unit)
            return
        busy: dict[Connection, _Process] = {}
        while waiting or busy:
            for process in self._processes:
                if waiting and process.pipe not in busy:
                    process.start(_pick(waiting, process.shares, {
                        other.shares for other in busy.values()
                    }))  # fmt: skip
                    busy[process.pipe] = process
            for pipe in wait(list(busy)):
                process = busy.pop(pipe)
                yield process.unit, process.finish()


def _pick(waiting: list[Unit], mine: str, others: set[str]) -> Unit:
    """Take the best unit out of those that wait."""
    for fits in (
        lambda unit: unit.shares == mine,
        lambda unit: unit.shares not in others,
        lambda unit: True,
    ):
        for at, unit in enumerate(waiting):
            if fits(unit):
                return waiting.pop(at)
    raise ValueError("nothing is waiting")


class _Process:
    """A worker process, and what it is doing."""

    def __init__(self, tier: Tier, out: Path, source: Source) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, tier, out, source), daemon=True
        )
        with _without_interrupts():
            self._process.start()
        theirs.close()
        self.unit: Any = None
        self.shares = ""

    def start(self, unit: Unit) -> None:
        self.unit, self.shares = unit, unit.shares
        try:
            self.pipe.send(unit)
        except OSError:
            raise self._died() from None

    def finish(self) -> list[Line]:
        try:
            what, *found = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if what == "lines":
            return found[0]
        if what == "refused":
            reason, path, key = found
            raise InputError(reason, path=path, key=key)
        raise BackendError(f"{self.unit.what} {self.unit.key}: {found[0]}")

    def _died(self) -> BackendError:
        self._process.join(_PATIENCE)
        reason = f"its worker ended with exit code {self._process.exitcode}"
        return BackendError(f"{self.unit.what} {self.unit.key}: {reason}; out of memory?")

    def terminate(self) -> None:
        """What it has finished stays, what it was at is taken back."""
        self._process.terminate()

    def join(self) -> None:
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def open_workers(
    jobs: int, tier: Tier, out: Path, source: Source, base: Base
) -> Iterator[Workers]:
    """Workers while the block runs; with one job ``base`` itself is used, else each loads its own.

    With more jobs this belongs under ``if __name__ == "__main__":`` in a script, as everything that
    spawns processes does.
    """
    if jobs == 1:
        yield Workers(Worker(tier, out, base), [])
        return
    processes: list[_Process] = []
    try:
        for _ in range(jobs):
            processes.append(_Process(tier, out, source))
        yield Workers(None, processes)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.pipe.close()  # which ends one that has nothing to do
        for process in processes:
            process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start here leave Ctrl-C, which goes to all of them, to their parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection, tier: Tier, out: Path, source: Source) -> None:
    """What a worker process does, until there is no more to do or its parent is gone."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = None
    while True:
        try:
            unit = pipe.recv()
        except (EOFError, OSError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # libraries tidy up undisturbed
            return
        try:
            worker = worker or Worker(tier, out, load_base(*source))
            answer: tuple[Any, ...] = "lines", worker.run(unit)
        except InputError as error:
            answer = "refused", error.reason, error.path, error.key
        except Exception:
            answer = "failed", traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:
            return


def _end_with_parent() -> None:
    """A parent that was killed tells nobody; its folder may have a new owner by now."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
