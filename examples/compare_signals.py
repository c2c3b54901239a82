"""Which signals tell what a merge does to whom, on the example zoo.

    python examples/calibrate_data.py --out out/texts --base out/base --items 24
    mergeprobe-fast calibrate out/base --data out/texts/*.jsonl --gradients --labels both \\
        --adapters examples/zoo --out out/points
    python examples/compare_signals.py --calibration out/points

Adds up every two adapters of different domains and measures the retention of each on 64 held-out
items of its own domain, as compare_merges.py does. Printed is the rank correlation of every signal
with the retention of the victim a beside the partner b, and a bootstrap interval over adapters (the
pairs share them). Baselines that know nothing of the pair are printed too: the victim alone and
the partner alone, each predicted by its mean over the other pairs.
"""

import argparse
import itertools
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from compare_merges import ZOO, Bench
from scipy.stats import rankdata
from train_zoo import THREADS

import mergeprobe_fast as mpf

RESAMPLES, SEED = 2000, 0


def measured(zoo: mpf.Zoo) -> dict[tuple[int, int], float]:
    """Retention of victim a in the sum of a and b, by index, for domains that differ."""
    domains = [name.split("-")[0] for name in zoo.names]
    bench = Bench(zoo[0].path, sorted(set(domains)))
    alone = [bench.measure(a.path, [d])[d] for a, d in zip(zoo, domains, strict=True)]
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for a, b in itertools.combinations(range(len(zoo)), 2):
            if domains[a] == domains[b]:
                continue
            folder = Path(temporary) / f"{a}-{b}"
            pair = mpf.open_zoo([zoo[a].path, zoo[b].path])
            mpf.merge(pair, "linear", weights=[1.0, 1.0]).save(folder)
            merged = bench.measure(folder, [domains[a], domains[b]])
            for victim, partner in ((a, b), (b, a)):
                d = domains[victim]
                gain = alone[victim] - bench.base[d]
                found[victim, partner] = (merged[d] - bench.base[d]) / gain
    return found


def signals(zoo: mpf.Zoo, calibration: Path) -> dict[str, np.ndarray]:
    """(N, N) of every pair feature, the victim first; twins under one name."""
    table = mpf.pair_features(zoo, "all", calibration=calibration)
    names = {name: name for name in mpf.FEATURES if name in table}
    for name, shown in list(names.items()):
        for one, other in (("_a_by_b", "_b_by_a"), ("_a", "_b")):
            twin = name.removesuffix(one) + other
            if name.endswith(one) and twin in names:
                names[name] = shown.removesuffix(one)
                del names[twin]
    return {shown: table.matrix(name) for name, shown in names.items()}


def others(truth: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of the other values of each one's group."""
    total = np.array([truth[groups == g].sum() for g in groups])
    count = np.array([(groups == g).sum() for g in groups])
    return (total - truth) / np.maximum(count - 1, 1)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; NaN where one side is constant, as resamples may be."""
    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / size) if size > 0 else np.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    options = parser.parse_args()
    # PEFT 0.21 asks every model this; transformers 5 renamed the attribute.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(THREADS)
    zoo = mpf.open_zoo(ZOO)
    table = signals(zoo, options.calibration)
    kept = measured(zoo)
    a, b = (np.array(side) for side in zip(*kept, strict=True))
    y = np.array(list(kept.values()))
    columns = {name: matrix[a, b] for name, matrix in table.items()}
    columns |= {"(victim's mean)": others(y, a), "(partner's mean)": others(y, b)}
    columns = {n: x for n, x in columns.items() if np.isfinite(x).all() and np.ptp(x) > 0}
    rng = np.random.default_rng(SEED)
    samples = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, len(zoo), len(zoo)), minlength=len(zoo))
        samples.append(np.repeat(np.arange(len(y)), times[a] * times[b]))
    print(f"{len(y)} directed pairs; retention {y.mean():.3f} on average, {y.min():.3f} at worst\n")
    print(f"{'signal':42}{'Spearman':>9}  95 % interval")
    for name in sorted(columns, key=lambda n: -abs(correlation(columns[n], y))):
        x = columns[name]
        spread = [correlation(x[rows], y[rows]) for rows in samples if len(rows) > 2]
        low, high = np.nanquantile(spread, [0.025, 0.975])
        print(f"{name:42}{correlation(x, y):9.2f}  [{low:5.2f}, {high:5.2f}]")


if __name__ == "__main__":
    main()
