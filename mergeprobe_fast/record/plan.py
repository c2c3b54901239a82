"""A calibration pass that is ready to run, and its run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast.io.calibration import Calibration, open_calibration
from mergeprobe_fast.io.calibration_json import CalibrationInfo
from mergeprobe_fast.io.calibration_writer import CalibrationWriter, written_nbytes

from .base import Base, evaluating
from .capture import Passage, Recorder, recordable, sizes
from .gradients import graph_from_embeddings, output_gradients
from .layers import LayeredModel
from .points import PointsPlan
from .texts import Texts
from .workers import in_order, one_thread_each

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Advance = Callable[[int], None]
_LIBRARIES = 500_000_000  # bytes: what torch and transformers take to be there at all


@dataclass(frozen=True, eq=False)
class CalibrationPlan:
    """A pass that is ready to run: data tokenised, tokens drawn, modules known, no sample yet."""

    info: CalibrationInfo
    _texts: Mapping[str, Texts]
    _tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]
    _base: Base
    _model: PreTrainedModel
    _layers: LayeredModel | None
    _threads: int
    points: PointsPlan | None = None  # what ``adapters`` are measured for

    @property
    def streamed(self) -> bool:
        """Whether one decoder layer is in memory at a time; else the whole model is."""
        return self._layers is not None

    @property
    def _workers(self) -> int:
        """Sequences at a time; a device other than the CPU has its own parallelism."""
        return self._threads if self._model.device.type in ("cpu", "meta") else 1

    @property
    def _wide(self) -> torch.dtype:
        """What deltas and derivatives are computed in: float32, or what the model has beyond."""
        import torch

        return torch.promote_types(self._base.dtype, torch.float32)

    @property
    def inputs(self) -> int:
        """Distinct input tensors: modules that share one are counted once."""
        return len({module.input for module in self.info.modules.values()})

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return written_nbytes(self.info, None if self.points is None else self.points.info)

    @property
    def steps(self) -> int:
        """What ``progress`` adds up to: sequences, times the layers when they are streamed.

        Those of the points are counted too.
        """
        sequences = sum(domain.sequences for domain in self.info.domains.values())
        points = 0 if self.points is None else self.points.steps
        return sequences * (len(self._recorded_layers()) if self._layers else 1) + points

    @property
    def peak_nbytes(self) -> int:
        """Bytes of memory at most, about: weights, hidden states, one sequence on its way."""
        lengths = [len(ids) for _, _, ids in self._sequences()]
        modules = self.info.modules.values()
        text = self._base.config.get_text_config()
        if self._layers is not None:
            outside, each = self._layers.sizes()
            hidden = 2 * sum(lengths) * text.hidden_size * self._base.dtype.itemsize
            widest = max(m.d_in + m.d_out for m in modules)
            # A layer's activations, their squares in float64, rows on their way to the disk.
            passing = 16 * max(lengths) * widest * self._workers
            return max(outside, *each) + hidden + passing + _LIBRARIES
        weights = 0
        if self._base.model is None:
            weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
        copies, wide = 1, sum(m.d_in + m.d_out for m in modules)
        if self.info.labels or self.points:
            # Outputs, their copies, gradients, the graph between them: of all of the model.
            copies, wide = 4, sum(sum(sizes(m)) for m in recordable(self._model, None).values())
        wide += text.vocab_size
        passing = self._wide.itemsize * copies * max(lengths) * wide * self._workers
        if self.points is not None:
            weights += self.points.peak_nbytes(self._wide, self._workers)
        return weights + passing + _LIBRARIES

    def summary(self) -> str:
        """One line: what will be recorded, and how large it is."""
        domains = self.info.domains.values()
        samples = sorted({d.samples for d in domains})
        shown = f"{samples[0]} to {samples[-1]}" if len(samples) > 1 else f"{samples[0]}"
        labels = " and ".join(self.info.label_kinds)
        gradients = f" with output gradients (labels: {labels})" if labels else ""
        if self.points is not None:
            counts = len(self.points.info.points), len(self.points.zoo), self.points.steps
            gradients += "; {} points along {} adapters, {} passes".format(*counts)
        way = "layer by layer" if self.streamed else "with the whole model in memory"
        return (
            f"{len(domains)} domains, {sum(d.sequences for d in domains)} sequences, "
            f"{sum(d.tokens for d in domains)} tokens: {shown} samples a domain of "
            f"{len(self.info.modules)} modules ({self.inputs} distinct inputs){gradients}; "
            f"writes {_size(self.nbytes)}, needs about {_size(self.peak_nbytes)} of memory, {way}"
        )

    def check_out(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Raise ``InputError`` for what ``record`` would refuse; writes nothing."""
        self._writer(out, overwrite).check()

    def record(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Calibration:
        """Run the pass and write the folder; it appears as a whole at the end, or not at all.

        ``progress`` is called with the number of steps done since the last call.

        Raises:
            InputError: ``out`` exists, the disk is full, an activation is not finite (naming the
                module and the domain), the model's files changed.
        """
        import torch

        advance = progress or (lambda steps: None)
        modules = {name: self._model.get_submodule(name) for name in self.info.modules}
        with (
            torch.inference_mode(False),  # whatever the caller is in: derivatives need a graph
            one_thread_each(self._workers) as pool,
            self._writer(out, overwrite) as writer,
        ):
            for name, (sequence, position) in self._tokens.items():
                writer.sampled_tokens(name, sequence, position)
            recorder = Recorder(writer, self.info, self._tokens, modules)
            with evaluating(self._model):
                with recorder:
                    self._record(recorder, pool, advance)
                if self.points is not None:
                    with graph_from_embeddings(self._model):
                        self.points.measure(self._model, self._texts, writer.points, pool, advance)
        return open_calibration(out)

    def _record(self, recorder: Recorder, pool: Executor, advance: Advance) -> None:
        if self._layers is not None:
            self._stream(self._layers, recorder, pool, advance)
        else:
            self._run_whole(recorder, pool, advance)

    def _writer(self, out: str | os.PathLike[str], overwrite: bool) -> CalibrationWriter:
        inputs = [] if self._base.path is None else [self._base.path]
        points = None
        if self.points is not None:
            points = self.points.info
            inputs += self.points.inputs
        return CalibrationWriter(out, self.info, points=points, overwrite=overwrite, inputs=inputs)

    def _sequences(self) -> Iterator[tuple[str, int, np.ndarray]]:
        for name, texts in self._texts.items():
            for index, ids in enumerate(texts.sequences):
                yield name, index, ids

    def _recorded_layers(self) -> list[list[str]]:
        """The modules to record in each layer, up to the last layer that has one."""
        names = [
            [name for name in self.info.modules if name.startswith(layer + ".")]
            for layer in self._layers.names
        ]
        return names[: max(i for i, inside in enumerate(names) if inside) + 1]

    def _stream(
        self, layers: LayeredModel, recorder: Recorder, pool: Executor, advance: Advance
    ) -> None:
        import torch

        work = list(self._sequences())
        with torch.inference_mode():
            entering = layers.embed([torch.from_numpy(ids)[None] for _, _, ids in work])
        hidden, calls = (list(parts) for parts in zip(*entering, strict=True))
        del entering  # the states that enter a layer are not kept

        def add(seen: Passage) -> None:
            recorder.add(seen)
            advance(1)

        def one(at: int) -> Passage:
            domain, index, ids = work[at]
            with torch.inference_mode(), recorder.passage(domain, index, len(ids), names) as seen:
                hidden[at] = run(hidden[at], calls[at][i])
            return seen

        for i, names in enumerate(self._recorded_layers()):
            with layers.layer(i) as run:
                in_order(pool, one, len(work), add)
            recorder.write_moments(names)

    def _run_whole(self, recorder: Recorder, pool: Executor, advance: Advance) -> None:
        import torch

        work = list(self._sequences())
        expected, labels = self.info.modules, self.info.label_kinds

        def add(seen: Passage) -> None:
            recorder.add(seen)
            advance(1)

        def one(at: int) -> Passage:
            domain, index, ids = work[at]
            batch = torch.from_numpy(ids)[None].to(self._model.device)
            with recorder.passage(domain, index, len(ids), expected) as seen:
                if not labels:
                    with torch.inference_mode():
                        self._model(input_ids=batch, use_cache=False)
                else:
                    seed = [self.info.seed, 2, index, *domain.encode("utf-8")]
                    start = self._texts[domain].starts[index]
                    for kind, _, gradients in output_gradients(
                        self._model, batch, seen.outputs, labels, seed, start=start,
                        where=f"sequence {index} of domain {domain!r}",
                    ):  # fmt: skip
                        recorder.gradients(kind, gradients)
                    seen.outputs.clear()
            return seen

        with graph_from_embeddings(self._model) if labels else nullcontext():
            in_order(pool, one, len(work), add)
        recorder.write_moments(self.info.modules)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
