"""A calibration pass that is ready to run, and its run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe_fast.io.calibration import Calibration, open_calibration
from mergeprobe_fast.io.calibration_json import CalibrationInfo
from mergeprobe_fast.io.calibration_writer import CalibrationWriter, written_nbytes

from .base import Base, evaluating
from .capture import Passage, Recorder
from .gradients import graph_from_embeddings, output_gradients
from .layers import LayeredModel
from .texts import Texts

if TYPE_CHECKING:
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

    @property
    def streamed(self) -> bool:
        """Whether one decoder layer is in memory at a time; else the whole model is."""
        return self._layers is not None

    @property
    def _workers(self) -> int:
        """Sequences at a time; a device other than the CPU has its own parallelism."""
        return self._threads if self._model.device.type in ("cpu", "meta") else 1

    @property
    def inputs(self) -> int:
        """Distinct input tensors: modules that share one are counted once."""
        return len({module.input for module in self.info.modules.values()})

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return written_nbytes(self.info)

    @property
    def steps(self) -> int:
        """What ``progress`` adds up to: sequences, times the layers when they are streamed."""
        sequences = sum(domain.sequences for domain in self.info.domains.values())
        return sequences * (len(self._recorded_layers()) if self._layers else 1)

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
        # With gradients: outputs, their copies, the gradients, the graph between them.
        copies = 4 if self.info.labels else 1
        wide = sum(m.d_in + m.d_out for m in modules) + text.vocab_size
        return weights + 4 * copies * max(lengths) * wide * self._workers + _LIBRARIES

    def summary(self) -> str:
        """One line: what will be recorded, and how large it is."""
        domains = self.info.domains.values()
        samples = sorted({d.samples for d in domains})
        shown = f"{samples[0]} to {samples[-1]}" if len(samples) > 1 else f"{samples[0]}"
        gradients = " with output gradients" if self.info.labels else ""
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
        advance = progress or (lambda steps: None)
        modules = {name: self._model.get_submodule(name) for name in self.info.modules}
        with one_thread_each(self._workers) as pool, self._writer(out, overwrite) as writer:
            for name, (sequence, position) in self._tokens.items():
                writer.sampled_tokens(name, sequence, position)
            recorder = Recorder(writer, self.info, self._tokens, modules)
            with recorder, evaluating(self._model):
                if self._layers is not None:
                    self._stream(self._layers, recorder, pool, advance)
                else:
                    self._run_whole(recorder, pool, advance)
        return open_calibration(out)

    def _writer(self, out: str | os.PathLike[str], overwrite: bool) -> CalibrationWriter:
        inputs = [] if self._base.path is None else [self._base.path]
        return CalibrationWriter(out, self.info, overwrite=overwrite, inputs=inputs)

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

        def one(at: int) -> Passage:
            domain, index, ids = work[at]
            with torch.inference_mode(), recorder.passage(domain, index, len(ids), names) as seen:
                hidden[at] = run(hidden[at], calls[at][i])
            return seen

        for i, names in enumerate(self._recorded_layers()):
            with layers.layer(i) as run:
                _in_order(pool, one, len(work), recorder, advance)
            recorder.write_moments(names)

    def _run_whole(self, recorder: Recorder, pool: Executor, advance: Advance) -> None:
        import torch

        work = list(self._sequences())
        expected, labels = self.info.modules, self.info.labels

        def one(at: int) -> Passage:
            domain, index, ids = work[at]
            batch = torch.from_numpy(ids)[None].to(self._model.device)
            with recorder.passage(domain, index, len(ids), expected) as seen:
                if labels is None:
                    with torch.inference_mode():
                        self._model(input_ids=batch, use_cache=False)
                else:
                    seed = [self.info.seed, 2, index, *domain.encode("utf-8")]
                    recorder.gradients(
                        output_gradients(self._model, batch, seen.outputs, labels, seed)
                    )
                    seen.outputs.clear()
            return seen

        with graph_from_embeddings(self._model) if labels else nullcontext():
            _in_order(pool, one, len(work), recorder, advance)
        recorder.write_moments(self.info.modules)


def _in_order(
    pool: Executor,
    one: Callable[[int], Passage],
    count: int,
    recorder: Recorder,
    advance: Advance,
) -> None:
    """Run all sequences, several at a time; what is summed is summed in their order."""
    running = [pool.submit(one, at) for at in range(count)]
    try:
        for at in range(count):
            recorder.add(running[at].result())
            running[at] = None  # its sums are not kept
            advance(1)
    finally:
        for future in running:
            if future is not None:
                future.cancel()


@contextmanager
def one_thread_each(count: int) -> Iterator[Executor]:
    """So many workers, in each of which torch runs on one thread.

    How torch splits a product among threads changes its last bits. A sequence on one thread has
    the same bits however many go at a time, and short ones are faster so.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
