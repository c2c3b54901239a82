"""Calibration texts of the example zoo's domains and, if wanted, its base model as a folder.

    python examples/calibrate_data.py --out out/texts [--base out/base] [--items 8]
    mergeprobe-fast calibrate out/base --data out/texts/*.jsonl --out out/cal
        --out out/calibration

The texts come from the held-out side of each domain, so no adapter was trained on one of them, and
those that train_zoo.py measures losses on are not among them.
"""

import argparse
import json
from pathlib import Path

from smollm2 import BASE_NAME, GgufFile, find_gguf, load_model, load_tokenizer
from tasks import DOMAINS, END_OF_TURN, Item, draw_items
from transformers import PreTrainedTokenizerFast

SEED = 1
MEASURED_SEED, MEASURED_ITEMS = 0, 64  # what train_zoo.py holds out


def calibration_items(domain: str, count: int, seed: int = SEED) -> list[Item]:
    """Items that no adapter of the zoo was trained or measured on."""
    measured = draw_items(domain, MEASURED_ITEMS, MEASURED_SEED, held_out=True)
    prompts = {item.prompt for item in measured}
    drawn = draw_items(domain, count + MEASURED_ITEMS, seed, held_out=True)
    return [item for item in drawn if item.prompt not in prompts][:count]


def write_texts(folder: Path, count: int) -> None:
    """One .jsonl a domain, a prompt and its completion a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        lines = [
            json.dumps({"prompt": item.prompt, "completion": item.target}) + "\n"
            for item in calibration_items(domain, count)
        ]
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_base(folder: Path) -> None:
    """SmolLM2-135M-Instruct as transformers saves it, in float32."""
    gguf = GgufFile(find_gguf())
    load_model(gguf).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(gguf), eos_token=END_OF_TURN,
        chat_template=gguf.fields.get("tokenizer.chat_template"),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    named = json.loads(config.read_text()) | {"_name_or_path": BASE_NAME}
    config.write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for <domain>.jsonl")
    parser.add_argument("--base", type=Path, help="folder for the base model (540 MB)")
    parser.add_argument("--items", type=int, default=8, help="texts a domain (default: 8)")
    options = parser.parse_args()
    write_texts(options.out, options.items)
    if options.base is not None:
        write_base(options.base)


if __name__ == "__main__":
    main()
