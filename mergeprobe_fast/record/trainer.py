"""Recording as a callback of transformers' Trainer."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergeprobe_fast.errors import InputError

from .probe import Recorder
from .probe_plan import FRACTIONS, check_fractions


class ProbeCallback(TrainerCallback):
    """Write probes of a LoRA adapter while a Trainer (transformers, TRL) trains it.

    >>> trainer.add_callback(mpf.record.ProbeCallback("probes/a"))

    :class:`mergeprobe_fast.record.record` says what is recorded, and has the arguments. Steps are
    optimizer steps; ``trainer.train(resume_from_checkpoint=...)`` continues the run in ``out``,
    provided that its base model, number of steps and fractions are the same. (A step that
    GradScaler skipped before a checkpoint counts from then on, as the Trainer counts it.)

    Raises:
        InputError: from ``train``, before the first step, for anything that cannot be recorded.
            Later, what goes wrong is logged and noted in run.json, and training goes on.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        fractions: Sequence[float] = FRACTIONS,
        adapter: str | None = None,
        overwrite: bool = False,
        name: str | None = None,
    ) -> None:
        self._out = out
        self._fractions = check_fractions(fractions)
        self._adapter = adapter
        self._overwrite = overwrite
        self._name = name
        self._recorder: Recorder | None = None
        self._end: weakref.finalize | None = None  # closes the recorder

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set up the recording; see the class for what is raised."""
        # Still there when memory ran out and the Trainer begins again with smaller batches.
        begun_before = self._recorder is not None and args.auto_find_batch_size
        self._close()
        for key in ("deepspeed", "fsdp"):
            if getattr(args, key, None):
                raise InputError("gradients are sharded over processes; not supported", key=key)
        if state.global_step >= state.max_steps:  # resumed from the end: there are no steps left
            return
        self._recorder = Recorder(
            model, self._out, total_steps=state.max_steps, fractions=self._fractions,
            adapter=self._adapter, optimizer=optimizer, start_step=state.global_step,
            overwrite=self._overwrite or begun_before, name=self._name,
        )  # fmt: skip
        # The Trainer tells no callback that an exception ended a training: the hooks go with it.
        self._end = weakref.finalize(self, self._recorder.close)
        self._end.atexit = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint was written."""
        if self._recorder is not None:
            self._recorder.saved(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training is over."""
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder = None
            self._end()
