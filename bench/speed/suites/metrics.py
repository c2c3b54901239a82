"""All statistics of all pairs, against the reference code of 2601.22285 and against gradience."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cases import OURS, Case, Fact, Variant, Work
from data import ALPHA_OVER_R, Shapes, small_model, temporary_folder, uniform, write_zoo
from harness import REPOSITORY, Finished, SelfTimed, run_process, threads, timed_process
from reference_2601 import updates

import mergeprobe_fast as mpf
from suites.peers import AUDIT, GRADIENCE

# A checkout of the reference code, whose requirements would clash with ours.
CHECKOUT = Path(os.environ.get("MERGEPROBE_BENCH_2601", ".reference-2601"))
METRICS = CHECKOUT.absolute() / "src/model_merging/metrics/mergeability.py"
SCRIPT = REPOSITORY / "bench/speed/reference_2601.py"
PEER, REFERENCE = "2601.22285", "2601.22285's reference code, 18 metrics"
SAME, SAME_AUDIT = "the same 18 metrics, features 2601.22285", "features gradience"
FEATURES = {OURS: "all", SAME: "2601.22285", SAME_AUDIT: "gradience"}
TOP = 10  # theirs
TOLERANCE = 1e-6
# Of their float32 sums, for each entry: a fiftieth of the worst case, five times what was seen.
ROUNDING = 2.0**-24 / 50
COUNT = """
import sys, json, numpy as np, mergeprobe_fast as mpf
table = mpf.pair_features(sys.argv[1], sys.argv[2], threads=int(sys.argv[3]))
columns = [name for name in table if name not in ("a", "b")]
known = sum(int(np.isfinite(table[name]).sum()) for name in columns)
print(json.dumps({"rows": table.rows, "columns": len(columns), "known": known}))
"""


@dataclass(frozen=True)
class Zoo:
    """Adapters of one rank; their side is timed on a pair with only ``few`` of these modules."""

    name: str
    count: int
    shapes: Shapes
    few: Shapes
    rank: int
    repetitions: int

    @property
    def pairs(self) -> int:
        return self.count * (self.count - 1) // 2


def cases(quick: bool) -> list[Case]:
    """Layers of a 7B model, and a small model. A peer that is not there is left out, as noted."""
    zoos = (
        Zoo("8 modules of 256^2", 6, uniform(8, 256, 256), uniform(2, 256, 256), 16, 1),
    ) if quick else (
        Zoo("224 modules of 4096^2", 50, uniform(224, 4096, 4096), uniform(1, 4096, 4096), 16, 1),
        Zoo("144 modules of 768^2", 25, small_model(), uniform(2, 768, 768), 8, 3),
    )  # fmt: skip
    return [_case(z) for z in zoos]


def _case(zoo: Zoo) -> Case:
    said = "interpreter start included" + ", once, unwarmed" * (zoo.repetitions == 1)
    peers = (METRICS, "MERGEPROBE_BENCH_2601"), (GRADIENCE, "MERGEPROBE_BENCH_PEERS")
    absent = "".join(f"; nothing at {key}: left out" for path, key in peers if not path.exists())
    variants = [
        Variant(OURS, note=f'pair_features(zoo, "all") without a calibration, {said}{absent}'),
        Variant(SAME, compare=False, note=said),
        Variant(SAME_AUDIT, compare=False, note=said),
    ]
    if METRICS.exists():
        digest = hashlib.sha256(METRICS.read_bytes()).hexdigest()[:12]
        variants.append(
            Variant(REFERENCE, PEER, extrapolated=True, most=1, note="one pair with "
                    f"{len(zoo.few)} module(s), once, times modules and pairs; deltas materialised "
                    "once an adapter; no start-up; top and bottom overlaps from one decomposition; "
                    f"mergeability.py {digest}")
        )  # fmt: skip
    if GRADIENCE.exists():
        variants.append(
            Variant(AUDIT, "gradience", factor=zoo.pairs, extrapolated=True, most=1,
                    note=f"one audit of all modules, once, times {zoo.pairs} pairs, start-up "
                    "included")
        )  # fmt: skip
    name = f"every statistic, {zoo.count} adapters, {zoo.name}, r={zoo.rank}"
    return Case("metrics", name, 2, "wall", zoo.repetitions, tuple(variants),
                partial(_prepare, zoo, [v.name for v in variants]))  # fmt: skip


@contextmanager
def _prepare(zoo: Zoo, names: list[str]) -> Iterator[Work]:
    with temporary_folder() as root:
        with threads(1):  # drawing numbers in two threads waits more than it draws
            write_zoo(root / "zoo", zoo.count, zoo.shapes, zoo.rank)
            whole = write_zoo(root / "whole", 2, zoo.shapes, zoo.rank, seed=1)
            few = write_zoo(root / "few", 2, zoo.few, zoo.rank, seed=2)
        run = {
            name: partial(timed_process, [sys.executable, "-c", COUNT, root / "zoo", asked, "2"])
            for name, asked in FEATURES.items()
        }
        if REFERENCE in names:
            run[REFERENCE] = partial(_reference, zoo, few)
        if AUDIT in names:
            audit = [GRADIENCE.absolute(), "merge-audit", "--adapter-a", whole[0],
                     "--adapter-b", whole[1], "--output-dir", root / "audit"]  # fmt: skip
            run[AUDIT] = lambda: timed_process(audit, cwd=root)

        def finish(results: Mapping[str, Finished], medians: Mapping[str, float]) -> list[Fact]:
            facts = [_computed(zoo, name, results[name]) for name in FEATURES]
            facts.append(_rss(OURS, OURS, results[OURS], "the whole zoo"))
            if REFERENCE in names:
                facts += _of_reference(zoo, root / "few", results[REFERENCE], medians)
            if AUDIT in names:
                facts += _of_audit(root, results[AUDIT], medians)
            return facts

        yield Work(run, finish)


def _reference(zoo: Zoo, few: list[Path]) -> SelfTimed:
    """Seconds for the whole zoo, from one pair."""
    k = min(TOP, zoo.rank)  # beyond it their vectors are arbitrary
    done = run_process([sys.executable, SCRIPT, METRICS, *few, ALPHA_OVER_R, k, 2])
    seconds = json.loads(done.stdout)["seconds"]
    materialised = seconds.pop("materialised") / 2 * zoo.count
    metrics = math.fsum(seconds.values()) * zoo.pairs
    return SelfTimed((materialised + metrics) * len(zoo.shapes) / len(zoo.few), done)


def _computed(zoo: Zoo, name: str, done: Finished) -> Fact:
    """That the timed call gave a number for every pair."""
    found = json.loads(done.stdout)
    assert found["rows"] == zoo.pairs, f"{name}: {found['rows']} pairs"
    assert found["known"] == found["rows"] * found["columns"], f"{name}: {found['known']} numbers"
    return Fact(f"columns, features {FEATURES[name]}", found["columns"], "1")


def _rss(name: str, peer: str, done: Finished, what: str) -> Fact:
    return Fact(f"peak RSS, {name}", done.peak_rss / 1e6, "MB", peer=peer, note=what)


def _of_reference(zoo: Zoo, few: Path, done: Finished, medians: Mapping[str, float]) -> list[Fact]:
    theirs = json.loads(done.stdout)
    facts = _agreement(zoo, few, theirs["values"])
    seconds = {name: s for name, s in theirs["seconds"].items() if name != "materialised"}
    each = 1e3 / (zoo.pairs * len(zoo.shapes))
    dense = 2 * 4 * sum(d_out * d_in for d_out, d_in in zoo.shapes.values())
    return [
        *facts,
        Fact("reference code over ours, the same 18 metrics", medians[REFERENCE] / medians[SAME],
             "x faster", peer=PEER, note="extrapolated"),
        Fact("a pair and module, reference code", 1e3 * math.fsum(seconds.values())
             / len(zoo.few), "ms", peer=PEER, note="deltas in memory"),
        Fact("a pair and module, features 2601.22285", medians[SAME] * each, "ms"),
        Fact("a pair and module, features all", medians[OURS] * each, "ms"),
        _rss(REFERENCE, PEER, done, f"one pair with {len(zoo.few)} module(s)"),
        Fact("two dense updates of all modules, float32", dense / 1e6, "MB", peer=PEER,
             note="computed: what the reference code is called with for one pair"),
    ]  # fmt: skip


def _agreement(zoo: Zoo, few: Path, theirs: Mapping[str, float]) -> list[Fact]:
    """Ours against float64 and theirs against both, on scales on which the numbers reach 1.

    Theirs of the weakest vectors are of the null space. subspace_overlap is over k there, over
    sqrt(k) here. Of flattened updates theirs has the roundings of float32 sums over all entries.
    """
    table = mpf.pair_features(few, "2601.22285", threads=2)
    assert set(theirs) == {name for name in table if name not in ("a", "b")}, "other metrics"
    exact = _exact(few)
    overlaps = [name for name in theirs if name not in exact and "bottom" not in name]
    over = {"subspace_overlap": math.sqrt(min(TOP, zoo.rank))}
    apart = {name: theirs[name] * over.get(name, 1.0) - table[name][0] for name in overlaps}
    sums = sum(d_out * d_in for d_out, d_in in zoo.few.values()) * ROUNDING
    found = (
        ("overlaps and spectra, difference from theirs", apart, TOLERANCE, OURS),
        ("flat metrics, error", {n: table[n][0] - v for n, (v, _) in exact.items()}, TOLERANCE,
         OURS),
        ("flat metrics, error", {n: theirs[n] - v for n, (v, _) in exact.items()}, sums, PEER),
    )  # fmt: skip
    facts = []
    for what, errors, allowed, peer in found:
        size = {n: float(abs(e)) / (exact[n][1] if n in exact else 1.0) for n, e in errors.items()}
        worst = max(size, key=size.__getitem__)
        assert size[worst] < allowed, f"{what}, {peer}: {worst} {size[worst]:.1e}"
        note = f"largest of {len(size)}: {worst}{'' if 'difference' in what else ', to float64'}"
        facts.append(Fact(what, size[worst], "1", peer=peer, note=note))
    return facts


def _exact(few: Path) -> dict[str, tuple[float, float]]:
    """Their twelve metrics of flattened updates in float64, each with its scale."""
    one, two = (updates(path, ALPHA_OVER_R) for path in sorted(few.iterdir()))
    pairs = [torch.stack([one[key].flatten(), two[key].flatten()]).double() for key in one]
    grams = np.array([(x @ x.T).numpy() for x in pairs])  # of each module, 2 x 2

    def singular(gram: np.ndarray) -> np.ndarray:
        return np.sqrt(np.linalg.eigvalsh(gram)[..., ::-1])

    def rank(gram: np.ndarray) -> np.ndarray:
        share = singular(gram) / singular(gram).sum(-1, keepdims=True)
        return np.exp(-(share * np.log(share)).sum(-1))

    whole = grams.sum(0)
    norms, dot, s = np.sqrt(np.diag(whole)), whole[0, 1], singular(whole)
    cosine = dot / norms.prod()
    layers = np.average(rank(grams), weights=np.sqrt(np.einsum("mii->mi", grams)).sum(1))
    return {
        "task_vector_cosine_similarity": (cosine, 1.0),
        "task_vector_l2_distance": (math.sqrt(np.trace(whole) - 2 * dot), norms.max()),
        "task_vector_dot_product": (dot, norms.prod()),
        "weight_space_angle": (math.degrees(math.acos(cosine)), math.degrees(1)),
        "task_vector_magnitude_ratio": (norms.min() / norms.max(), 1.0),
        "effective_rank": (rank(whole), 1.0),
        "effective_rank_mergeability_score": (2 - rank(whole), 1.0),
        "stable_rank": (s.sum() ** 2 / np.square(s).sum(), 1.0),
        "spectral_gap": (1 - s[1] / s[0], 1.0),
        "singular_value_ratio": (s[1] / s[0], 1.0),
        "layerwise_effective_rank": (layers, 1.0),
        "layerwise_effective_rank_mergeability_score": (2 - layers, 1.0),
    }


def _of_audit(root: Path, done: Finished, medians: Mapping[str, float]) -> list[Fact]:
    layers = json.loads((root / "audit/merge_audit.json").read_text())["per_layer"]
    table = mpf.pair_features(root / "whole", "gradience", threads=2)
    apart = {}
    for name in ("mean_overlap", "max_overlap", "directional_agreement", "scale_bounded_ratio",
                 "frob_bounded_ratio"):  # fmt: skip
        mine = table[f"{name}_a" if name == "directional_agreement" else name][0]
        apart[name] = abs(np.mean([x["metrics"][name] for x in layers]) - mine)
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < TOLERANCE, f"{worst}: {apart[worst]:.1e} from gradience"
    return [
        Fact(f"largest difference, {len(apart)} metrics", float(apart[worst]), "1",
             peer="gradience", note=f"of {worst}"),
        Fact("merge-audit over ours, the same metrics", medians[AUDIT] / medians[SAME_AUDIT],
             "x faster", peer="gradience", note="extrapolated"),
        _rss(AUDIT, "gradience", done, "one pair, all modules"),
    ]  # fmt: skip
