"""What trained adapters look like: condition numbers, spectra, entries, distances from chance.

    python bench/real_adapters.py FOLDER [FOLDER ...] --out bench/results/real_adapters.md

The numerics of this package were worked out on Gaussian factors. This reads real ones: conditioning
of A, B and the update, how spectra fall, how heavy the entries' tails are, how far sign conflicts
are from what the cosine says, and how float32 inner products compare with float64 ones.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np

import mergeprobe_fast as mpf
from mergeprobe_fast.io.dtypes import STORAGE, to_f32
from mergeprobe_fast.io.read import read_tensor

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def factor(ref) -> np.ndarray:
    """A stored factor, float64, flattened to two axes."""
    raw = np.frombuffer(read_tensor(ref), STORAGE[ref.dtype]).reshape(ref.shape)
    return to_f32(raw, ref.dtype).astype(np.float64).reshape(ref.shape[0], -1)


def modules(zoo) -> dict[str, np.ndarray]:
    """One number per adapter and module."""
    found: dict[str, list[float]] = {}

    def told(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for adapter in zoo:
        for module in adapter.modules.values():
            a, b = factor(module.a), factor(module.b)
            sa, sb = (np.linalg.svd(f, compute_uv=False) for f in (a, b))
            sigma = np.linalg.svd(np.linalg.qr(b)[1] @ a, compute_uv=False)
            if not sigma[0] > 0:
                continue
            told("condition of A", sa[0] / sa[-1])
            told("condition of B", sb[0] / sb[-1] if sb[-1] > 0 else np.inf)
            told("condition of B A", sigma[0] / sigma[-1] if sigma[-1] > 0 else np.inf)
            share = sigma**2 / (sigma**2).sum()
            told("energy of the first direction", share[0])
            told("effective rank over rank", np.exp(-(share * np.log(share + 1e-300)).sum())
                 / len(sigma))  # fmt: skip
            told("norm of B over norm of A", np.linalg.norm(b) / np.linalg.norm(a))
    return {name: np.array(values) for name, values in found.items()}


def inner_products(zoo, most: int = 200) -> np.ndarray:
    """|cosine in float32 accumulation - in float64|, of pairs of adapters, module by module."""
    rng = np.random.default_rng(0)
    pairs = list(combinations(range(len(zoo)), 2))
    out = []
    for i, j in (pairs[k] for k in rng.permutation(len(pairs))[:most]):
        for name in sorted({*zoo[i].modules} & {*zoo[j].modules}):
            one, other = ([factor(getattr(zoo[n].modules[name], f)) for f in "ab"] for n in (i, j))
            exact = [_dot(x, y, np.float64) for x, y in ((one, other), (one, one), (other, other))]
            single = [_dot(x, y, np.float32) for x, y in ((one, other), (one, one), (other, other))]
            if exact[1] > 0 and exact[2] > 0:
                out.append(abs(single[0] / np.sqrt(single[1] * single[2])
                               - exact[0] / np.sqrt(exact[1] * exact[2])))  # fmt: skip
    return np.array(out)


def _dot(one, other, dtype) -> float:
    (a, b), (c, d) = ([f.astype(dtype) for f in pair] for pair in (one, other))
    return float(((b.T @ d) * (a @ c.T)).sum(dtype=dtype))


def row(name: str, values: np.ndarray) -> str:
    """A line of the table."""
    values = values[~np.isnan(values)]
    cells = " | ".join(f"{q:.3g}" for q in np.quantile(values, QUANTILES))
    return f"| {name} | {cells} | {len(values)} |"


def section(folder: Path) -> list[str]:
    """The table of one folder of adapters."""
    zoo = mpf.open_zoo(folder)
    ranks = sorted({m.rank for adapter in zoo for m in adapter.modules.values()})
    name = folder.parent.name if folder.name == "adapters" else folder.name
    lines = [f"## {name}", "",
             f"{len(zoo)} adapters of {zoo.base_model}, {len(zoo.modules)} modules, ranks "
             f"{ranks[0]} to {ranks[-1]}", "",
             "| | least | 5 % | median | 95 % | most | n |", "| --- |" + " ---: |" * 6]  # fmt: skip
    lines += [row(name, values) for name, values in modules(zoo).items()]
    lines.append(row("error of a float32 cosine", inner_products(zoo)))
    own = mpf.adapter_features(zoo, "all")
    lines += [row(f"{name} (adapters)", np.asarray(own[name], np.float64)) for name in (
        "entry_kurtosis", "zero_share", "top_energy")]  # fmt: skip
    pairs = mpf.pair_features(zoo, ["cosine", "cosine_z", "row_overlap", "col_overlap",
                                    mpf.entry_features("exact")])  # fmt: skip
    lines += [row(f"{name} (pairs)", np.asarray(pairs[name], np.float64)) for name in (
        "cosine", "cosine_z", "row_overlap", "col_overlap", "sign_conflict",
        "sign_conflict_residual", "product_weighted_sign_conflict", "ties_overlap",
        "magnitude_colocation")]  # fmt: skip
    return [*lines, ""]


def main() -> None:
    """Read the folders and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = ["# What trained adapters look like", "",
             "Made by `python bench/real_adapters.py`; over adapters, or over each module of each "
             "adapter.", ""]  # fmt: skip
    for folder in options.folders:
        lines += section(folder)
    options.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
