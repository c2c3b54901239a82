"""Statistics of the entries of updates: signs, magnitudes, and which entries are the largest.

Sums and counts are added up over modules first, and ratios taken of the totals: a column is the
statistic of the concatenated updates, where an absent module counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from mergeprobe_fast.engine.entries import EntrySums, Looking, entry_sums, total_entries
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.features.declare import AdapterColumn, Family, PairColumn, ratio
from mergeprobe_fast.features.twins import directed
from mergeprobe_fast.ops.device import current_device
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Zoo

# Per adapter, over all modules. Of 50 adapters of a 7B model the pairs then take a tenth of the
# time of packing the factors, and a share of conflicts is known to 0.00024.
DEFAULT_ENTRIES = 1 << 22
# Standard error of a column of a sample, times the root of the entries looked at in the modules
# that both adapters have: measured over 150 samples of pairs with Gaussian factors of rank 4 and
# 16, apart or alike, and of pairs with log-normal rows, columns and units (kurtosis above 100).
SPREAD = {
    "sign_conflict": (0.6, 0.6), "sign_conflict_residual": (0.5, 0.7),
    "product_weighted_sign_conflict": (1.1, 10), "opposed_mass": (0.8, 2.2),
    "l1_cancellation": (0.5, 0.5), "ties_overlap": (1.1, 0.6), "ties_cosine": (0.9, 0.9),
    "magnitude_colocation": (1.4, 3.2),
}  # fmt: skip


def _conflict(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ratio(s.pairs.conflicts[a, b], s.pairs.both[a, b])


def _residual(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ratio(s.pairs.conflicts[a, b] - s.pairs.expected[a, b], s.pairs.both[a, b])


def _weighted(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ratio(s.pairs.conflict_mass[a, b], s.pairs.mass[a, b])


def _alive(s: EntrySums, a: np.ndarray, b: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values``, 0 where one of the two updates is zero: as a divisor, undefined."""
    return np.where((s.adapters.l1[a] > 0) & (s.adapters.l1[b] > 0), values, 0.0)


def _opposed(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ratio(s.pairs.opposed[a, b], _alive(s, a, b, s.adapters.l1[a]))


def _cancellation(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    both = _alive(s, a, b, s.adapters.l1[a] + s.adapters.l1[b])
    return ratio(2 * s.pairs.cancelled[a, b], both)


def _jaccard(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    top, shared = s.adapters.top, s.pairs.top[a, b]
    return ratio(shared, _alive(s, a, b, top[a] + top[b] - shared))


def _mask_cosine(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    top = s.adapters.top
    return ratio(s.pairs.top[a, b], _alive(s, a, b, np.sqrt(top[a] * top[b])))


def _colocation(s: EntrySums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    root = np.sqrt(s.adapters.fourths)
    return ratio(s.pairs.squares[a, b], _alive(s, a, b, root[a] * root[b]))


def _pair_columns(density: float, entries: int | None) -> tuple[PairColumn, ...]:
    columns = _declared(density)
    if entries is None:
        return columns
    return tuple(replace(c, definition=f"{c.definition} {_error(c, entries)}") for c in columns)


def _error(column: PairColumn, entries: int) -> str:
    """In words, the standard error of a sample."""
    name = column.name.removesuffix("_a_by_b").removesuffix("_b_by_a")
    usual, heavy = (s / math.sqrt(entries) for s in SPREAD[name])
    return f"Standard error with {entries:,} entries: {usual:.1g} ({heavy:.1g} for heavy tails)."


def _declared(density: float) -> tuple[PairColumn, ...]:
    unit, share = (0.0, 1.0), f"{density:g}"
    jaccard = density / (2 - density)
    return (
        PairColumn(
            "sign_conflict", "Sign conflicts",
            "Share of the entries in which the two updates have opposite signs, of those that are "
            "0 in neither. Above 1/2 they fight over the direction of most weights.",
            _conflict, *unit, 0.5, "1/2", source="TIES (Yadav et al. 2023)",
        ),
        PairColumn(
            "sign_conflict_residual", "Sign conflicts beyond the cosine",
            "Sign conflicts less what Gaussian entries would have, arccos(cosine) / pi, module by "
            "module: what signs say that the cosine does not.",
            _residual, -1.0, 1.0, 0.0, "0", source="Sheppard 1899; ours",
        ),
        PairColumn(
            "product_weighted_sign_conflict", "Sign conflicts by product",
            "Sum of |w_a w_b| over entries with opposite signs, over the sum over all entries: "
            "conflicts where neither has much at stake hardly count.",
            _weighted, *unit, 0.5, "1/2", source="ours",
        ),
        *directed(
            "opposed_mass", "Mass of {a} opposed by {b}",
            "Share of the sum of |w_{a}| in entries where {b} has the opposite sign.",
            _opposed, low=0.0, high=1.0, null=0.5, null_text="1/2 where they share all modules",
            source="ours", bounded=unit,
        ),
        PairColumn(
            "l1_cancellation", "Cancellation",
            "1 - |W_a + W_b|_1 / (|W_a|_1 + |W_b|_1), the sums of the entries' magnitudes: what "
            "adding the two loses. The smaller entry of each conflict, twice.",
            _cancellation, *unit, None,
            "1 - sqrt(1 + q^2) / (1 + q) for Gaussian entries, q the ratio of the norms: 0.293 for "
            "equal ones; less for heavy tails",
            source="standard", bounded=unit,
        ),
        PairColumn(
            "ties_overlap", "Overlap of the largest entries",
            f"Jaccard index of the two sets of largest entries, the top {share} of each module by "
            "magnitude (with the thresholds that PEFT's TIES has): shared over in either.",
            _jaccard, *unit, jaccard, f"{jaccard:.3g}: density / (2 - density)",
            source="TIES (Yadav et al. 2023)",
        ),
        PairColumn(
            "ties_cosine", "Cosine of the largest entries' places",
            f"Shared ones of the top {share} entries over the geometric mean of their numbers.",
            _mask_cosine, *unit, density, f"{share}: the density",
            source="TIES (Yadav et al. 2023)",
        ),
        PairColumn(
            "magnitude_colocation", "Co-location of magnitudes",
            "Cosine of the two updates' squared entries: 1 where both put their magnitude into "
            "the same weights, whatever the signs.",
            _colocation, *unit, None, "1 / entry_kurtosis: 1/3 for Gaussian entries",
            bounded=unit, source="ours",
        ),
    )  # fmt: skip


def _adapter_columns(density: float) -> tuple[AdapterColumn, ...]:
    share = f"{density:g}"
    return (
        AdapterColumn(
            "l1_norm", "L1 norm", "Sum of the magnitudes of all entries.",
            lambda s: np.where(s.adapters.modules > 0, s.adapters.l1, 0.0), "standard", 0.0,
        ),
        AdapterColumn(
            "entry_kurtosis", "Kurtosis of entries",
            "n sum w^4 / (sum w^2)^2 over all n entries of the modules it has: 1 where all are as "
            "large, 3 for Gaussian entries of one size.",
            lambda s: ratio(s.adapters.fourths * s.adapters.entries, s.adapters.squares**2),
            "standard", 1.0,
        ),
        AdapterColumn(
            "entry_kurtosis.mean", "Kurtosis of entries within modules",
            "Mean over modules of each one's kurtosis: 3 for Gaussian entries, 3 (1 + 2 / r) for "
            "Gaussian factors of rank r, but for rows and columns of different sizes.",
            lambda s: ratio(s.adapters.kurtosis, s.adapters.seen), "standard", 1.0,
        ),
        AdapterColumn(
            "zero_share", "Share of zeros", "Share of the entries that are exactly 0.",
            lambda s: ratio(s.adapters.zeros, s.adapters.entries), "standard", 0.0, 1.0,
        ),
        AdapterColumn(
            "top_energy", f"Energy of the top {share}",
            f"Share of the squared norm in the top {share} entries of each module by magnitude.",
            lambda s: ratio(s.adapters.top_squares, s.adapters.squares),
            "TIES (Yadav et al. 2023)", 0.0, 1.0,
        ),
        AdapterColumn(
            "top_threshold", f"Threshold of the top {share}",
            f"Mean over modules of the smallest of the top {share} magnitudes, over the root mean "
            "square of the module's entries.",
            lambda s: ratio(s.adapters.threshold, s.adapters.thresholds),
            "TIES (Yadav et al. 2023)", 0.0,
        ),
    )  # fmt: skip


# Multiply-adds of the block Gram that take as long, of one core: per number of a factor, which is
# read and packed three times, and per entry of a pair. Rebuilding an entry twice takes its own.
_PACK, _PAIR = 450, 5


def _work(looking: Looking) -> Callable[[Zoo], float]:
    def work(zoo: Zoo) -> float:
        total, entries_there = 0.0, total_entries(zoo)
        entries = zoo.table.entries
        for k, module in enumerate(zoo.modules):
            here = entries["rank"][slice(*zoo.table.module_bounds[k : k + 2])]
            size = min(module.d_out * module.d_in, looking.wanted(module, entries_there))
            pairs = len(here) * (len(here) - 1) / 2
            total += size * (2 * here.sum() + _PAIR * pairs)
            total += _PACK * here.sum() * (module.d_out + module.d_in)
        return total

    return work


def entry_features(
    entries: Literal["exact"] | int = DEFAULT_ENTRIES, *, density: float = 0.2, seed: int = 0
) -> Family:
    """Columns of the entries of updates, to be asked for like the name of a feature.

    Args:
        entries: how many of each adapter are looked at, over all modules (at least 8,192 of each);
            "exact": all.
        density: share of the entries of each module that count as its largest.
        seed: which entries are looked at.

    On a device everything is there, but whether an update is nothing but rounding is looked at on
    the CPU, for those that may be.

    Raises:
        InputError: arguments out of range.
    """
    if entries is None or (isinstance(entries, str) and entries != "exact"):
        raise InputError(f'expected "exact" or a positive integer, got {entries!r}', key="entries")
    looking = Looking(None if entries == "exact" else entries, density, seed)

    def compute(zoo: Zoo, recorded: Recorded, threads: int) -> EntrySums:
        return entry_sums(zoo, looking, threads=threads, device=current_device())

    return Family(
        "entries", lambda recorded: None, compute, title="Entries",
        pairs=_pair_columns(looking.density, looking.entries),
        adapters=_adapter_columns(looking.density), by_default=False, work=_work(looking), pace=2.5,
        cost="5 per entry looked at", made_from=repr(looking),
    )  # fmt: skip


FAMILY = entry_features()
