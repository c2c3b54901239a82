"""A CUDA device that this machine has not: CPU tensors that say "cuda:0", and Triton's interpreter.

What a GPU refuses is refused here too: operations on tensors of both devices (but for single
numbers), kernels and addresses of tensors of the host, numpy's view of memory it cannot reach.
Copies that do not wait give garbage to a host that does not wait for them either.
Everything is computed, so results can be compared. :func:`install` is for a child process.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretend_streams as streams
import torch

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
ROOT = str(Path(__file__).resolve().parents[1])
_plain = torch._C.DisableTorchFunctionSubclass
_real = {name: getattr(torch.Tensor, name) for name in ("to", "data_ptr", "pin_memory", "cuda")}

# Each makes the host wait for the device: its answer, or its size, is needed.
_WAITING = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero",
    "argwhere", "unique", "_unique2", "unique_consecutive", "masked_select", "equal", "allclose",
    "is_nonzero", "bincount",
}  # fmt: skip
# Sums whose order, and so their bits, change from run to run, of floats.
_UNORDERED = {"scatter_add", "index_add", "scatter_reduce", "index_reduce", "put", "cumsum",
              "bincount", "histc", "cumprod"}  # fmt: skip
_PRODUCTS = {"matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "addmm", "baddbmm", "einsum",
             "addbmm", "mv", "dot", "inner", "tensordot"}  # fmt: skip


_VIEWS = {"view", "view_as", "expand", "expand_as", "transpose", "t", "permute", "squeeze",
          "unsqueeze", "as_strided", "narrow", "select", "detach", "diagonal", "split", "unbind",
          "unflatten", "swapaxes", "movedim", "requires_grad_", "chunk"}  # fmt: skip


class Pretended(torch.Tensor):
    """A CPU tensor in disguise."""

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def record_stream(self, stream: streams.Stream) -> None:
        streams.keep_for(self, stream)


class Report:
    """What ran: ``waits`` and ``unordered`` count (what, where in the package)."""

    def __init__(self) -> None:
        self.waits: Counter = Counter()
        self.unordered: Counter = Counter()
        self.operations = self.launches = 0

    def clear(self) -> None:
        self.__init__()


report = Report()


def _where() -> str:
    """File and line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and not path.startswith(ROOT + "/tests"):
            return f"{path[len(ROOT) + 1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _tensors(x: Any, into: list[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        into.append(x)
    elif isinstance(x, (list, tuple)):
        for y in x:
            _tensors(y, into)
    elif isinstance(x, dict):
        for y in x.values():
            _tensors(y, into)
    return into


def _wrapped(x: Any, given: Sequence[torch.Tensor] = ()) -> Any:
    """Tensors of a result on the device; what is not in the memory of ``given`` is new."""
    if isinstance(x, torch.Tensor):
        if isinstance(x, Pretended):
            return x
        with _plain():
            there = x.as_subclass(Pretended)
            places = {y.untyped_storage().data_ptr() for y in given}
            new = x.untyped_storage().data_ptr() not in places
        if new:
            streams.made(there, _where())
            streams.used(there, writes=True)
        return there
    if type(x) in (list, tuple):
        return type(x)(_wrapped(y, given) for y in x)
    if isinstance(x, tuple):  # torch.return_types
        return type(x)(_wrapped(y, given) for y in x)
    return x


def _unwrapped(x: torch.Tensor) -> torch.Tensor:
    with _plain():
        return x.as_subclass(torch.Tensor)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _count(what: str) -> None:
    report.waits[what, _where()] += 1


def wait(what: str) -> None:
    """The host waits for the stream it is on."""
    _count(what)
    streams.arrive(streams.current())


def _compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = func.__name__
    if name in ("__get__", "__set__", "dim", "size", "stride", "numel", "element_size",
                "is_floating_point", "is_contiguous", "__len__", "storage_offset", "data_ptr",
                "untyped_storage", "is_complex", "ndimension", "nelement", "__hash__",
                "__format__", "__repr__", "__reduce_ex__", "is_signed"):  # fmt: skip
        if name in ("__format__", "__repr__") and args[0].dim() == 0:
            wait(name)
        if name == "__get__":
            with _plain():
                made = func(*args, **kwargs)
            return _wrapped(made, args[:1])
        with _plain():
            return func(*args, **kwargs)
    handler = _HANDLERS.get(name)
    if handler is not None:
        return handler(func, args, kwargs)
    report.operations += 1
    if name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None
                            and len(args) > 1 and isinstance(args[1], torch.Tensor)):
        wait(name)
    given = _tensors((args, kwargs), [])
    for x in given:
        if not isinstance(x, Pretended) and x.dim():
            raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu")
    base = name.strip("_")
    if base in _UNORDERED and any(x.is_floating_point() for x in given):
        report.unordered[name, _where()] += 1
    if name in _PRODUCTS and not any(x.is_floating_point() for x in given):
        raise RuntimeError(f'"{name}_cuda" not implemented for {given[0].dtype}')
    kwargs = dict(kwargs)
    device = kwargs.pop("device", DEVICE)
    _generator(kwargs.get("generator"), there=True)
    written = _tensors(kwargs.get("out"), [])
    written += args[:1] if name.endswith("_") and not name.endswith("__") else []
    if name not in _VIEWS:
        for x in given:
            if isinstance(x, Pretended):
                streams.used(x, any(x is y for y in written))
    with _plain():
        made = func(*args, **kwargs)
    return _wrapped(made, given) if _is_there(device) else made


def _generator(generator: Any, there: bool) -> None:
    if generator is not None and (id(generator) in _generators) != there:
        raise RuntimeError(f"expected a generator on {'cuda' if there else 'cpu'}")


_generators: dict[int, Any] = {}  # those on the device; kept, so that no other has their id


# Tensor.to and the like -------------------------------------------------------------------------


def _to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``: the device is the first argument, a keyword, or that of another tensor."""
    device, rest, kwargs = None, list(args), dict(kwargs)
    if rest and isinstance(rest[0], torch.Tensor):
        device, rest = rest[0].device, [rest[0].dtype, *rest[1:]]
    elif rest and not isinstance(rest[0], torch.dtype):
        device = rest.pop(0)
    device = kwargs.pop("device", device)
    non_blocking = kwargs.pop("non_blocking", False)
    here, there = not isinstance(x, Pretended), _is_there(x.device if device is None else device)
    if not here:
        streams.used(x, writes=False)
    with _plain():
        plain = x.as_subclass(torch.Tensor)
        made = _real["to"](plain, *rest, **kwargs) if rest or kwargs else plain
    if here != there:  # it stays where it is
        return x if made is plain else made if here else _wrapped(made, [x])
    report.operations += 1
    if here:
        if non_blocking and _is_pinned(plain):
            streams.current().send(streams.Sent(plain))
        made = _wrapped(made.clone())
    elif non_blocking:
        value, made = made.clone(), made.clone()
        streams.current().send(streams.Copy(made, value))
    else:
        made = made.clone()
    if not non_blocking:
        wait("to cuda" if here else "to cpu")
    return made


def _copy(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``Tensor.copy_`` between devices."""
    to, source = args[0], args[1] if len(args) > 1 else kwargs["src"]
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    there = isinstance(to, Pretended), isinstance(source, Pretended)
    report.operations += 1
    for x, writes in ((source, False), (to, True)):
        if isinstance(x, Pretended):
            streams.used(x, writes)
    with _plain():
        plain = to.as_subclass(torch.Tensor), source.as_subclass(torch.Tensor)
        if there == (False, True) and non_blocking:
            streams.current().send(streams.Copy(plain[0], plain[1].clone()))
            return to
        if there == (True, False) and non_blocking and _is_pinned(source):
            streams.current().send(streams.Sent(plain[1]))
        to.copy_(source)
    if there[0] != there[1] and not non_blocking and to.numel():
        wait("copy_")
    return to


def _getitem(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    x, index = args
    if _indices(x, index, "getitem") and isinstance(x, Pretended):
        streams.used(x, writes=False)
    report.operations += 1
    with _plain():
        made = func(*args)
    return _wrapped(made, [x]) if isinstance(x, Pretended) else made


def _setitem(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    x, index, value = args
    indexed = _indices(x, index, "setitem")
    report.operations += 1
    for y, writes in ((value, False), (x, True)):
        if isinstance(y, Pretended):
            streams.used(y, writes)
    with _plain():
        func(*args)
    if isinstance(value, torch.Tensor) and value.dim():
        mixed = isinstance(value, Pretended) != isinstance(x, Pretended)
        if mixed and indexed:
            raise RuntimeError("setitem: expected all tensors on one device")
        if mixed:
            wait("setitem copies")


def _indices(x: torch.Tensor, index: Any, name: str) -> bool:
    """Whether there are index tensors; the host waits for masks, and to send its own."""
    found = _tensors(index if isinstance(index, tuple) else (index,), [])
    if isinstance(index, list) or (isinstance(index, tuple) and any(
            isinstance(i, list) for i in index)):  # fmt: skip
        wait(f"{name} by a list")
        return True
    for i in found:
        if isinstance(i, Pretended) and not isinstance(x, Pretended) and i.dim():
            raise RuntimeError(f"{name}: a tensor of the CPU by indices on cuda:0")
        if i.dtype in (torch.bool, torch.uint8):
            wait(f"{name} by a mask")
        elif isinstance(i, Pretended) and not i.dim():
            wait(f"{name} by a number on the device")
        elif not isinstance(i, Pretended) and isinstance(x, Pretended) and i.dim():
            wait(f"{name} by indices of the CPU")
    return bool(found)


def _numpy(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")


_HANDLERS = {
    "to": lambda f, a, k: _to(*a, **k),
    "cpu": lambda f, a, k: _to(a[0], "cpu"),
    "cuda": lambda f, a, k: _to(a[0], DEVICE),
    "type_as": lambda f, a, k: _to(a[0], a[1]),
    "copy_": _copy,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "numpy": _numpy,
    "__array__": _numpy,
    "__array_wrap__": _numpy,
    "__dlpack__": _numpy,
}


# Installing -------------------------------------------------------------------------------------

_FACTORIES = [
    "empty", "empty_strided", "zeros", "ones", "full", "tensor", "as_tensor", "asarray", "arange",
    "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "normal", "tril_indices",
    "triu_indices", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "randint_like",
]  # fmt: skip
_NEW = ["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided"]


def _factory(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        given = _tensors((args, kwargs), [])
        there = any(isinstance(x, Pretended) for x in given)
        device = kwargs.pop("device", None)
        pinned = kwargs.pop("pin_memory", False)
        _generator(kwargs.get("generator"), DEVICE.type == "cuda" and _is_there(device))
        if make.__name__ in ("tensor", "as_tensor", "asarray"):
            if there and not _is_there(device or DEVICE):
                wait(f"{make.__name__} to cpu")
            elif _is_there(device) and not there:
                wait(f"{make.__name__} to cuda")
        with _plain():
            x = make(*args, **kwargs)
        if x is None or (device is None and there) or _is_there(device):
            report.operations += 1
            return _wrapped(x, given)
        x = _unwrapped(x) if isinstance(x, Pretended) else x
        if pinned:
            whole = x.untyped_storage()
            at = whole.data_ptr()
            _pinned.append((at, at + whole.nbytes(), weakref.ref(whole)))
        return x

    return made


_pinned: list = []  # (first, last) address of page-locked memory, and who keeps it


def _is_pinned(x: torch.Tensor, *_: Any) -> bool:
    with _plain():
        at = _real["data_ptr"](x)
    return any(first <= at < last and keeper() is not None for first, last, keeper in _pinned)


def _address(x: torch.Tensor) -> int:
    """Addresses go to kernels by tables: none of the host's may."""
    if not isinstance(x, Pretended) and "/kernels/" in sys._getframe(1).f_code.co_filename:
        raise RuntimeError("a kernel gets the address of a tensor of the host")
    with _plain():
        return _real["data_ptr"](x)


def _launch(call: Any) -> Any:
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, x in (*enumerate(args), *kwargs.items()):
            if isinstance(x, torch.Tensor) and not isinstance(x, Pretended):
                raise RuntimeError(f"a kernel gets a tensor of the host, argument {name}")
        report.launches += 1
        for x in (*args, *kwargs.values()):
            if isinstance(x, Pretended):
                streams.used(x, writes=True)
        args = [_unwrapped(x) if isinstance(x, Pretended) else x for x in args]
        kwargs = {k: _unwrapped(x) if isinstance(x, Pretended) else x for k, x in kwargs.items()}
        made = call(self, *args, **kwargs)
        gc.collect(0)  # the interpreter's cycles hold memory that a real launch does not
        return made

    return checked


def install() -> None:
    """For the rest of the process, torch has a CUDA device. Triton must be interpreted."""
    from triton.runtime import interpreter

    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in _NEW:
        setattr(torch.Tensor, name, _factory(getattr(torch.Tensor, name)))
    torch.Tensor.to = _to
    torch.Tensor.cuda = lambda x, *_, **__: _to(x, DEVICE)
    torch.Tensor.data_ptr = _address
    torch.Tensor.pin_memory = lambda x, *_: torch.empty(
        x.shape, dtype=x.dtype, pin_memory=True).copy_(x)  # fmt: skip
    torch.Tensor.is_pinned = _is_pinned
    generator = torch.Generator

    def make_generator(device: Any = "cpu") -> Any:
        made = generator()
        if _is_there(device):
            _generators[id(made)] = made
        return made

    torch.Generator = make_generator
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: "pretended"
    cuda.mem_get_info = lambda *_: (1 << 30, 1 << 30)
    cuda.synchronize = lambda *_: (_count("synchronize"), streams.settle())
    cuda.empty_cache = lambda: None
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.Stream, cuda.Event = streams.Stream, streams.Event
    cuda.current_stream = cuda.default_stream = streams.current
    cuda.stream = streams.on_stream
    streams.on_wait.append(_count)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)
    from mergeprobe_fast.kernels import canonical, device, pair_angles

    device.INTERPRETED = False
    # Where nobody asks for Triton's: its interpreter takes seconds for what torch does at once.
    chosen, angles = canonical._backend, pair_angles.PairAngles.__init__
    canonical._backend = lambda name, there: chosen("torch" if name == "auto" else name, there)
    pair_angles.PairAngles.__init__ = lambda self, there, top, backend="torch": angles(
        self, there, top, backend
    )
