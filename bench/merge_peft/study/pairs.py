"""The directed labels of a run beside their features, as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mergeprobe_fast.errors import InputError

# Labels beyond are as bad, or as good, as it gets: a few would rule every mean.
BOUNDS = {
    "ll_norm": (-1.0, 1.2), "option_norm": (-1.0, 1.2), "accuracy_norm": (-1.0, 1.2),
    "retention": (-1.0, 2.0),
}  # fmt: skip
EXAM = "exam_"  # of metadata: whether an adapter was trained for it
# Columns of the features that only repeat how an adapter was trained.
_KNOWN = ("modules_", "rank_", "parameters_", "zero_modules_", "probe_steps_", "probe_fraction_",
          "probe_learning_rate_integral_")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pairs:
    """Directed labels of one operator: what a victim kept beside a partner. Arrays are (n,).

    Attributes:
        victim, partner: names of adapters.
        victim_domain, partner_domain: what they were trained for.
        victim_family, partner_family: adapters of one family differ in their seeds alone.
        victim_seed, partner_seed: of their training.
        y, se: the label and its standard error.
        metadata: numbers that are known before anything is computed: ranks, learning rates, and
            ``EXAM``... for zeros and ones, as all items of an exam share a base loss.
        signals: numbers that were computed; NaN where undefined.
        without_partner: how many labels were left out as nothing is known of the partner.
    """

    victim: np.ndarray
    partner: np.ndarray
    victim_domain: np.ndarray
    partner_domain: np.ndarray
    victim_family: np.ndarray
    partner_family: np.ndarray
    victim_seed: np.ndarray
    partner_seed: np.ndarray
    y: np.ndarray
    se: np.ndarray
    metadata: Mapping[str, np.ndarray]
    signals: Mapping[str, np.ndarray]
    without_partner: int = 0

    def __len__(self) -> int:
        return len(self.y)

    @property
    def cell(self) -> np.ndarray:
        """The directed domain pair of each row, as a number."""
        return codes(self.victim_domain, self.partner_domain)

    @property
    def families(self) -> np.ndarray:
        """(n, 2) numbers of the two families."""
        both = np.concatenate([self.victim_family, self.partner_family])
        return np.unique(both, return_inverse=True)[1].reshape(2, -1).T

    def part(self, which: np.ndarray) -> Pairs:
        """The rows of a mask."""
        fields = {n: v[which] for n, v in vars(self).items() if isinstance(v, np.ndarray)}
        for name in ("metadata", "signals"):
            fields[name] = {n: v[which] for n, v in getattr(self, name).items()}
        return Pairs(**fields)


def codes(*columns: Sequence) -> np.ndarray:
    """One number per different row of columns."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        own = np.unique(np.asarray(column), return_inverse=True)[1]
        numbers = np.unique(numbers * (own.max(initial=0) + 1) + own, return_inverse=True)[1]
    return numbers


def read_pairs(
    run_dir: str | os.PathLike[str],
    *,
    operator: str = "sum",
    target: str = "ll_norm",
    study: str = "pairs",
) -> Pairs:
    """The directed labels of an operator with the features of their pairs.

    Labels without a value (a victim that gained too little) are left out, and so are those whose
    partner has no row of its own, as it was not measured alone; others are clipped to ``BOUNDS``.
    ``signals`` are the columns of features.parquet but for those that repeat how an
    adapter was trained, and two that are made of them: ``norm_b_to_a``, the partner's norm over the
    victim's, and ``effect_trained_a_by_b``, first order and curvature together.

    Raises:
        InputError: a file that is not there, no such label, a pair without features.
    """
    folder = Path(run_dir)
    rows = _table(folder / "labels.parquet").to_pylist()
    metadata_of = {r["member"]: _metadata(r) for r in rows}
    about = {r["member"]: r for r in rows}
    rows = [r for r in rows if (r["operator"], r["study"]) == (operator, study)
            and r["partner"] is not None and r.get(target) is not None]  # fmt: skip
    labelled = len(rows)
    rows = [r for r in rows if r["partner"] in about]
    if not rows:
        raise InputError(f"no {target} of {operator} in {study}", path=folder / "labels.parquet")
    features = _table(folder / "features.parquet")
    place = {key: i for i, key in enumerate(zip(
        features["victim"].to_pylist(), features["partner"].to_pylist(), strict=True))}  # fmt: skip
    for r in rows:
        if (r["member"], r["partner"]) not in place:
            raise InputError("has no features", path=folder / "features.parquet", key=r["row"])
    where = np.array([place[r["member"], r["partner"]] for r in rows])
    signals = {
        name: features[name].to_numpy()[where].astype(np.float64)
        for name in features.column_names
        if ":" in name and not name.partition(":")[2].startswith(_KNOWN)
    }
    partners = [about[r["partner"]] for r in rows]
    first, second = ([metadata_of[r["member"]] for r in side] for side in (rows, partners))
    metadata = {f"{n}_a": np.array([m[n] for m in first]) for n in first[0]}
    metadata |= {f"{n}_b": np.array([m[n] for m in second]) for n in second[0]}
    for e in sorted({r["exam"] for r in (*rows, *partners)}):
        for letter, side in (("a", rows), ("b", partners)):
            metadata[f"{EXAM}{e}_{letter}"] = np.array([float(r["exam"] == e) for r in side])
    start = [np.array([r["train_init_seed"] for r in side]) for side in (rows, partners)]
    metadata["shared_init"] = (start[0] == start[1]).astype(np.float64)

    def column(side: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
        return np.array([r[name] for r in side], dtype=object)

    return Pairs(
        column(rows, "member"), column(partners, "member"),
        column(rows, "domain"), column(partners, "domain"),
        np.array([family(r) for r in rows]), np.array([family(r) for r in partners]),
        np.array([r["train_seed"] for r in rows]), np.array([r["train_seed"] for r in partners]),
        np.clip(np.array([r[target] for r in rows]), *BOUNDS.get(target, (-np.inf, np.inf))),
        np.array([r[f"{target}_se"] for r in rows], np.float64),
        metadata, signals | derived(signals), labelled - len(rows),
    )  # fmt: skip


def _table(path: Path):
    if not path.is_file():
        raise InputError("is not there", path=path)
    return pq.read_table(path)


def _metadata(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        "rank": float(row["train_rank"]), "lr": row["train_lr"], "steps": float(row["train_steps"]),
        "first_layer": float(row["train_layers"][0]),
        "osrm": float(row["train_variant"] == "osrm"),
        "flylora": float(row["train_variant"] == "flylora"),
    }  # fmt: skip


def family(row: Mapping[str, Any]) -> str:
    """What an adapter shares with its retrainings: exam and recipe, without the seeds."""
    names = ("exam", "train_rank", "train_lr", "train_steps", "train_layers", "train_variant")
    return "|".join(str(row[name]) for name in names)


def derived(signals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Signals that two columns make together, of every time of training that has both."""
    made = {}
    for prefix in {name.partition(":")[0] for name in signals}:
        one, other = (signals.get(f"{prefix}:norm_{s}") for s in "ba")
        if one is not None and other is not None:
            made[f"{prefix}:norm_b_to_a"] = np.divide(
                one, other, out=np.full_like(one, np.nan), where=other > 0
            )
        parts = [signals.get(f"{prefix}:{n}_trained_a_by_b") for n in ("first_order", "curvature")]
        if all(p is not None for p in parts):
            made[f"{prefix}:effect_trained_a_by_b"] = parts[0] + parts[1]
    return made
