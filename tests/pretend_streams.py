"""Streams and events of the device of pretend_cuda.py: who may read what, and when.

Work is done at once, in the order of the host. What real streams leave open is checked instead:
every stream knows how far it has waited for the others, every piece of memory when it was written
and read, and by which stream.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

_plain = torch._C.DisableTorchFunctionSubclass
_numbers = itertools.count()
_lock = threading.RLock()  # threads share streams
_host: dict[int, int] = {}  # how far the host has waited for each stream
_all: weakref.WeakSet[Stream] = weakref.WeakSet()
on_wait: list[Callable[[str], None]] = []  # called when the host waits, and for what


def _locked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            return function(*args, **kwargs)

    return alone


class Copy:
    """To the host: ``to`` is garbage until the host waits for what the stream did up to here."""

    def __init__(self, to: torch.Tensor, value: torch.Tensor) -> None:
        self.to, self.value, self.done = to, value, False
        to.fill_(torch.nan if to.is_floating_point() else 77)

    def arrive(self) -> None:
        if not self.done:
            self.to.copy_(self.value)
            self.done = True


class Sent:
    """From page-locked memory: ``source`` may not change until the host has waited."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source, self.value, self.done = source, source.clone(), False

    def arrive(self) -> None:
        if not self.done and not torch.equal(
            self.source.view(torch.uint8), self.value.view(torch.uint8)
        ):
            raise RuntimeError("memory of the host was written before its copy had left")
        self.done = True


class Event:
    """What a stream had done, and knew, when it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.copies: set[Copy | Sent] = set()
        self.known: dict[int, int] = {}

    @_locked
    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current()
        self.copies, self.known = set(stream.copies), dict(stream.known)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        _tell("event")
        arrive(self)

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Stream:
    """An order of work. ``known``: of each stream, what was done before anything here goes on."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(_numbers)
        self.copies: set[Copy | Sent] = set()
        self.known = {self.number: 0}
        _all.add(self)

    @_locked
    def send(self, copy: Copy | Sent) -> None:
        self.copies.add(copy)

    @_locked
    def step(self) -> int:
        """The time of the next operation; the host has waited before it asked for it."""
        _learn(self.known, _host)
        self.known[self.number] += 1
        return self.known[self.number]

    @_locked
    def wait_event(self, event: Event | Stream) -> None:
        self.copies = {copy for copy in self.copies | event.copies if not copy.done}
        _learn(self.known, event.known)

    wait_stream = wait_event

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _tell("stream")
        arrive(self)

    def query(self) -> bool:
        return False


def _tell(what: str) -> None:
    for listener in on_wait:
        listener(what)


@_locked
def settle() -> None:
    """The host waits for everything."""
    for stream in list(_all):
        arrive(stream)


@_locked
def forget() -> None:
    """Copies on their way, after an error, and memory given away too early."""
    for stream in list(_all):
        stream.copies = set()
    lifetimes.clear()


@_locked
def arrive(waited: Event | Stream) -> None:
    """The host has waited for it."""
    for copy in waited.copies:
        copy.arrive()
    _learn(_host, waited.known)


def _learn(known: dict[int, int], more: dict[int, int]) -> None:
    for number, time in more.items():
        known[number] = max(time, known.get(number, -1))


class _Streams(threading.local):
    """Of each thread: the streams it is on, innermost last; all begin on the same one."""

    first = Stream()

    def __init__(self) -> None:
        self.of = [self.first]


_streams = _Streams()


def current(*_: Any) -> Stream:
    """The stream this thread is on."""
    return _streams.of[-1]


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``."""
    _streams.of.append(stream or current())
    try:
        yield
    finally:
        _streams.of.pop()


class _Memory:
    """Of one storage: the stream it was made on, when each last wrote and read it."""

    def __init__(self, stream: Stream) -> None:
        self.home, self.written, self.used = stream, {}, {}
        self.kept_for = {stream.number}  # the allocator gives it to nobody before these are done


_memory: dict[int, _Memory] = {}
lifetimes: list[str] = []  # memory that could be given away while a stream still used it


@_locked
def made(x: torch.Tensor, where: str) -> None:
    """A tensor with memory of its own came to be."""
    with _plain():
        storage = x.untyped_storage()
        at = storage.data_ptr()
    memory = _memory[at] = _Memory(current())
    weakref.finalize(storage, _freed, at, memory, where)


@_locked
def _freed(at: int, memory: _Memory, where: str) -> None:
    for number, time in memory.used.items():
        if number not in memory.kept_for and time > max(
            memory.home.known.get(number, -1), _host.get(number, -1)
        ):
            lifetimes.append(f"made at {where}: freed while another stream used it")
    if _memory.get(at) is memory:
        del _memory[at]


@_locked
def used(x: torch.Tensor, writes: bool) -> None:
    """An operation of the current stream reads a tensor, or writes it. RuntimeError: too early."""
    with _plain():
        memory = _memory.get(x.untyped_storage().data_ptr())
    stream = current()
    time = stream.step()
    if memory is None:
        return
    for number, when in (*memory.written.items(), *(memory.used.items() if writes else ())):
        if stream.known.get(number, -1) < when:
            raise RuntimeError("a stream uses memory that another is not done with")
    memory.used[stream.number] = time
    if writes:
        memory.written = {stream.number: time}


@_locked
def keep_for(x: torch.Tensor, stream: Stream) -> None:
    """``Tensor.record_stream``."""
    with _plain():
        memory = _memory.get(x.untyped_storage().data_ptr())
    if memory is not None:
        memory.kept_for.add(stream.number)
