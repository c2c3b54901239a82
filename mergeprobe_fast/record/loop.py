"""Recording in a training loop of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from .probe import Recorder
from .probe_plan import FRACTIONS


class record:
    """Write probes of a LoRA adapter while the block trains it.

    >>> with mpf.record.record(model, "probes/a", total_steps=1000):
    ...     for batch in batches:
    ...         model(**batch).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()

    A step is one ``optimizer.step()``, however many backward passes come before it; one that
    GradScaler skips is none. The snapshot after s steps holds the factors after s steps and the
    gradient of the next one (:mod:`mergeprobe_fast.io.probe`), neither clipped nor scaled.

    Args:
        model: a PEFT model with LoRA adapters, or what torch.compile made of one. (With
            fullgraph=True give that one: hooks on a model inside break its graph.)
        out: folder of the run, which must not exist (or be empty), except with ``overwrite``, which
            replaces a run, and with ``start_step``, which continues it.
        total_steps: number of optimizer steps of the whole training.
        fractions: of ``total_steps`` at which to write, ascending between 0 and 1.
        adapter: its name in the model; default: the active one.
        optimizer: torch optimizer of the factors; default: the first one that steps them.
        scaler: GradScaler; default: the one that calls the optimizer.
        start_step: steps that were done before, when a training resumes.
        name: of the run, where it is not to be called like its folder.

    Raises:
        InputError: on entering, for anything that cannot be recorded. Later, what goes wrong is
            logged as a warning and noted in run.json, and recording stops; training goes on.
    """

    def __init__(
        self,
        model: Any,
        out: str | os.PathLike[str],
        *,
        total_steps: int,
        fractions: Sequence[float] = FRACTIONS,
        adapter: str | None = None,
        optimizer: Any = None,
        scaler: Any = None,
        start_step: int = 0,
        overwrite: bool = False,
        name: str | None = None,
    ) -> None:
        self._arguments = {
            "model": model, "out": out, "total_steps": total_steps, "fractions": fractions,
            "adapter": adapter, "optimizer": optimizer, "scaler": scaler,
            "start_step": start_step, "overwrite": overwrite, "name": name,
        }  # fmt: skip
        self._recorder: Recorder | None = None

    def __enter__(self) -> record:
        self._recorder = Recorder(**self._arguments)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._recorder.close()

    @property
    def recording(self) -> bool:
        """Whether snapshots are still to come."""
        return self._recorder.recording

    def loss(self, value: Any) -> None:
        """The loss of the step under way, a number or a tensor: call it between backward and step.

        Needed only where the model does not return the loss that backward starts from, as an output
        with ``loss`` does. Several calls in one step are averaged.
        """
        self._recorder.loss(value)

    def saved(self) -> None:
        """Training may resume from here with ``start_step``: keeps the learning-rate integral."""
        self._recorder.saved(self._recorder.steps)
