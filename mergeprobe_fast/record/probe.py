"""The recorder behind ``ProbeCallback`` and ``record``: from optimiser steps to snapshots."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch.optim import optimizer as hooks

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.probe_json import RUN_NAME, ProbeInfo, RunInfo
from mergeprobe_fast.io.probe_writer import RunWriter, resume_run, start_run

from .probe_adapter import find_adapter
from .probe_backward import Backward, ForwardHook, Kept, clip_factor
from .probe_optimizer import (
    Rates,
    calling_scaler,
    checked,
    held_by,
    is_wrapper,
    processes,
    read_rates,
    stepping,
)
from .probe_plan import check_fractions, planned_steps
from .probe_window import Window

log = logging.getLogger("mergeprobe_fast.record")


class Recorder:
    """Watches one adapter's training and writes snapshots; all is set up when it is made.

    What it needs on the adapter's devices are two float32 copies of the factors (the gradient as
    backward left it, and its sum over the window); a snapshot takes another one in main memory, or
    three from a GPU. When the last one is written all is let go and the hooks are taken away.

    Raises:
        InputError: for arguments, a model or a folder that cannot be used. After that nothing here
            ends a training: what goes wrong is logged and noted in run.json, and recording stops.
    """

    def __init__(
        self,
        model: Any,
        out: str | os.PathLike[str],
        *,
        total_steps: int,
        fractions: Sequence[float],
        adapter: str | None = None,
        optimizer: Any = None,
        scaler: Any = None,
        start_step: int = 0,
        overwrite: bool = False,
        name: str | None = None,
    ) -> None:
        self._fractions = check_fractions(fractions)
        self._planned = planned_steps(self._fractions, total_steps)
        if type(start_step) is not int or not 0 <= start_step < total_steps:
            raise InputError(f"expected an integer from 0 to {total_steps - 1}, got {start_step!r}",
                             key="start_step")  # fmt: skip
        self._adapter = find_adapter(model, adapter)
        self._mine = {id(p) for p in self._adapter.parameters()}
        self._optimizer = None if optimizer is None else checked(optimizer, self._mine)
        self._scaler = scaler
        self.steps = start_step  # done
        self.skipped = 0  # by GradScaler
        self._depth = 0  # of calls of the optimiser's step
        self._notes: list[str] = []
        self._loss_scale: float | None = None
        self._rates: Rates | None = None  # of the last step
        self._processes, rank = processes()
        self._pending: list[int] = []
        self._exit = ExitStack()
        self._backward: Backward | None = None
        if rank == 0:
            described = RunInfo(
                name, self._adapter.base_model, total_steps, self._fractions, self._planned, None
            )
            self._writer, self._integral = self._open(out, described, overwrite)
            # Those that are there already end a window too, should a later one be missing.
            self._pending = [s for s in sorted({*self._planned}) if s >= start_step]
            while self._pending and self._writer.has(self._pending[-1]):
                self._pending.pop()
        if self._pending:
            self._watch(model)

    @property
    def recording(self) -> bool:
        """Whether snapshots are still to come."""
        return bool(self._pending)

    def loss(self, value: Any) -> None:
        """A loss that the user hands over."""
        if self._pending:
            self._guard(self._backward.given_loss)(value)

    def saved(self, step: int) -> None:
        """Training may resume from here."""
        if self._pending and step > 0:
            self._guard(lambda: self._writer.saved(step, self._integral))()

    def close(self) -> None:
        """Training is over, or given up."""
        if self._pending:
            missing = ", ".join(str(s) for s in self._pending if not self._writer.has(s))
            text = f"recording ended after {self.steps} steps, before the snapshots after {missing}"
            log.warning("%s: %s", self._writer.path, text)
            self._guard(self._writer.note)(text)
        self._stop()
        self._exit.close()

    def _open(
        self, out: str | os.PathLike[str], info: RunInfo, overwrite: bool
    ) -> tuple[RunWriter, float | None]:
        """The run's folder, and the learning-rate integral so far."""
        if self.steps == 0:
            info = replace(info, initial=self._adapter.initial())
            if any(bool(m.a.any()) and bool(m.b.any()) for m in self._adapter.modules):
                self._notes.append("the update was not zero before the first step")
            return start_run(out, info, overwrite=overwrite), 0.0
        if not os.path.isfile(os.path.join(out, RUN_NAME)):
            writer = start_run(out, info)
            writer.note(f"recorded from step {self.steps} on: the initial factors are unknown")
            return writer, None
        writer = resume_run(out, info)
        integrals = {s.step: s.learning_rate_integral for s in writer.info.saved}
        lost = [s for s in sorted({*self._planned}) if s < self.steps and not writer.has(s)]
        if lost:
            writer.note(f"resumed after {self.steps} steps: no snapshot after {lost[0]} steps")
        if integrals.get(self.steps) is None:
            self._notes.append("resumed at a step of which the learning-rate integral is unknown")
        return writer, integrals.get(self.steps)

    def _watch(self, model: Any) -> None:
        self._window = Window(self._adapter.modules)
        self._backward = Backward([*self._adapter.parameters()], self._guard)
        self._exit.callback(self._backward.remove)
        forward = model.register_forward_hook(ForwardHook(self._guard(self._after_forward)))
        # Without an optimiser the first one that steps with these factors is it.
        one = self._optimizer
        before = one.register_step_pre_hook if one else hooks.register_optimizer_step_pre_hook
        after = one.register_step_post_hook if one else hooks.register_optimizer_step_post_hook
        step = before(self._guard(self._before_step)), after(self._guard(self._after_step))
        for handle in (forward, *step):
            self._exit.callback(handle.remove)
        if self._processes > 1:
            self._notes.append(
                f"{self._processes} processes: gradients are as the optimizer got them, maybe "
                "clipped; loss and micro-batches are those of the first process"
            )

    def _guard(self, act: Callable[..., None]) -> Callable[..., None]:
        """The function, but whatever it raises ends the recording and nothing else."""

        @wraps(act)
        def guarded(*args: Any) -> None:
            try:
                act(*args)
            except Exception as error:
                text = f"recording stopped after {self.steps} steps: {error}"
                log.warning("%s: %s", self._writer.path, text)
                self._stop()
                with suppress(Exception):  # the disk that failed may fail again
                    self._writer.note(text)

        return guarded

    def _stop(self) -> None:
        """Nothing more to record. The hooks that may be running now go at the next forward."""
        self._pending = []
        if self._backward is not None:
            self._backward.remove()
            self._backward = self._window = None

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        if self._pending:
            self._depth = 0  # whatever became of the last step
            self._backward.on_output(output, self._guard)
        elif not stepping():
            self._exit.close()

    def _before_step(self, optimizer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if not self._pending:
            return
        if optimizer is not self._optimizer and not self._bind(optimizer):
            return
        self._depth += 1
        if self._depth > 1:  # a class whose step calls that of the class it is made from
            return
        if kwargs.get("closure", *args[1:2]) is not None:
            raise InputError("a closure computes the gradients within the step; not supported")
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self.skipped += 1
            self._backward.reset()
            return
        with ExitStack() as stack:
            for device in {p.device.type for p in self._adapter.parameters()}:
                stack.enter_context(torch.autocast(device, enabled=False))
            self._take(optimizer)

    def _after_step(self, optimizer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if optimizer is self._optimizer:
            self._depth -= 1

    def _bind(self, optimizer: Any) -> bool:
        """Whether this is the optimiser of the factors, which is found by its first step."""
        if is_wrapper(optimizer) or not held_by(optimizer, self._mine):
            return False
        if self._optimizer is not None:
            raise InputError("two optimizers step the adapter's factors; not supported")
        self._optimizer = checked(optimizer, self._mine)
        return True

    def _take(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the gradient of the step that comes, and write what is due before it."""
        self._scaler = self._scaler or calling_scaler()
        scaled = self._scaler is not None and self._scaler.is_enabled()
        scale = float(self._scaler.get_scale()) if scaled else 1.0
        self._loss_scale = scale if scaled else None
        pending = getattr(optimizer, "grad_scale", None)
        pending = 1.0 if pending is None else float(pending)
        backward, several = self._backward, self._processes > 1
        kept = backward.finish(scale, pending, several)
        clip = None if several else clip_factor(backward.parameters, backward.raw, pending)
        self._remark(kept, clip, scaled)
        self._window.add(backward.flat, backward.raw)
        self._window.describe(kept, clip)
        if scaled:
            self.skipped += backward.dropped
        backward.dropped = 0
        rates = read_rates(optimizer, self._adapter.modules)
        if self.steps == self._pending[0]:
            if not self._writer.has(self.steps):
                self._snapshot()
            self._pending.pop(0)
            self._window.reset()
        self._rates = rates
        self._integral = None if None in (rates, self._integral) else self._integral + rates.mean
        self.steps += 1
        backward.reset()
        if not self._pending:
            self._stop()

    def _remark(self, kept: Kept, clip: float | None, scaled: bool) -> None:
        if kept.silent:
            name = self._adapter.modules[kept.silent[0] // 2].name
            self._note(f"{name} had no gradient in a step, and maybe others: they count as zeros")
        if kept.unseen:
            self._note(
                "gradients came from elsewhere than backward: recorded as the optimizer got them, "
                "maybe clipped"
            )
        if self._backward.dropped and not scaled:
            self._note(
                "gradients were made zero or changed between two backward passes of a step: "
                "micro-batches and loss are of those after that"
            )
        if kept.late:
            self._note("a loss came before its backward or after its optimizer step: not recorded")
        if clip is None and self._processes == 1:
            self._note(
                "between backward and the step gradients were changed by more than a common "
                "factor; recorded is what backward left"
            )

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _snapshot(self) -> None:
        adapter, window, rates = self._adapter, self._window, self._rates
        tensors = window.tensors(self._backward.raw)
        if not all(math.isfinite(float(abs(x).max(initial=0))) for x in tensors.values()):
            self._note("gradients were not finite: this snapshot cannot be used")
        info = ProbeInfo(
            run=self._writer.info.name, base_model=adapter.base_model, adapter_name=adapter.name,
            fractions=tuple(
                f for f, s in zip(self._fractions, self._planned, strict=True) if s == self.steps
            ),
            steps=self.steps, total_steps=self._writer.info.total_steps, window=window.steps,
            micro_batches=window.micro_batches, loss=window.loss(),
            learning_rate=rates and rates.mean, learning_rate_integral=self._integral,
            learning_rate_groups=rates and rates.groups, clip=window.clip(),
            loss_scale=self._loss_scale, skipped_steps=self.skipped,
            optimizer=type(self._optimizer).__name__, dtype=adapter.dtype,
            modules=tuple(m.name for m in adapter.modules), initial=self._writer.info.initial,
            notes=tuple(self._notes),
        )  # fmt: skip
        self._writer.write_snapshot(info, adapter.config, adapter.tensors(), tensors)
        self._writer.saved(self.steps, self._integral)
