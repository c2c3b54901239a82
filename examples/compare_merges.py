"""What each merge method keeps of five adapters of the example zoo, measured.

    python examples/calibrate_data.py --out out/texts --base out/base
    mergeprobe-fast calibrate out/base --data out/texts/*.jsonl --out out/cal
    python examples/compare_merges.py --calibration out/cal

Merges math-a, code, science, instruct and safety by every method and measures the mean
log-likelihood of a target token on 64 held-out items a domain, none of which any adapter, nor the
calibration, has seen. Printed is the retention

    (merged - base) / (the adapter alone - base)

of each adapter on its own domain: 1 is all that training gained, 0 nothing, below 0 harm.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from smollm2 import GgufFile, find_gguf, load_model, load_tokenizer
from tasks import draw_items
from train_zoo import HELD_OUT_ITEMS, HELD_OUT_SEED, THREADS, encode, mean_log_likelihood

import mergeprobe_fast as mpf

ZOO = Path(__file__).parent / "zoo"
ADAPTERS = ("math-a", "code", "science", "instruct", "safety")
RANK = 16
# Label, method, what it is asked for. Rank None: whatever the method gives.
MERGES = (
    ("sum", "linear", {"weights": [1.0] * len(ADAPTERS)}),
    ("average", "linear", {}),
    ("svd (average)", "svd", {"rank": RANK}),
    ("ties, density 0.2", "ties", {"rank": RANK}),
    ("dare_ties, density 0.5", "dare_ties", {"rank": RANK}),
    ("della", "della", {"rank": RANK}),
    ("breadcrumbs", "breadcrumbs", {"rank": RANK}),
    ("karcher", "karcher", {"rank": RANK}),
    ("tsv_m", "tsv_m", {"rank": RANK}),
    ("iso_c", "iso_c", {"rank": RANK}),
    ("core_space", "core_space", {"rank": RANK}),
    ("knots (ties)", "knots", {"rank": RANK}),
    ("lora_lego", "lora_lego", {"rank": RANK}),
    ("osrm", "osrm", {"rank": RANK}),
    ("weighted_svd (average)", "weighted_svd", {"rank": RANK}),
    ("fisher", "fisher", {"rank": RANK}),
    ("regmean", "regmean", {}),
    (f"regmean, rank {RANK}", "regmean", {"rank": RANK}),
    ("regmean, rank 8", "regmean", {"rank": 8}),
)


class Bench:
    """The base model with one adapter at a time, and the held-out items of every domain."""

    def __init__(self, first: Path, domains: Sequence[str]) -> None:
        gguf = GgufFile(find_gguf())
        tokenizer = load_tokenizer(gguf)
        self.model = PeftModel.from_pretrained(load_model(gguf), str(first), "first").eval()
        with self.model.disable_adapter():
            items = {
                d: draw_items(d, HELD_OUT_ITEMS, HELD_OUT_SEED, held_out=True) for d in domains
            }
            self.examples = {d: encode(self.model, tokenizer, items[d]) for d in domains}
            self.base = {d: mean_log_likelihood(self.model, self.examples[d]) for d in domains}

    def measure(self, folder: Path, domains: Sequence[str]) -> dict[str, float]:
        """Mean log-likelihood of these domains under an adapter."""
        self.model.load_adapter(str(folder), "measured")
        self.model.set_adapter("measured")
        try:
            return {d: mean_log_likelihood(self.model, self.examples[d]) for d in domains}
        finally:
            self.model.set_adapter("first")
            self.model.delete_adapter("measured")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, help="without: no method that needs one")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    # PEFT 0.21 asks every model this; transformers 5 renamed the attribute.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(THREADS)
    domains = [name.split("-")[0] for name in ADAPTERS]
    zoo = mpf.open_zoo([ZOO / name for name in ADAPTERS])
    bench = Bench(ZOO / ADAPTERS[0], domains)
    alone = {
        domain: bench.measure(ZOO / name, [domain])[domain]
        for name, domain in zip(ADAPTERS, domains, strict=True)
    }
    print(f"{'':24}{''.join(f'{d:>10}' for d in domains)}{'mean':>10}{'worst':>10}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for label, method, arguments in MERGES:
            if options.only and method not in options.only:
                continue
            needs = mpf.MERGE_METHODS[method].data
            if needs and options.calibration is None:
                print(f"{label:24}needs --calibration with {' and '.join(needs)}", flush=True)
                continue
            given = {"calibration": options.calibration} if needs else {}
            try:
                merged = mpf.merge(zoo, method, **arguments, **given)
            except mpf.InputError as error:  # a calibration without gradients
                print(f"{label:24}{error}", flush=True)
                continue
            folder = Path(temporary) / f"{len(rows)}"
            merged.save(folder)
            measured = bench.measure(folder, domains)
            kept = [(measured[d] - bench.base[d]) / (alone[d] - bench.base[d]) for d in domains]
            cells = [*kept, sum(kept) / len(kept), min(kept)]
            print(f"{label:24}{''.join(f'{c:10.3f}' for c in cells)}", flush=True)
            rows.append({"merge": label, "method": method, **dict(zip(domains, kept, strict=True))})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
