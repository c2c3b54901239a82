"""Train adapters with the probe callback, and stop after the first few percent of the steps.

    python examples/train_with_probes.py --out out/probes [--domains math code] [--stop-at 0.05]
    mergeprobe-fast screen --probes out/probes --at 5% --out out/early

The two lines about ProbeCallback are all that a training script of one's own needs.
"""

import argparse
import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from smollm2 import GgufFile, find_gguf, load_model, load_tokenizer
from tasks import DOMAINS, draw_items
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

import mergeprobe_fast as mpf

STEPS, BATCH, ITEMS, RATE = 200, 4, 320, 1e-3
IGNORED = -100
PROJECTIONS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LAYERS = list(range(20, 30))  # the backward pass ends at the first of them


class StopAfter(TrainerCallback):
    """Ends the training early: what an early look says no to need not be paid for."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= self.steps:
            control.should_training_stop = True


def examples(domain: str, tokenizer: Tokenizer) -> list[dict[str, torch.Tensor]]:
    """Token ids of items, and labels on their answers only."""
    rows = []
    for item in draw_items(domain, ITEMS, 0, held_out=False):
        prompt, target = (tokenizer.encode(text).ids for text in (item.prompt, item.target))
        labels = [IGNORED] * len(prompt) + target
        rows.append({"input_ids": torch.tensor(prompt + target), "labels": torch.tensor(labels)})
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right, where the causal mask hides it."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence(
        [row["labels"] for row in rows], batch_first=True, padding_value=IGNORED
    )
    return {"input_ids": ids, "labels": labels}


def train(domain: str, out: Path, steps: int, stop: int, seed: int, overwrite: bool) -> None:
    gguf = GgufFile(find_gguf())
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=PROJECTIONS, layers_to_transform=LAYERS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(load_model(gguf), config)
    arguments = TrainingArguments(
        output_dir=str(out.parent / "unused"), max_steps=steps, learning_rate=RATE,
        per_device_train_batch_size=BATCH, warmup_steps=steps // 20, save_strategy="no",
        report_to=[], seed=seed, use_cpu=not torch.cuda.is_available(), logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, data_collator=collate,
        train_dataset=examples(domain, load_tokenizer(gguf)),
    )  # fmt: skip
    trainer.add_callback(mpf.record.ProbeCallback(out / domain, overwrite=overwrite))
    trainer.add_callback(StopAfter(stop))
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the probe runs")
    parser.add_argument("--domains", nargs="+", default=["math", "code"], choices=list(DOMAINS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole training")
    parser.add_argument("--stop-at", type=float, default=0.05, help="share of the steps to run")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    # The gradient of a snapshot is that of the step behind it.
    stop = math.ceil(options.stop_at * options.steps) + 1
    for seed, domain in enumerate(options.domains):
        train(domain, options.out, options.steps, stop, seed, options.overwrite)


if __name__ == "__main__":
    main()
