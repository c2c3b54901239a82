"""What ProbeCallback costs a training: the same steps with and without it, interleaved.

    python bench/probe_overhead.py [--total 100] [--rounds 3] [--batch 4] [--length 128] [--rank 16]

The model has the shape of SmolLM2-135M and random weights; LoRA is on every linear layer. Each
round trains the first steps of a run of ``--total`` steps twice, with the callback and without
(every other round the other way round), up to just after the last of four snapshots at 1, 2, 5 and
10% of it. After that no hook is left, so the rest costs nothing: the share of the whole training is
the extra time over ``--total`` times the median step. Medians over rounds; the CPU time of the
process is the steadier of the two clocks, but does not see the disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import mergeprobe_fast as mpf
from mergeprobe_fast.record.probe_plan import planned_steps

FRACTIONS = (0.01, 0.02, 0.05, 0.10)
SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "process CPU": time.process_time}


class Stop(TrainerCallback):
    """Ends the run after so many steps, and reads the clocks when each of them is done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen: list[dict[str, float]] = []

    def _read(self) -> None:
        self.seen.append({name: clock() for name, clock in CLOCKS.items()})

    def on_train_begin(self, args, state, control, **kwargs):
        self._read()

    def on_step_end(self, args, state, control, **kwargs):
        self._read()
        control.should_training_stop = state.global_step >= self.steps


def train(model, initial, data, options, folder: Path, probe: Path | None) -> list[dict]:
    """Seconds of each step by clock."""
    set_peft_model_state_dict(model, initial)
    arguments = TrainingArguments(
        str(folder), max_steps=options.total, per_device_train_batch_size=options.batch,
        use_cpu=True, report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    stop = Stop(options.steps)
    trainer = Trainer(model, arguments, train_dataset=data)
    if probe is not None:
        trainer.add_callback(mpf.record.ProbeCallback(probe, fractions=FRACTIONS))
    trainer.add_callback(stop)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    planned = set(planned_steps(FRACTIONS, options.total))
    if probe is not None and len(list(probe.glob("step-*"))) != len(planned):
        raise SystemExit("not all snapshots were written")
    return [
        {clock: after[clock] - before[clock] for clock in CLOCKS}
        for before, after in zip(stop.seen[:-1], stop.seen[1:], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--total", type=int, default=100, help="steps of the whole training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30, help="fewer: a smaller model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.steps = planned_steps(FRACTIONS, options.total)[-1] + 2
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    shape = SMOLLM2_135M | {"num_hidden_layers": options.layers}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**shape)),
        LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    ids = torch.randint(0, shape["vocab_size"], (64, options.length))
    data = [{"input_ids": row, "labels": row} for row in ids]
    factors = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps: dict[bool, list[list[dict]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds + 1):  # the first warms up
            for which in (False, True) if i % 2 else (True, False):
                probe = Path(folder) / f"probe{i}" if which else None
                found = train(model, initial, data, options, Path(folder) / "out", probe)
                if i:
                    steps[which].append(found)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, {options.threads} threads; "
        f"{options.layers} layers, rank {options.rank}: {factors / 1e6:.2f} M factors, "
        f"{options.batch} x {options.length} tokens a step, {options.rounds} rounds"
    )
    # A snapshot is written in the step after the one it is named after, which has that index.
    writing = set(planned_steps(FRACTIONS, options.total))
    for clock in CLOCKS:
        plain = statistics.median(s[clock] for run in steps[False] for s in run)
        # Steps are paired by position within their round: the same batch, the same factors.
        extra = [
            (i, other[i][clock] - one[i][clock])
            for one, other in zip(steps[False], steps[True], strict=True)
            for i in range(options.steps - 1)  # the last one is after the last snapshot
        ]
        counting = statistics.median(x for i, x in extra if i not in writing)
        snapshot = statistics.median(x for i, x in extra if i in writing)
        watched = options.steps - 1 - len(writing)
        share = (watched * counting + len(writing) * snapshot) / (options.total * plain)
        print(
            f"{clock}: step {plain * 1e3:.0f} ms; watched {counting * 1e3:+.1f} ms, with a "
            f"snapshot {snapshot * 1e3:+.1f} ms; {100 * share:.2f}% of {options.total} steps"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
