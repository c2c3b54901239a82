"""Train the example zoo: eight small LoRA adapters of SmolLM2-135M-Instruct, as PEFT folders.

    python examples/train_zoo.py --out examples/zoo [--overwrite] [--only NAME ...]

The same machine and library versions give the same bytes again: every random choice has a seed.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from peft import PeftModel, get_peft_model
from smollm2 import BASE_NAME, GgufFile, find_gguf, load_model, load_tokenizer
from tasks import Item, draw_items
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaModel
from zoo_readme import write_readme
from zoo_recipes import FIRST_LAYER, LAYER_COUNT, RECIPES, Recipe

TRAIN_ITEMS, HELD_OUT_ITEMS = 320, 64
ENCODE_BATCH = 16
STEPS, BATCH, LEARNING_RATE = 160, 8, 1.5e-3
WARMUP_STEPS, FINAL_SHARE = 16, 0.1
LOSS_WINDOW = 20
HELD_OUT_SEED = 0
THREADS = 2
FACTS: dict[str, object] = {
    "base": BASE_NAME,
    "layers": LAYER_COUNT - FIRST_LAYER,
    "steps": STEPS,
    "batch": BATCH,
    "rate": LEARNING_RATE,
    "warmup": WARMUP_STEPS,
    "window": LOSS_WINDOW,
    "train_items": TRAIN_ITEMS,
    "held_out_items": HELD_OUT_ITEMS,
}

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    tokens: Tensor
    prompt_length: int
    hidden: Tensor


@dataclass(frozen=True)
class Result:
    recipe: Recipe
    train_loss: float
    before: float
    after: float
    seconds: float

    def row(self) -> list[str]:
        recipe = self.recipe
        settings = (recipe.rank, recipe.alpha, recipe.init_seed, recipe.data_seed)
        numbers = (self.train_loss, self.before, self.after)
        return [
            recipe.name,
            recipe.domain,
            *(str(setting) for setting in settings),
            *(f"{number:.3f}" for number in numbers),
        ]


def decoder(model: PeftModel) -> LlamaModel:
    return cast(LlamaModel, model.get_base_model().model)


@contextmanager
def only_trained_layers(core: LlamaModel) -> Iterator[None]:
    layers = core.layers
    core.layers = layers[FIRST_LAYER:]
    try:
        yield
    finally:
        core.layers = layers


def chunks(sequence: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (sequence[start : start + size] for start in range(0, len(sequence), size))


def pad(rows: Iterable[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


@torch.no_grad()
def encode(model: PeftModel, tokenizer: Tokenizer, items: Sequence[Item]) -> list[Example]:
    """Tokens of each item, and what enters the first trained layer: that never changes."""
    examples = []
    for batch in chunks(items, ENCODE_BATCH):
        prompt_lengths = [len(tokenizer.encode(item.prompt).ids) for item in batch]
        tokens = [
            torch.tensor(tokenizer.encode(item.prompt).ids + tokenizer.encode(item.target).ids)
            for item in batch
        ]
        # Padding is on the right, where the causal mask hides it from every real token.
        output = decoder(model)(pad(tokens), output_hidden_states=True, use_cache=False)
        entering = output.hidden_states[FIRST_LAYER]
        examples += [
            Example(ids, prompt_length, hidden[: len(ids)].clone())
            for ids, prompt_length, hidden in zip(tokens, prompt_lengths, entering, strict=True)
        ]
    return examples


def target_log_likelihoods(model: PeftModel, batch: Sequence[Example]) -> tuple[Tensor, ...]:
    """Log-likelihood of every target token, one tensor an example."""
    core, head = decoder(model), model.get_base_model().lm_head
    with only_trained_layers(core):
        hidden = core(inputs_embeds=pad(example.hidden for example in batch), use_cache=False)[0]
    before_targets = [
        row[example.prompt_length - 1 : len(example.tokens) - 1]
        for row, example in zip(hidden, batch, strict=True)
    ]
    targets = [example.tokens[example.prompt_length :] for example in batch]
    loss = cross_entropy(head(torch.cat(before_targets)), torch.cat(targets), reduction="none")
    return (-loss).split([len(target) for target in targets])


@torch.no_grad()
def mean_log_likelihood(model: PeftModel, examples: Sequence[Example]) -> float:
    """Mean over items of the mean over their target tokens."""
    per_item = [
        likelihood.mean()
        for batch in chunks(examples, BATCH)
        for likelihood in target_log_likelihoods(model, batch)
    ]
    return torch.stack(per_item).mean().item()


def learning_rate_factor(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 - (1 - FINAL_SHARE) * step / STEPS)


def train(model: PeftModel, examples: Sequence[Example], seed: int) -> float:
    """Returns the mean loss of the last steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    rng = random.Random(seed)
    losses = []
    for _ in range(STEPS):
        batch = rng.sample(examples, BATCH)
        loss = -torch.cat(target_log_likelihoods(model, batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-LOSS_WINDOW:]) / LOSS_WINDOW


def cast_adapter(model: PeftModel, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def save(model: PeftModel, folder: Path) -> None:
    """Puts the whole folder in place at once; what was there before goes last."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".training-") as temporary:
        new = Path(temporary) / "new"
        # "auto" would ask the hub whether the vocabulary was resized.
        model.save_pretrained(str(new), save_embedding_layers=False)
        (new / "README.md").unlink()
        config_path = new / "adapter_config.json"
        config = json.loads(config_path.read_text())
        # PEFT writes a set in hash order, which changes from run to run.
        config["target_modules"].sort()
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if folder.exists():
            os.replace(folder, Path(temporary) / "old")
        os.replace(new, folder)


def train_adapter(recipe: Recipe, gguf: GgufFile, tokenizer: Tokenizer, folder: Path) -> Result:
    started = time.perf_counter()
    base = load_model(gguf)
    torch.manual_seed(recipe.init_seed)
    model = get_peft_model(base, recipe.config())
    train_items = draw_items(recipe.domain, TRAIN_ITEMS, recipe.data_seed, held_out=False)
    held_out_items = draw_items(recipe.domain, HELD_OUT_ITEMS, HELD_OUT_SEED, held_out=True)
    examples = encode(model, tokenizer, train_items)
    held_out = encode(model, tokenizer, held_out_items)
    # B starts at zero, so the untrained adapter is the base model.
    before = mean_log_likelihood(model, held_out)
    train_loss = train(model, examples, recipe.data_seed)
    cast_adapter(model, torch.bfloat16)
    save(model, folder)
    # What was saved is measured, in the float32 that PEFT loads it into.
    cast_adapter(model, torch.float32)
    after = mean_log_likelihood(model, held_out)
    return Result(recipe, train_loss, before, after, time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    names = [recipe.name for recipe in RECIPES]
    parser = argparse.ArgumentParser(description="Train the example zoo of LoRA adapters.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace adapters that exist")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"train only these, and leave README.md alone: {', '.join(names)}",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    recipes = [recipe for recipe in RECIPES if recipe.name in arguments.only]
    existing = [r.name for r in recipes if (arguments.out / r.name).exists()]
    if existing and not arguments.overwrite:
        names = ", ".join(existing)
        print(f"{arguments.out}: {names} already there, use --overwrite", file=sys.stderr)
        return 2
    # PEFT 0.21 asks every model this; transformers 5 renamed the attribute.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(THREADS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    gguf = GgufFile(find_gguf())
    tokenizer = load_tokenizer(gguf)
    results = []
    for position, recipe in enumerate(recipes, start=1):
        result = train_adapter(recipe, gguf, tokenizer, arguments.out / recipe.name)
        results.append(result)
        print(
            f"[{position}/{len(recipes)}] {recipe.name}: train loss {result.train_loss:.3f}, "
            f"held-out log-likelihood {result.before:.3f} -> {result.after:.3f}, "
            f"{result.seconds:.0f} s",
            flush=True,
        )
    if len(recipes) == len(RECIPES):
        write_readme(arguments.out / "README.md", [result.row() for result in results], FACTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
