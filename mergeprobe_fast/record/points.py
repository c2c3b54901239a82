"""What every adapter of a zoo does to the loss, to second order, at the base and at each adapter.

At a point (a model: the base, or the base with one adapter's delta) and for one text, the change
of its loss along a delta W_j is ``phi_j = sum over modules m and tokens t of y_mt^T W_mj x_mt``,
with x the module's input and y the gradient of the loss by its output there: no other derivative
is needed, and no delta is ever formed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.fingerprint import fingerprint
from mergeprobe_fast.io.points import LABELS, Point, PointsInfo
from mergeprobe_fast.io.points_writer import PointsWriter
from mergeprobe_fast.zoo import Zoo

from .capture import input_of
from .gradients import output_gradients
from .stacks import Stacks, check_fit
from .texts import Texts
from .workers import in_order

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Factors = tuple[torch.Tensor, torch.Tensor]


class Measured(NamedTuple):
    """One text at a point: losses and derivatives are means over its label tokens, in nats."""

    loss: float
    tokens: int
    parts: dict[str, np.ndarray]  # labels -> (modules, adapters), each module's part of phi


@dataclass(frozen=True, eq=False)
class PointsPlan:
    """Which points are going to be measured, along which adapters."""

    zoo: Zoo
    info: PointsInfo
    seed: int

    @property
    def steps(self) -> int:
        """Texts to run, at all points together."""
        return sum(point.sequences for point in self.info.points.values())

    @property
    def inputs(self) -> list[Path]:
        """Paths of the adapters."""
        return [adapter.path for adapter in self.zoo]

    def peak_nbytes(self, dtype: torch.dtype, workers: int) -> int:
        """Bytes of memory beside the model and a text on its way through it, at most, about."""
        table = len(self.info.modules) * len(self.info.fingerprints) * 8
        return Stacks.peak_nbytes(self.zoo, dtype, workers) + table * (4 + 2 * workers)

    def measure(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, Texts],
        writer: PointsWriter,
        pool: Executor,
        advance: Callable[[int], None],
    ) -> None:
        """Run all points and write them. ``model`` starts its graph at the embedded tokens."""
        import torch

        wide = torch.promote_types(model.dtype, torch.float32)
        stacks = Stacks(self.zoo, wide, model.device)
        base: dict[str, np.ndarray] = {}
        with _Runner(model, stacks, len(self.zoo)) as runner:
            for key, point in self.info.points.items():
                own = {}
                if point.adapter is not None:
                    own = stacks.of(self.zoo.names.index(point.adapter))
                text = texts[point.domain]
                sums = _Sums(point.sequences, len(stacks.modules), len(self.zoo))

                def one(
                    index: int, text: Texts = text, own: dict = own, point: Point = point
                ) -> Measured:
                    seed = [self.seed, 3, index, *text.name.encode("utf-8")]
                    where = f"sequence {index} of domain {text.name!r}"
                    if point.adapter is not None:
                        where += f" with {point.adapter} on the model"
                    return runner.run(text, index, own, seed, where)

                def take(measured: Measured, sums: _Sums = sums) -> None:
                    sums.add(measured)
                    advance(1)

                in_order(pool, one, point.sequences, take)
                if point.adapter is None:
                    base[point.domain] = sums.losses
                writer.write(key, base_loss=base[point.domain], **sums.tensors())


def plan_points(
    zoo: Zoo,
    domains: Sequence[str],
    texts: Mapping[str, Texts],
    model: PreTrainedModel,
    seed: int,
    threads: int,
) -> PointsPlan:
    """The base at every domain, and every adapter on the texts of its own (``domains``).

    Reads all factors once, for their fingerprints. Raises ``InputError`` for an adapter that does
    not fit the model.
    """
    check_fit(zoo, model)
    with ThreadPoolExecutor(threads) as pool:
        prints = dict(zip(zoo.names, pool.map(fingerprint, zoo), strict=True))
    points = [Point("base", None, name, len(text.sequences)) for name, text in texts.items()]
    points += [
        Point("trained", adapter, domain, len(texts[domain].sequences))
        for adapter, domain in zip(zoo.names, domains, strict=True)
    ]
    modules = tuple(m.name for m in zoo.modules)
    return PointsPlan(zoo, PointsInfo(prints, modules, {p.key: p for p in points}), seed)


class _Sums:
    """The texts of one point, added in their order."""

    def __init__(self, sequences: int, modules: int, adapters: int) -> None:
        self._texts: list[tuple[float, int]] = []
        self._phi: dict[str, list[np.ndarray]] = {labels: [] for labels in LABELS}
        self._first = np.zeros((modules, adapters))
        self._curvature = np.zeros((modules, adapters))
        self._sequences = sequences

    def add(self, measured: Measured) -> None:
        self._texts.append((measured.loss, measured.tokens))
        for labels, parts in measured.parts.items():
            self._phi[labels].append(parts.sum(0))
        self._first += measured.parts["data"]
        self._curvature += measured.tokens * measured.parts["model"] ** 2

    @property
    def losses(self) -> np.ndarray:
        return np.array([loss for loss, _ in self._texts])

    def tensors(self) -> dict[str, np.ndarray]:
        return {
            **{f"phi_{labels}": np.array(rows) for labels, rows in self._phi.items()},
            "first": self._first / self._sequences,
            "curvature": self._curvature / self._sequences,
            "loss": self.losses,
            "tokens": np.array([tokens for _, tokens in self._texts]),
        }


class _Passage:
    """One text on its way through the hooked modules of a thread."""

    def __init__(self, length: int, own: Mapping[str, Factors]) -> None:
        self.length, self.own = length, own
        self.inputs: dict[str, tuple[torch.Tensor, int]] = {}  # with its version
        self.outputs: dict[str, torch.Tensor] = {}


class _Runner:
    """Context manager: hooks on the modules of a zoo that add deltas and keep what is needed."""

    def __init__(self, model: PreTrainedModel, stacks: Stacks, adapters: int) -> None:
        self._model, self._stacks, self._adapters = model, stacks, adapters
        self._here, self._stack = threading.local(), ExitStack()

    def __enter__(self) -> _Runner:
        for name in self._stacks.modules:
            hook = self._model.get_submodule(name).register_forward_hook(
                self._hook(name), with_kwargs=True
            )
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self, text: Texts, index: int, own: Mapping[str, Factors], seed: Sequence[int], where: str
    ) -> Measured:
        """One text, at the base with the deltas ``own`` on it; errors say ``where`` it was."""
        import torch

        ids = torch.from_numpy(text.sequences[index])[None].to(self._model.device)
        tokens, loss, parts = text.labelled(index), 0.0, {}
        with self._passage(len(text.sequences[index]), own) as passage:
            for labels, value, gradients in output_gradients(
                self._model, ids, passage.outputs, LABELS, seed,
                start=text.starts[index], beyond=False, where=where,
            ):  # fmt: skip
                if labels == "data":
                    self._check(passage, where)
                    loss = value / tokens
                parts[labels] = self._along(passage, gradients) / tokens
        return Measured(loss, tokens, parts)

    def _along(self, passage: _Passage, gradients: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Each module's part of the derivative along each adapter: (modules, adapters)."""
        import torch

        parts = np.zeros((len(self._stacks.modules), self._adapters))
        for at, name in enumerate(self._stacks.modules):
            a, b, owner = self._stacks[name]
            x, y = passage.inputs[name][0].detach(), gradients[name]
            x = x.reshape(-1, a.shape[1]).to(a.dtype)
            y = y.reshape(-1, b.shape[0]).to(b.dtype)
            sums = ((y @ b) * (x @ a.T)).sum(0, dtype=torch.float64)
            parts[at] = np.bincount(owner, sums.cpu().numpy(), self._adapters)
        return parts

    def _check(self, passage: _Passage, where: str) -> None:
        for name in self._stacks.modules:
            if name not in passage.inputs:
                raise InputError(f"was not called for {where}", key=name)
            x, version = passage.inputs[name]
            if x._version != version:
                raise InputError("its input is changed in place behind it", key=name)

    @contextmanager
    def _passage(self, length: int, own: Mapping[str, Factors]) -> Iterator[_Passage]:
        self._here.passage = _Passage(length, own)
        try:
            yield self._here.passage
        finally:
            del self._here.passage

    def _hook(self, name: str) -> Any:
        def record(module: Any, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
            passage, x = self._here.passage, input_of(args, kwargs)
            if name in passage.inputs:
                raise InputError("is called more than once for one text", key=name)
            if x.numel() != passage.length * x.shape[-1]:
                raise InputError("is not fed every token", key=name)
            passage.inputs[name] = x, x._version
            if name in passage.own:
                a, b = passage.own[name]
                # Never merged into the weights: these may be shared, and rounding would show.
                delta = x.to(a.dtype) @ a.T @ b.T
                output = (output.to(a.dtype) + delta).to(output.dtype)
            passage.outputs[name] = output
            # What follows may change its input in place; the gradient is for this tensor.
            return output.clone()

        return record
